"""The table of a pruning study: error, size, multiplications, latency and energy of every network side by side."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from callbacks.energy.callback import EnergyCallback
from networks.lottery.compact import sparse
from networks.pruning.cost import latencies, macs, resized, saved_bytes, sizes
from networks.pruning.groups import widths
from networks.pruning.quantization import quantized
from networks.pruning.variants import Variant
from networks.pruning.weights import density, masks_in, num_real, remove_masks
from networks.series.direct import Direct
from networks.series.dlinear import least_squares
from networks.series.naive import SeasonalNaive

if TYPE_CHECKING:
    from callbacks.pruning import Pruning

log = logging.getLogger(__name__)

Row = dict[str, Any]
NAIVE, LINEAR = "repeat last day", "DLinear"
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # of DLinear: the best on the validation part
ERRORS = ("mse", "mae", "rmse", "mape", "mspe")
_SHOWN = {
    "name": "network",
    "density_model": "density of the model",
    "density_prunable": "of prunable weights",
    "mse": "MSE",
    "mae": "MAE",
    "parameters": "parameters",
    "nnz": "not zero",
    "macs": "MMAC",
    "sparse_bytes": "file, kB",
    "int8_bytes": "8 bits, kB",
    "joules": "mJ per window",
}


@dataclass
class Table:
    """Rows of networks, and what they say in words.

    Attributes:
        rows: A dictionary per network; values that were not measured are missing.
        verdicts: Sentences.
    """

    rows: list[Row] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)

    def columns(self) -> list[str]:
        """Names of all columns in order of appearance, without what is known per layer."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in ("layers", "widths")]

    def named(self, name: str) -> Row | None:
        """The row of a network."""
        return next((row for row in self.rows if row["name"] == name), None)

    def metrics(self) -> dict[str, float]:
        """What a sweep compares: the error of every network as ``test/<network>/mse``."""
        return {f"test/{row['name'].replace(' ', '_')}/mse": float(row["mse"]) for row in self.rows}

    def text(self) -> str:
        """The table and the verdicts for a terminal and for ``table.md``."""
        latency = sorted({name for row in self.rows for name in row if name.startswith("latency_")}, key=_latency_key)
        shown = {n: t for n, t in _SHOWN.items() if any(row.get(n) is not None for row in self.rows)}
        shown |= {name: _latency_title(name) for name in latency}
        lines = ["| " + " | ".join(shown.values()) + " |", "|" + "---|" * len(shown)]
        lines += ["| " + " | ".join(_cell(name, row.get(name)) for name in shown) + " |" for row in self.rows]
        return "\n".join([*lines, "", *self.verdicts])


def _latency_key(name: str) -> tuple[bool, int]:
    return "sparse" in name, int(name.split("_")[-2])


def _latency_title(name: str) -> str:
    size = name.split("_")[-2]
    return f"ms, batch {size}" + (", sparse products" if "sparse" in name else "")


def _cell(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    scale = {"macs": 1e-6, "sparse_bytes": 1e-3, "int8_bytes": 1e-3, "joules": 1e3}.get(name, 1)
    if isinstance(value, int) and scale == 1:
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value * scale:.4g}"


