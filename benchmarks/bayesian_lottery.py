"""Bayesian lottery tickets: how much faster a sparse layer is, and what tickets, controls and transplants are worth.

Claim of the paper (Kuhn et al., 2026): matching tickets exist in Bayesian networks, and one that was found in the
ordinary network can be transplanted at up to half of the cost. It measures no speed of sparse networks; published code
multiplies by masks, which is as slow as dense ("masked" here). The layer is 1024 x 1024, batch 128, 10 samples.

Trained tickets: files of two short searches, halved six times (1.6 % left), 20 samples of all test images, as
``model.execution`` runs them: ``masked``, ``sparse``, and ``compact`` without dead channels.

Digits: seeds 0 to 2 of ``experiment=bayesian_lottery`` at its levels 0, 3, 6, 9, 12 and 15, with the ordinary network,
controls and transplants beside. Learning-rate rewinding has trained for the epochs of all levels together: at levels 6
and 12 the dense network and the ticket get as many. The peer is Lightning's `ModelPruning` with its option for lottery
tickets, at the same rate and epochs: it copies initial weights back, but leaves the optimizer and the unpruned layer as
they are.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import nn

from benchmarks.measure import REPEATS, compare, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from benchmarks.trained import configuration
from lightning_modules.classification import Classifier
from lightning_modules.metrics.classification import ClassificationScores
from networks.bayes import BayesLinear, SampleContext
from networks.lottery.compact import Execution, sparse
from networks.lottery.tickets import load_ticket, ticket_path
from networks.masks import PruneChoice, install_masks
from networks.mlp import MLP
from runner import job
from runner.load import load_run

CLAIM: str = (
    "A Bayesian layer with 1.2 % of its weights alive takes at most 1/8 of the time of the masked one, with 5 % at "
    "most 1/3; tickets beat every control by 0.08 in accuracy with 7 % of the weights, and a transplanted ticket is "
    "within 0.02 of the Bayesian one."
)

SIZE, BATCH, SAMPLES = 1024, 128, 10
# Times of the design study, one thread: masked / sparse.
EARLIER = {0.012: "78.5 / 3.3 ms", 0.05: "80.8 / 11.9 ms", 0.2: "132 / 45 ms"}
SLOWEST = {0.012: 1 / 8, 0.05: 1 / 3}


def masked_layer(density: float, size: int = SIZE) -> nn.Sequential:
    """A Bayesian layer of which ``density`` is alive, in evaluation."""
    torch.manual_seed(0)
    network = nn.Sequential(BayesLinear(size, size))
    (weight,) = install_masks(network, PruneChoice(keep_last=False))
    weight.set_mask(torch.rand(size, size) < density)
    return network.eval()


def _pair(density: float, size: int) -> dict[str, nn.Module]:
    masked = masked_layer(density, size)
    return {"masked": masked, "sparse": sparse(masked, max_density=1.0)}


def layer_calls(density: float, size: int = SIZE, samples: int = SAMPLES) -> dict[str, Callable[[], None]]:
    """Inference of a layer, noise included."""
    inputs = torch.randn(BATCH, size)

    def call(network: nn.Module) -> None:
        with torch.no_grad(), SampleContext(range(samples), samples, batch=BATCH):
            network(inputs)

    return {name: functools.partial(call, network) for name, network in _pair(density, size).items()}


def layer_steps(density: float, size: int = SIZE) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of one sample."""
    inputs, gradient = torch.randn(BATCH, size, requires_grad=True), torch.randn(BATCH, size)

    def step(network: nn.Module) -> None:
        network.zero_grad()
        inputs.grad = None
        with SampleContext(range(1), 1, batch=BATCH):
            network(inputs).backward(gradient)

    return {name: functools.partial(step, network) for name, network in _pair(density, size).items()}


def run(
    repeats: int = REPEATS,
    seeds: Sequence[int] = (0, 1, 2),
    trainings: bool = True,
    size: int = SIZE,
    levels: int = 15,
) -> Result:
    """Time layers, then search, control and transplant on the digits."""
    rows: list[Row] = []
    with single_thread():
        for density in (0.012, 0.05, 0.1, 0.2):
            rows += _layer(density, repeats, size)
        if trainings:
            rows += _trained(repeats)
    if trainings:
        rows += _digits(seeds, levels)
    return Result(rows, {"threads": 1, "repeats": repeats, "seeds": ", ".join(map(str, seeds)), "size": size})


def _layer(density: float, repeats: int, size: int) -> list[Row]:
    rows = []
    note = {"note": f"masked / sparse in the design study: {EARLIER[density]}"} if density in EARLIER else {}
    bound = {"at_most": SLOWEST[density]} if density in SLOWEST else {}
    for what, variants, more in (
        (f"inference, 10 samples, {100 * density:.3g} % alive", layer_calls(density, size), bound | note),
        (f"training step, one sample, {100 * density:.3g} % alive", layer_steps(density, size), {}),
    ):
        timings = compare(variants, repeats)
        rows += [*time_rows(what, timings), ratio_row(what, timings, "sparse", "masked", **more)]
    return rows


