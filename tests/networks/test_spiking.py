"""LIF scans against step-by-step loops that autograd differentiates, against snnTorch, and by hand."""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch
from torch import nn

from networks.spiking import (
    LIF,
    SURROGATES,
    DelayLayer,
    Events,
    SpikingMLP,
    choose_backend,
    lif_scan,
    sparse_linear,
)

BACKENDS = ["torch", pytest.param("numba", marks=pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba"))]  # fmt: skip


class Step(torch.autograd.Function):
    """The step function with a surrogate derivative, for the loop below."""

    @staticmethod
    def forward(ctx, x, surrogate):
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * SURROGATES[ctx.surrogate](x), None


def loop(x, beta, threshold=1.0, reset="subtract", surrogate="arctan"):
    """LIF neurons one step after the other, differentiated by autograd with a detached reset."""
    u = s = torch.zeros_like(x[0])
    spikes, potentials = [], []
    b = torch.as_tensor(beta).clamp(0, 1)
    for current in x.unbind(0):
        if reset == "subtract":
            u = b * u + current - threshold * s.detach()
        else:
            u = b * u + current - b * threshold * s.detach()
        s = Step.apply(u - threshold, surrogate)
        spikes.append(s)
        potentials.append(u)
    return torch.stack(spikes), torch.stack(potentials)


@pytest.mark.parametrize("backend", BACKENDS)
def test_five_steps_by_hand(backend):
    x = torch.tensor([0.6, 0.6, 0.9, 0.0, 1.5]).view(5, 1, 1)
    spikes, potentials = lif_scan(x, 0.5, backend=backend)
    # 0.6; 0.3 + 0.6; 0.45 + 0.9 > 1 fires; 0.675 - 1; -0.1625 + 1.5 > 1 fires
    assert torch.allclose(potentials.flatten(), torch.tensor([0.6, 0.9, 1.35, -0.325, 1.3375]))
    assert spikes.flatten().tolist() == [0, 0, 1, 0, 1]
    paper = lif_scan(x, 0.5, reset="paper", backend=backend)
    # the reset decays too: 0.675 - 0.5; 0.0875 + 1.5
    assert torch.allclose(paper.potentials.flatten(), torch.tensor([0.6, 0.9, 1.35, 0.175, 1.5875]))


def test_the_threshold_itself_does_not_fire():
    assert lif_scan(torch.ones(1, 1), 0.5).spikes.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("reset", ["subtract", "paper"])
def test_equal_to_the_loop(backend, surrogate, reset):
    torch.manual_seed(0)
    x = torch.randn(200, 3, 7, dtype=torch.float64) * 0.8
    one, two = (x.clone().requires_grad_() for _ in range(2))
    beta, beta2 = (torch.tensor(0.8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    s, u = loop(one, beta, reset=reset, surrogate=surrogate)
    s2, u2 = lif_scan(two, beta2, reset=reset, surrogate=surrogate, backend=backend)
    assert torch.equal(s, s2) and torch.allclose(u, u2, atol=1e-12) and s.sum() > 100
    w, v = torch.randn_like(s), torch.randn_like(s)
    ((s * w).sum() + (u * v).sum()).backward()
    ((s2 * w).sum() + (u2 * v).sum()).backward()
    assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-10)
    # The paper's reset contains beta; in the loop the spikes are detached there, beta is not.
    assert beta2.grad.item() == pytest.approx(beta.grad.item(), rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.15, 0.3, 1.0])
def test_equal_to_snntorch(backend, scale):
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    x = (torch.randn(1000, 2, 40) * scale).requires_grad_()
    leaky = snntorch.Leaky(beta=0.9, learn_beta=True)
    memory, spikes = leaky.init_leaky(), []
    for current in x.unbind(0):
        spike, memory = leaky(current, memory)
        spikes.append(spike)
    theirs = torch.stack(spikes)
    w = torch.randn_like(theirs)
    (theirs * w).sum().backward()
    own = x.detach().clone().requires_grad_()
    beta = torch.tensor(0.9, requires_grad=True)
    ours = lif_scan(own, beta, backend=backend).spikes
    (ours * w).sum().backward()
    assert torch.equal(ours, theirs) and ours.sum() > 10
    assert (own.grad - x.grad).abs().max() <= 1e-5 * x.grad.abs().max()
    assert beta.grad.item() == pytest.approx(leaky.beta.grad.item(), rel=1e-4)


def equal_on(device):
    torch.manual_seed(0)
    x, w = torch.randn(2, 120, 3, 50)
    results = []
    for backend in ("torch", "triton"):
        one = x.to(device).requires_grad_()
        beta = torch.tensor(0.8, device=device, requires_grad=True)
        spikes, potentials = lif_scan(one, beta, backend=backend)
        ((spikes + potentials) * w.to(device)).sum().backward()
        results.append((spikes, one.grad, beta.grad))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].sum() > 100
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_is_the_loop_on_a_gpu():
    equal_on("cuda")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton and TRITON_INTERPRET=1",
)
def test_triton_is_the_loop_in_its_interpreter():
    equal_on("cpu")


def test_decay_of_every_neuron_and_clamp():
    torch.manual_seed(1)
    x = torch.randn(60, 2, 4, dtype=torch.float64)
    beta = torch.tensor([0.2, 0.9, 1.3, -0.4], dtype=torch.float64, requires_grad=True)
    other = beta.detach().clone().requires_grad_()
    s, u = lif_scan(x, beta)
    s2, u2 = loop(x, other)
    assert torch.equal(s, s2)
    u.square().sum().backward()
    u2.square().sum().backward()
    assert torch.allclose(beta.grad, other.grad) and beta.grad[2] == beta.grad[3] == 0 and beta.grad[0] != 0