def write_table(table: Table, folder: Path) -> None:
    """Write ``pruning.csv`` (every column) and ``pruning.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = table.columns()
    with (folder / "pruning.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.rows)
    layers = [(row["name"], name, value) for row in table.rows for name, value in row.get("layers", {}).items()]
    with (folder / "pruning_layers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "layer", "density"])
        writer.writerows(layers)
    (folder / "pruning.md").write_text(table.text() + "\n")


def publish(table: Table, trainer: pl.Trainer, folder: Path) -> None:
    """Write a table into a folder, print it, and give it to loggers that take tables."""
    write_table(table, folder)
    log.info("all networks on the test part:\n%s", table.text())
    columns = table.columns()
    rows = [[row.get(column) for column in columns] for row in table.rows]
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table("pruning", columns=columns, data=rows)


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(pruning: Pruning, trainer: pl.Trainer, pl_module: pl.LightningModule, variants: Sequence[Variant]) -> Table:
    """Measure all networks of a study on the test part; the module holds one of them afterwards.

    Args:
        pruning: Says what is measured.
        trainer: In its test.
        pl_module: Puts forecasts on the scaled axis together, with each network in turn.
        variants: The networks.
    """
    loader, limit = trainer.datamodule.test_dataloader(), trainer.num_test_batches[0]
    quick = isinstance(limit, int) and limit <= 1  # debug=fast: does it run at all?
    rows, networks = [], []
    for variant in variants:
        pruning.slot.put(pl_module, variant)
        row = _row(pruning, trainer, pl_module, variant) | errors(pl_module, loader, limit)
        if pruning.quantize and pl_module.device.type == "cpu":
            row |= _quantized(pl_module, loader, limit)
        rows.append(row)
        networks.append(variant.build(pruning.slot.full).to(pl_module.device).eval())
    batch = move_data_to_device(next(iter(loader)), pl_module.device)
    dense_size = rows[0]["sparse_bytes"]
    for row in rows:
        row["size_ratio"] = row["sparse_bytes"] / dense_size
    _time(pruning, trainer, rows, networks, batch, quick)
    table = Table(rows)
    if pruning.references:
        table.rows += _references(pruning, trainer, pl_module, loader, limit, batch)
    table.verdicts = verdicts(table.rows)
    return table


def _row(pruning: Pruning, trainer: pl.Trainer, pl_module: pl.LightningModule, variant: Variant) -> Row:
    """What follows from the network alone."""
    network = pl_module.net
    total = num_real(pruning.slot.full)
    found = density(network, pruning.pruner.weights(network))
    alive = found.alive
    row: Row = {
        "name": variant.name,
        "stage": variant.stage,
        "method": variant.method,
        "density": variant.density,
        "density_prunable": found.prunable if not variant.cuts else None,
        "density_model": alive / total,
        "covered": found.covered,
        "parameters": num_real(network),
        "nnz": alive,
        "epochs": variant.about.get("epochs"),
        "best_epoch": variant.about.get("best_epoch"),
        "val_loss": variant.about.get("val_loss"),
        "layers": found.layers if not variant.cuts else {},
        "widths": widths(network) if variant.cuts else {},
    }
    row |= {f"{name}_bytes": value for name, value in sizes(network).items()}
    batch = move_data_to_device(next(iter(trainer.datamodule.test_dataloader())), pl_module.device)
    return row | {"macs": macs(network, resized(batch, 1))}


@torch.inference_mode()  # as Lightning's own test: what modules count in it are its tensors
def errors(pl_module: pl.LightningModule, loader: Any, limit: float = math.inf) -> dict[str, float]:
    """MSE, MAE, RMSE, MAPE and MSPE on the scaled axis over all valid windows of a loader.

    Percentages are divided by the target, as the paper does: near zero they are large.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    training = pl_module.training
    pl_module.eval()
    for batch in islice(loader, None if math.isinf(limit) else int(limit)):
        batch = move_data_to_device(batch, pl_module.device)
        prediction = pl_module.point(pl_module.forecast(batch)).double()
        target, mask = batch["target"].double(), batch["valid"].unsqueeze(1)
        error = torch.where(mask, prediction - target, 0.0)
        part = torch.where(mask & (target != 0), error / target, 0.0)
        count = mask.expand_as(target).sum()
        sums += torch.stack(
            [error.square().sum(), error.abs().sum(), part.abs().sum(), part.square().sum(), count]
        ).cpu()
    pl_module.train(training)
    mse, mae, mape, mspe = (sums[:4] / sums[4].clamp(min=1)).tolist()
    return {"mse": mse, "mae": mae, "rmse": math.sqrt(mse), "mape": mape, "mspe": mspe}


def _quantized(pl_module: pl.LightningModule, loader: Any, limit: float) -> Row:
    """Size and error with the weights of linear layers in 8 bits."""
    network = pl_module.net
    small = quantized(network)
    pl_module.net = small
    try:
        found = errors(pl_module, loader, limit)
    finally:
        pl_module.net = network
    return {"int8_bytes": saved_bytes(small.state_dict()), "int8_mse": found["mse"]}


def _time(
    pruning: Pruning,
    trainer: pl.Trainer,
    rows: Sequence[Row],
    networks: Sequence[nn.Module],
    batch: Mapping[str, Tensor],
    quick: bool,
) -> None:
    """Latency and energy into the rows; networks before and after fine-tuning differ in values alone."""
    chosen: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(rows):
        chosen[row["method"], row["density"]] = i
    places = list(chosen.values())
    plain, sparse_ones = [], {}
    for i in places:
        if pruning.sparse_execution and masks_in(networks[i]):
            exchanged = sparse(networks[i])
            if any(type(module).__name__.startswith("Sparse") for module in exchanged.modules()):
                sparse_ones[i] = exchanged.eval()
        remove_masks(networks[i])
        plain.append(networks[i])
    measured: dict[int, Row] = {i: {} for i in places}
    repeats = 1 if quick else pruning.latency_repeats
    for size in [pruning.latency_batches[0]] if quick else pruning.latency_batches:
        together = [*plain, *sparse_ones.values()]
        settings = {"warm_up": 0} if quick else {"warm_up": 2, "least_s": 0.02}
        found = latencies(together, resized(batch, size), repeats, **settings)
        for i, seconds in zip(places, found, strict=False):
            measured[i][f"latency_{size}_ms"] = 1e3 * seconds
        for i, seconds in zip(sparse_ones, found[len(plain) :], strict=True):
            measured[i][f"latency_sparse_{size}_ms"] = 1e3 * seconds
    if pruning.energy_s and not quick:
        for i, network in zip(places, plain, strict=True):
            if (joules := _joules(trainer, network, batch, pruning.energy_s)) is not None:
                measured[i]["joules"] = joules
    for row in rows:
        row |= measured[chosen[row["method"], row["density"]]]