# ------------------------------------------------------------------------------------------------------ trained tickets

TRAINED = {
    "perceptron 64-512-512-10, digits": ("model.net.hidden=[512,512]", "trainer.max_epochs=3"),
    "VGG-11 of half the width, generated images of 32 pixels": (
        *("model=lottery_vgg11", "model.net.width=0.5", "model.num_samples=2", "trainer.max_epochs=1"),
        *("data=synthetic_images", "data.test_size=null", "data.max_train=320", "data.max_test=64"),
    ),
}
HALVINGS = 6


def trained_ticket(folder: Path, *overrides: str, halvings: int = HALVINGS) -> Path:
    """Search that leaves half of the weights at every level; the file of the last ticket."""
    pruning = ("callbacks.iterative_pruning.rate=0.5", f"callbacks.iterative_pruning.levels={halvings}")
    _run(folder, "experiment=bayesian_lottery", *overrides, *LEAN, *pruning, "test=false")
    return ticket_path(folder / "tickets", halvings)


def ticket_calls(path: Path) -> tuple[dict[str, Callable[[], Any]], float]:
    """Prediction of all test images by every execution, and the part of the weights that is left."""
    modules = {how: load_run(path, "trained", execution=how) for how in get_args(Execution)}
    data = modules["masked"][1]
    data.prepare_data()
    data.setup("test")
    image = torch.cat([data.shifted(batch)["image"] for batch in data.test_dataloader()])

    def call(module: pl.LightningModule) -> Any:
        with torch.no_grad():
            return module.logits(image)

    calls = {how: functools.partial(call, module) for how, (module, _, _) in modules.items()}
    return calls, load_ticket(path).about["remaining"]


def _trained(repeats: int) -> list[Row]:
    rows: list[Row] = []
    for name, overrides in TRAINED.items():
        with tempfile.TemporaryDirectory() as folder:
            calls, left = ticket_calls(trained_ticket(Path(folder), *overrides))
            timings = compare(calls, repeats)
        what = f"trained ticket, {name}, {100 * left:.2g} % alive"
        rows += time_rows(what, timings)
        rows += [ratio_row(what, timings, how, "masked") for how in ("sparse", "compact")]
    return rows


# -------------------------------------------------------------------------------------------------------------- digits

LEAN = ("logger=none", "num_threads=1", "~callbacks.energy", "data.val_fraction=0.0", "model.evaluation_seeds=1")
SEARCHES = {
    "Bayesian, snr": (),
    "Bayesian, mu": ("callbacks.iterative_pruning.score=mu",),
    "Bayesian, square": ("callbacks.iterative_pruning.score=square",),
    "ordinary": ("model.bayesian=false",),
    "Bayesian, snr, learning-rate rewinding": ("callbacks.iterative_pruning.rewind=lr_only",),
}
CONTROLS = ("reinit", "shuffle_layerwise", "shuffle_even")
DRAWS = (0, 1, 2)  # of every control; the mean of them is what it is worth
EPOCHS = 15  # of a level
LONGER = (6, 12)  # levels at which the dense network and the ticket are trained for all epochs of the search together


def _digits(seeds: Sequence[int], levels: int) -> list[Row]:
    chosen = [level for level in (0, 3, 6, 9, 12, 15) if level <= levels]
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            _one_seed(Path(folder), seed, levels, chosen, found)
    rows: list[Row] = []
    for metric in ("accuracy", "nll", "ece"):
        for (name, level), each in found.items():
            values = [metrics[metric] for metrics in each]
            row: Row = {"what": f"digits: test {metric}, level {level}", "variant": name, "unit": ""}
            row |= {"value": statistics.fmean(values), "note": f"seeds: {', '.join(f'{v:.4f}' for v in values)}"}
            rows.append(row)
    return rows + _bounded(found, chosen)


def _bounded(found: Mapping[tuple[str, int], Sequence[Mapping[str, float]]], chosen: Sequence[int]) -> list[Row]:
    """The differences that are claimed."""

    def mean(name: str, level: int) -> float:
        return statistics.fmean(metrics["accuracy"] for metrics in found[name, level])

    rows: list[Row] = []
    for level in chosen[1:]:
        what = f"digits: test accuracy, level {level}, difference"
        own = mean("Bayesian, snr", level)
        best = max(CONTROLS, key=lambda name, level=level: mean(name, level))
        bound = {"at_least": 0.08} if level == 12 else {}
        rows.append({"what": what, "variant": f"ticket - {best}", "value": own - mean(best, level), "unit": ""} | bound)
        moved = mean("transplanted, init", level) - own
        bound = {"at_least": -0.02} if level <= 12 else {}
        rows.append({"what": what, "variant": "transplanted, init - ticket", "value": moved, "unit": ""} | bound)
    return rows


