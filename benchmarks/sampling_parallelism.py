"""Bayesian layers against their peers, and what two processes that share the weight samples cost each of them.

The paper (Özdemir et al., 2026) trains with torch-blue and its `KullbackLeiblerLoss`, which draws weights and evaluates
the densities of prior and posterior at each of them. torch-blue also has a loss with the divergence in closed form; its
layers then draw outputs in place of weights, as our estimator ``lrt`` does. bayesian-torch and blitz evaluate one
sample per call. The network is a perceptron 64-W-W-10, the batch has 64 items, a step is forward, backward and Adam, on
one thread. The objective is the predictive one in torch-blue and here, the mean over samples in the others.

Two processes share the 32 samples of a perceptron 64-256-256-10 on the digits. Counted is the CPU time of a process per
epoch of training: on two shared cores wall time says more about the cores. A network that is too small for it stands
beside.

torch-blue is in the extra ``peers``; the others declare torchvision and go without: ``pip install --no-deps
bayesian-torch==0.5.0 blitz-bayesian-pytorch==0.2.8``. Rows of peers that are not there are left out.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import REPEATS, compare, interleave, median, ratio, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from networks.bayes import SampleContext, data_term, kl_divergence, to_bayesian
from networks.mlp import MLP
from parallel.sample_layout import SampleShare

CLAIM: str = (
    "A training step takes at most 0.55 of that of torch-blue with the loss of the paper, and with local "
    "reparametrisation no longer than torch-blue's with its loss in closed form; two processes that share 32 samples "
    "each need at most 0.62 of the CPU time of one."
)

BATCH, ITEMS, TEMPERATURE = 64, 45_000, 0.1
SIZES = ((128, 8), (128, 32), (512, 16))  # width of the hidden layers, samples
# Ratios of the design study: explicit weights to the loss of the paper, lrt to the loss in closed form.
EARLIER = {(128, 8): ("0.50", "1.12"), (128, 32): ("0.34", "0.62"), (512, 16): ("0.43", "0.86")}
PAPER_LOSS, CLOSED_FORM = "torch-blue, sampled KL", "torch-blue, KL in closed form"
PEERS = {"torch_blue": "torch-blue", "bayesian_torch": "bayesian-torch", "blitz": "blitz-bayesian-pytorch"}
# Hidden layers, samples: one that is worth sharing, and one too small (1.0 in the design study).
SHARED = {"64-256-256-10": ((256, 256), 32), "64-128-128-10": ((128, 128), 16)}
SHARED_EARLIER = {"64-256-256-10": "0.56", "64-128-128-10": "1.0"}


def plain(width: int) -> nn.Sequential:
    """The network without random weights."""
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 64, generator=generator), torch.randint(10, (BATCH,), generator=generator)


def stepping(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.Adam(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def ours(width: int, samples: int, estimator: str = "weight") -> Callable[[], None]:
    """Wattlight."""
    torch.manual_seed(0)
    net, (image, label) = to_bayesian(plain(width)), batch()
    share, steps = SampleShare(), iter(range(sys.maxsize))

    def loss() -> Tensor:
        with SampleContext(range(samples), samples, batch=BATCH, step=next(steps), estimator=estimator):
            logits = net(image)
        log_likelihood = -F.cross_entropy(logits, label.repeat(samples), reduction="none").view(samples, BATCH)
        term = data_term(log_likelihood, samples, share, "predictive", "exact")
        return term + TEMPERATURE * kl_divergence(net) / ITEMS

    return stepping(net, loss)


def torch_blue(width: int, samples: int, closed_form: bool) -> Callable[[], None]:
    """Its network and either of its losses, which are ITEMS times ours."""
    from torch_blue import vi

    torch.manual_seed(0)
    net, (image, label) = plain(width), batch()
    vi.convert_to_vimodule(net, return_log_probs=not closed_form)
    predictive = vi.distributions.Categorical()
    if closed_form:
        criterion = vi.AnalyticalKullbackLeiblerLoss(net, predictive, dataset_size=ITEMS, heat=TEMPERATURE)
    else:
        criterion = vi.KullbackLeiblerLoss(predictive, dataset_size=ITEMS, heat=TEMPERATURE)
    return stepping(net, lambda: criterion(net(image, samples=samples), label))


def bayesian_torch(width: int, samples: int) -> Callable[[], None]:
    """Its converter, a call per sample."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    torch.manual_seed(0)
    net, (image, label) = plain(width), batch()
    prior = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    dnn_to_bnn(net, prior | {"type": "Reparameterization", "moped_enable": False, "moped_delta": 0.5})

    def loss() -> Tensor:
        term = sum(F.cross_entropy(net(image), label) for _ in range(samples)) / samples
        return term + TEMPERATURE * get_kl_loss(net) / ITEMS

    return stepping(net, loss)


def blitz(width: int, samples: int) -> Callable[[], None]:
    """Its layers and `sample_elbo`."""
    from blitz.modules import BayesianLinear
    from blitz.utils import variational_estimator

    @variational_estimator
    class Net(nn.Sequential):
        pass

    torch.manual_seed(0)
    image, label = batch()
    net = Net(
        BayesianLinear(64, width), nn.ReLU(), BayesianLinear(width, width), nn.ReLU(), BayesianLinear(width, 10)
    )  # fmt: skip
    weight = TEMPERATURE / ITEMS
    return stepping(
        net, lambda: net.sample_elbo(image, label, F.cross_entropy, sample_nbr=samples, complexity_cost_weight=weight)
    )