@torch.no_grad()
def _joules(trainer: pl.Trainer, network: nn.Module, batch: Mapping[str, Tensor], seconds: float) -> float | None:
    """Energy of a forecast of one window, J, by the meters of the energy callback; None without one."""
    energy = next((c for c in trainer.callbacks if isinstance(c, EnergyCallback)), None)
    if energy is None or (before := energy.total_j()) is None:
        return None
    begin, windows = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        network(batch)
        windows += len(batch["history"])
    if batch["history"].is_cuda:
        torch.cuda.synchronize()
    return (energy.total_j() - before) / windows


def _references(
    pruning: Pruning,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loader: Any,
    limit: float,
    batch: Mapping[str, Tensor],
) -> list[Row]:
    """Repeating the last day, and the DLinear network with the least squared error on the training part."""
    data = trainer.datamodule
    history, channels = batch["history"].shape[1], batch["history"].shape[2]
    naive = SeasonalNaive(data.cycle_length, data.horizon)
    train = islice(data.train_dataloader(), None if math.isinf(limit) or limit > 1 else 1)
    fitted = least_squares(train, history, data.horizon, channels, RIDGES)
    network, found, best = pl_module.net, [], []
    for linear in fitted:
        pl_module.net = Direct(linear).to(pl_module.device, batch["history"].dtype)
        best.append(errors(pl_module, data.val_dataloader(), limit)["mse"])
    linear = Direct(fitted[best.index(min(best))]).to(pl_module.device)
    for name, reference in ((NAIVE, naive), (LINEAR, linear)):
        pl_module.net = reference.to(batch["history"].dtype)
        row: Row = {"name": name, "stage": "reference", "method": "none", "parameters": num_real(reference)}
        row |= errors(pl_module, loader, limit)
        row["macs"] = macs(reference, resized(batch, 1))
        size = pruning.latency_batches[0]
        row[f"latency_{size}_ms"] = 1e3 * latencies([reference], resized(batch, size), 3, least_s=0.02)[0]
        row["sparse_bytes"] = row["dense_bytes"] = saved_bytes(reference.state_dict())
        found.append(row)
    pl_module.net = network
    return found


# ---------------------------------------------------------------------------------------------------------------- words


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What a table says about the best pruned network: against the dense ones, and against simple forecasts."""
    named = {row["name"]: row for row in rows}
    pruned = [row for row in rows if row["stage"] in ("pruned", "tuned")]
    found = []
    if not pruned:
        return found
    best = min(pruned, key=lambda row: row["mse"])
    what = f"The best pruned network ({best['name']}, MSE {best['mse']:.4g})"
    for name, words in (
        ("dense", "the dense one"),
        ("control", "the dense one with as many more epochs"),
        (NAIVE, "repeating the last day"),
        (LINEAR, "a linear model (DLinear)"),
    ):
        if name in named:
            other = named[name]["mse"]
            change = 100 * (best["mse"] / other - 1) if other else math.nan
            side = "worse" if change > 0 else "better"
            found.append(f"{what} is {abs(change):.1f} % {side} than {words} (MSE {other:.4g}).")
    if "dense" in named:
        found += _savings(named["dense"], pruned[-1])
    return found


def _savings(dense: Row, row: Row) -> list[str]:
    """What a pruned network saves of time, or of bytes where its zeros leave every multiplication of dense kernels."""
    work = dense["macs"] / row["macs"] if row.get("macs") else math.nan
    if not work > 1:
        if not row.get("sparse_bytes") or not dense.get("sparse_bytes"):
            return []
        size = dense["sparse_bytes"] / row["sparse_bytes"]
        return [
            f"{row['name']}: a file {size:.1f} times smaller without its zeros, and as many multiplications in dense "
            "kernels as dense: zeros alone save no time."
        ]
    times = sorted((n for n in dense if n.startswith("latency_") and "sparse" not in n), key=_latency_key)
    return [
        f"{row['name']}: {work:.1f} times fewer multiplications in dense kernels than dense, "
        f"{dense[name] / row[name]:.1f} times faster ({_latency_title(name)})."
        for name in times[-1:]
        if row.get(name)
    ]