def _one_seed(
    folder: Path, seed: int, levels: int, chosen: Sequence[int], found: dict[Any, Any], options: Sequence[str] = ()
) -> None:
    def add(name: str, level: int, metrics: Mapping[str, float]) -> None:
        found.setdefault((name, level), []).append(_of_test(metrics, level))

    common = ("experiment=bayesian_lottery", *LEAN, *options, f"seed={seed}")
    searches = {name: folder / f"search_{k}" for k, name in enumerate(SEARCHES)}  # no commas: overrides name them
    for name, settings in SEARCHES.items():
        metrics = _run(searches[name], *common, f"callbacks.iterative_pruning.levels={levels}", *settings)
        for level in chosen:
            add(name, level, metrics)
    for level in chosen[1:]:
        once = (*common, "callbacks.iterative_pruning.levels=0", f"model.level={level}")
        for control in CONTROLS:
            settings = (f"model.ticket={searches['Bayesian, snr']}", f"model.control={control}")
            draws = [
                _of_test(_run(folder / f"{control}{level}_{k}", *once, *settings, f"model.control_seed={k}"), level)
                for k in DRAWS
            ]
            mean = {key: statistics.fmean(draw[key] for draw in draws) for key in ("accuracy", "nll", "ece")}
            found.setdefault((control, level), []).append(mean)
        for source in ("init", "trained"):
            settings = (f"model.ticket={searches['ordinary']}", f"model.source={source}")
            add(f"transplanted, {source}", level, _run(folder / f"{source}{level}", *once, *settings))
    for level in (level for level in chosen if level in LONGER):
        epochs = EPOCHS * (level + 1)
        once = (
            *common,
            "callbacks.iterative_pruning.levels=0",
            f"trainer.max_epochs={epochs}",
        )
        once += (f"model.scheduler.milestones=[{epochs // 2},{epochs * 3 // 4}]",)
        ticket = (f"model.ticket={searches['Bayesian, snr']}", f"model.level={level}")
        add("ticket, epochs of the whole search", level, _run(folder / f"longer{level}", *once, *ticket))
        found.setdefault(("dense, epochs of the whole search", level), []).append(
            _of_test(_run(folder / f"dense{level}", *once), 0)
        )
    for level, metrics in model_pruning(seed, levels).items():
        if level in chosen:
            found.setdefault(("Lightning ModelPruning, ordinary", level), []).append(metrics)


def _of_test(metrics: Mapping[str, float], level: int) -> dict[str, float]:
    where = f"test/level_{level:02d}/"
    return {key.removeprefix(where): value for key, value in metrics.items() if key.startswith(where)}


def _run(folder: Path, *overrides: str) -> dict[str, float]:
    config = configuration("/nowhere", *overrides, lean=())
    text = json.dumps(config).replace("/nowhere", str(folder))
    result = job.run(json.loads(text))
    if result["status"] != "completed":
        raise RuntimeError(f"{' '.join(overrides)}: {result.get('error', result['status'])}")
    return result["metrics"]


def model_pruning(seed: int, levels: int, epochs: int = EPOCHS) -> dict[int, dict[str, float]]:
    """Test metrics of every level of Lightning's `ModelPruning`, the ordinary network, on the same data."""
    config = configuration("/nowhere", "experiment=bayesian_lottery", *LEAN, f"seed={seed}", lean=())
    pl.seed_everything(seed, verbose=False)
    data = job.instantiate("data", config["data"])
    module = Classifier(
        MLP(hidden=config["model"]["net"]["hidden"]),
        functools.partial(torch.optim.Adam, lr=config["model"]["optimizer"]["lr"]),
    )
    found: dict[int, dict[str, float]] = {}

    class EndOfLevel(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if (trainer.current_epoch + 1) % epochs == 0:
                scores = ClassificationScores(10)
                pl_module.eval()
                with torch.no_grad():
                    for batch in data.test_dataloader():
                        scores.update(pl_module(data.shifted(batch)["image"]), batch["label"])
                pl_module.train()
                values = {name: float(value) for name, value in scores.compute().items()}
                found[trainer.current_epoch // epochs] = values

    pruning = pl.callbacks.ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.net.layers[i], "weight") for i in (0, 1)],
        amount=0.2,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=True,
        apply_pruning=lambda epoch: (epoch + 1) % epochs == 0,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs * (levels + 1),
            callbacks=[EndOfLevel(), pruning],
            default_root_dir=folder,
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        )
        trainer.fit(module, datamodule=data)
    return found