def step_rows(repeats: int, sizes: Sequence[tuple[int, int]], calls: int) -> list[Row]:
    """Training steps of all variants whose packages are installed."""
    packages = installed()
    rows: list[Row] = []
    for width, samples in sizes:
        variants = {"explicit weights": ours(width, samples), "lrt": ours(width, samples, "lrt")}
        variants["flipout"] = ours(width, samples, "flipout")
        if "torch-blue" in packages:
            variants[PAPER_LOSS] = torch_blue(width, samples, closed_form=False)
            variants[CLOSED_FORM] = torch_blue(width, samples, closed_form=True)
        if "bayesian-torch" in packages:
            variants["bayesian-torch"] = bayesian_torch(width, samples)
        if "blitz-bayesian-pytorch" in packages:
            variants["blitz"] = blitz(width, samples)
        timings = compare(variants, repeats, calls=calls)
        what = f"step, width {width}, S = {samples}"
        rows += time_rows(what, timings)
        bounds = {
            ("explicit weights", PAPER_LOSS): {
                "at_most": 0.55,
                "note": f"{EARLIER[width, samples][0]} in the design study",
            },
            ("lrt", CLOSED_FORM): {"at_most": 1.0, "note": f"{EARLIER[width, samples][1]} in the design study"},
            ("explicit weights", "bayesian-torch"): {},
            ("explicit weights", "blitz"): {},
        }
        for (own, peer), bound in bounds.items():
            if peer in variants:
                rows.append(_by_cpu(ratio_row(what, timings, own, peer, **bound)))
    return rows


def _by_cpu(row: Row) -> Row:
    """The bound is one on CPU time."""
    return row | {"value": row["cpu"], "note": "; ".join(filter(None, (row.get("note"), f"wall {row['value']:.3f}")))}


def installed() -> list[str]:
    """Peers that are at hand."""
    return [package for module, package in PEERS.items() if importlib.util.find_spec(module) is not None]


# ------------------------------------------------------------------------------------------------- sharing of samples


class CpuOfEpochs(pl.Callback):
    """CPU time of this process in every epoch of training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *args: object) -> None:
        """Note the time."""
        self._begin = time.process_time()

    def on_train_epoch_end(self, *args: object) -> None:
        """Note what has passed."""
        self.seconds.append(time.process_time() - self._begin)


def train(world: int, hidden: Sequence[int], samples: int, epochs: int) -> float:
    """One rank of a training on the digits: median CPU time of an epoch, the first left out."""
    from datamodules.images import Images
    from lightning_modules.bayes import BayesClassifier
    from strategies.sampling_parallel import SamplingParallel

    pl.seed_everything(0, verbose=False)
    times = CpuOfEpochs()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", devices=world, strategy=SamplingParallel(), max_epochs=epochs + 1, callbacks=[times],
            default_root_dir=folder, limit_val_batches=0, use_distributed_sampler=False,
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        )  # fmt: skip
        adam = functools.partial(torch.optim.Adam, lr=2e-3)
        module = BayesClassifier(MLP(hidden=hidden), adam, num_samples=samples, num_eval_samples=samples)
        data = Images("digits", test_size=360, test_from="random", batch_size=BATCH, padding=0)
        trainer.fit(module, datamodule=data)
    return statistics.median(times.seconds[1:])


def _rank(rank: int, world: int, folder: str, hidden: Sequence[int], samples: int, epochs: int) -> None:
    warnings.simplefilter("ignore")
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
    torch.set_num_threads(1)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({key: str(value) for key, value in env.items()} | {"MASTER_PORT": "29500"})
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    os.environ["WORLD_SIZE"] = str(world)
    seconds = train(world, hidden, samples, epochs)
    Path(folder, str(rank)).write_text(json.dumps(seconds))
    torch.distributed.destroy_process_group()


def cpu_per_epoch(world: int, hidden: Sequence[int], samples: int, epochs: int) -> float:
    """Mean over the ranks of ``world`` fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, folder, hidden, samples, epochs), nprocs=world)
        return statistics.fmean(json.loads(Path(folder, str(rank)).read_text()) for rank in range(world))


def sharing_rows(repeats: int, epochs: int, networks: Sequence[str] = tuple(SHARED)) -> list[Row]:
    """CPU time of a rank and epoch, one and two processes in turns."""
    rows: list[Row] = []
    for name in networks:
        hidden, samples = SHARED[name]
        variants = {
            f"{world} process(es)": functools.partial(cpu_per_epoch, world, hidden, samples, epochs) for world in (1, 2)
        }
        times = interleave(variants, repeats, warmup=0)
        what = f"{name}, S = {samples}: CPU time of a process and epoch"
        for variant, seconds in times.items():
            found = median(seconds)
            values = {"value": 1e3 * found.value, "low": 1e3 * found.low, "high": 1e3 * found.high}
            rows.append({"what": what, "variant": variant, "unit": "ms", **values})
        found = ratio(*(times[f"{world} process(es)"] for world in (2, 1)))
        row = {"what": f"{what}, ratio", "variant": "2 / 1", "value": found.value, "low": found.low, "unit": ""}
        bound = {"at_most": 0.62} if name == "64-256-256-10" else {}
        rows.append(row | {"high": found.high, "note": f"{SHARED_EARLIER[name]} in the design study"} | bound)
    return rows


def run(
    repeats: int = REPEATS,
    sizes: Sequence[tuple[int, int]] = SIZES,
    calls: int = 10,
    epochs: int = 8,
    networks: Sequence[str] = tuple(SHARED),
) -> Result:
    """Time steps, then trainings by one and two processes."""
    with single_thread():
        rows = step_rows(repeats, sizes, calls)
    rows += sharing_rows(repeats, epochs, networks)
    missing = [package for package in PEERS.values() if package not in installed()]
    settings = {"batch": BATCH, "threads": 1, "repeats": repeats, "calls": calls, "epochs": epochs}
    settings["not installed"] = ", ".join(missing) or "-"
    return Result(rows, settings, packages=tuple(installed()))