def test_surrogates():
    x = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    for name, derivative in SURROGATES.items():
        values = derivative(x)
        assert values.argmax() == 10000 and torch.allclose(values, values.flip(0)), name
    assert SURROGATES["arctan"](torch.tensor(0.0)) == 1
    assert torch.allclose(SURROGATES["arctan_paper"](x) * math.pi, SURROGATES["arctan"](x))
    # The paper's is the derivative of a step of height one.
    wide = torch.linspace(-1000, 1000, 2_000_001, dtype=torch.float64)
    assert torch.trapezoid(SURROGATES["arctan_paper"](wide), wide) * math.pi == pytest.approx(1.0, rel=1e-3)


def test_no_gradient_needs_no_memory():
    spikes, _ = lif_scan(torch.rand(5, 2), 0.9)
    assert spikes.grad_fn is None


def events(steps=50, items=3, channels=6, count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(n, (count,), generator=generator) for n in (steps, items, channels)]
    return Events(*draw, torch.rand(count, generator=generator), steps, items)


def test_sparse_inputs_are_dense_ones():
    layer, e = nn.Linear(6, 5), events()
    dense = layer(e.dense(6))
    sparse = sparse_linear(layer, e)
    assert torch.allclose(dense, sparse, atol=1e-6)
    w = torch.randn_like(dense)
    grads = [torch.autograd.grad((out * w).sum(), [layer.weight, layer.bias]) for out in (dense, sparse)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_perceptron_of_spikes():
    torch.manual_seed(0)
    net, e = SpikingMLP(6, [9, 8], 4, beta=0.7), events()
    for linear in net.linear:
        linear.weight.detach().mul_(4)
    traces = net.layers(e)
    assert [t.spikes.shape[-1] for t in traces] == [9, 8, 4] and net(e).shape == (50, 3, 4)
    by_hand = e.dense(6)
    for linear, neurons in zip(net.linear, net.neurons, strict=True):
        by_hand = loop(linear(by_hand), neurons.beta)[0]
    assert torch.equal(by_hand, net(e.dense(6)))
    net(e).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters()), "also of the last layer"


def test_whole_delays_shift():
    x = torch.rand(20, 2, 3)
    for kernel in ("linear", "softmax"):
        layer = DelayLayer(torch.tensor([0.0, 2.0, 5.0]), 5, kernel, sigma=0.05)
        y = layer(x)
        for c, d in enumerate((0, 2, 5)):
            assert torch.allclose(y[d:, :, c], x[: 20 - d, :, c], atol=1e-6) and (y[:d, :, c].abs() < 1e-6).all()
    assert layer.delays().tolist() == [0, 2, 5]


def test_fractions_of_delays_interpolate_and_have_a_gradient():
    layer = DelayLayer(torch.tensor([1.25]), 4, "linear")
    x = torch.zeros(8, 1, 1)
    x[2] = 1
    y = layer(x)
    assert torch.allclose(y.flatten()[3:5], torch.tensor([0.75, 0.25]))
    (y.flatten() * torch.arange(8)).sum().backward()
    assert layer.position.grad.item() == pytest.approx(1.0)  # the mean time moves with the delay


@pytest.mark.parametrize("kernel", ["linear", "gaussian", "softmax"])
def test_kernels_sum_to_one(kernel):
    layer = DelayLayer(torch.tensor([0.0, 1.5, 4.0]), 4, kernel)
    assert torch.allclose(layer.weights().sum(-1), torch.ones(3))


def test_gradcheck_of_the_kernels():
    x = torch.rand(5, 1, 2, dtype=torch.float64)
    for kernel in ("linear", "gaussian", "softmax"):
        layer = DelayLayer(torch.tensor([1.3, 2.6]), 4, kernel).double()
        parameter = next(iter(layer.parameters()))
        assert torch.autograd.gradcheck(lambda p, layer=layer: _with(layer, p, x), (parameter,))


def _with(layer, parameter, x):
    name = next(iter(dict(layer.named_parameters())))
    return torch.func.functional_call(layer, {name: parameter}, (x,))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lif_scan(torch.zeros(0, 3), 0.5), "at least one step"),
        (lambda: lif_scan(torch.zeros(2, 3), 0.5, reset="zero"), "reset='zero'"),
        (lambda: lif_scan(torch.zeros(2, 3), 0.5, surrogate="box"), "surrogate='box'"),
        (lambda: lif_scan(torch.zeros(2, 3), 0.5, backend="c"), "backend='c'"),
        (lambda: LIF(beta=1.5), "model.net.beta=1.5"),
        (lambda: LIF(reset="zero"), "model.net.reset"),
        (lambda: SpikingMLP(3, [0], 2), "at least one"),
        (lambda: DelayLayer(torch.tensor([7.0]), 5), "max_delay=5"),
        (lambda: DelayLayer(torch.tensor([1.0]), 5, "box"), "kernel='box'"),
    ],
)
def test_wrong_values(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_backends_are_chosen_by_what_there_is(monkeypatch):
    x = torch.zeros(2, 2)
    assert choose_backend(x.half(), "auto") == "torch"
    monkeypatch.setattr("networks.spiking._numba_kernels", lambda: None)
    with pytest.raises(ImportError, match="pip install numba"):
        choose_backend(x, "numba")
    with pytest.warns(UserWarning, match="slower loop"):
        from networks.spiking import _warn_without_numba

        _warn_without_numba.cache_clear()
        assert choose_backend(x, "auto") == "torch"
