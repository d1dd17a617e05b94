from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from networks.series.attention import FullAttention
from networks.series.informer import Distillation, Informer, ProbSparseAttention
from tests.networks.series.contract import SMALL, BackboneContract, real_numbers


class TestInformer(BackboneContract):
    network = Informer
    # factor 1: at 24 steps only 4 queries attend, so the sparse path is what runs
    sizes: ClassVar[dict[str, Any]] = {**SMALL, "factor": 1}
    # BatchNorm subtracts what is constant in time: the convolution's bias and the one of the norm before it
    zero_gradient = (
        "key_projection.bias",
        "reductions.0.convolution.bias",
        "encoder.layers.0.feed_forward_norm.bias",
    )


def tensors(length: int, memory: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    memory = length if memory is None else memory
    return tuple(torch.randn(2, n, 3, 4, generator=generator, dtype=torch.float64) for n in (length, memory, memory))


def test_parameters_of_the_study() -> None:
    with torch.device("meta"):
        network = Informer(history_length=96, horizon=96, channels=7, label_length=48)
    assert real_numbers(network) == 11_328_007


@pytest.mark.parametrize("causal", [True, False])
def test_large_factor_is_full_attention(causal: bool) -> None:
    queries, keys, values = tensors(20)
    sparse = ProbSparseAttention(4, factor=20, causal=causal).eval()
    torch.testing.assert_close(
        sparse(queries, keys, values), FullAttention(4, causal=causal).eval()(queries, keys, values)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("causal", "memory"), [(True, 40), (False, 40), (False, 25)])
def test_prob_sparse_attention_follows_the_definition(
    causal: bool, memory: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops over queries and sampled keys, as the paper states it."""
    queries, keys, values = tensors(40, memory)
    attention = ProbSparseAttention(4, factor=2, causal=causal).train(training)
    sample = attention.sample_keys(40, memory, queries.device)
    monkeypatch.setattr(attention, "sample_keys", lambda *_: sample)
    selected = 2 * math.ceil(math.log(40))
    assert sample.shape == (40, 2 * math.ceil(math.log(memory)))
    actual = attention(queries, keys, values)
    for b in range(2):
        for h in range(3):
            measure = torch.empty(40, dtype=torch.float64)
            for i in range(40):
                scores = torch.stack([queries[b, i, h] @ keys[b, j, h] for j in sample[i].tolist()])
                measure[i] = scores.max() - scores.sum() / memory
            chosen = set(measure.argsort(descending=True)[:selected].tolist())
            for i in range(40):
                last = i + 1 if causal else memory
                if i in chosen:
                    weights = (keys[b, :last, h] @ queries[b, i, h] / 2).softmax(0)
                    expected = weights @ values[b, :last, h]
                else:
                    expected = values[b, :last, h].sum(0) if causal else values[b, :, h].mean(0)
                torch.testing.assert_close(actual[b, i, h], expected)


def test_training_samples_anew_evaluation_does_not() -> None:
    attention = ProbSparseAttention(4, factor=1)
    cpu = torch.device("cpu")
    assert not torch.equal(attention.sample_keys(40, 40, cpu), attention.sample_keys(40, 40, cpu))
    attention.eval()
    assert torch.equal(attention.sample_keys(40, 40, cpu), attention.sample_keys(40, 40, cpu))
    assert not torch.equal(
        attention.sample_keys(40, 40, cpu), ProbSparseAttention(4, factor=1, seed=1).eval().sample_keys(40, 40, cpu)
    )


def test_sampling_seed_reaches_every_attention() -> None:
    network = Informer(24, 12, 5, sampling_seed=10, **SMALL)
    seeds = [m.seed for m in network.modules() if isinstance(m, ProbSparseAttention)]
    assert sorted(seeds) == [10, 11, 12, 13]


def test_evaluation_in_inference_mode_does_not_disturb_training() -> None:
    attention = ProbSparseAttention(4, factor=1).eval()
    queries, keys, values = tensors(30)
    with torch.inference_mode():
        attention(queries, keys, values)
    attention(queries.requires_grad_(), keys, values).sum().backward()
    assert queries.grad is not None


def test_reference_layout_reads_heads_and_steps_in_the_other_order() -> None:
    queries, keys, values = tensors(30)
    right = ProbSparseAttention(4, factor=1).eval()(queries, keys, values)
    reference = ProbSparseAttention(4, factor=1, reference_layout=True).eval()(queries, keys, values)
    torch.testing.assert_close(reference.flatten(), right.transpose(1, 2).flatten())


@pytest.mark.parametrize("length", [7, 21, 96, 97])
def test_distillation_halves_time(length: int) -> None:
    assert Distillation(6)(torch.randn(2, length, 6)).shape == (2, (length + 1) // 2 + 1, 6)


def test_without_distillation_it_has_the_parameters_of_the_transformer() -> None:
    with torch.device("meta"):
        network = Informer(96, 96, 7, distil=False)
    assert real_numbers(network) == 10_540_039


def test_decoder_is_causal_when_all_queries_attend() -> None:
    network = Informer(24, 12, 5, factor=24, **SMALL).double().eval()
    tokens, memory = torch.randn(1, 24, 16, dtype=torch.float64), torch.randn(1, 14, 16, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 10:] += 1
    before, after = network.decoder(tokens, memory), network.decoder(changed, memory)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_factor_is_checked() -> None:
    with pytest.raises(ValueError, match="factor=0"):
        Informer(24, 12, 5, factor=0, **SMALL)
