"""One run in this process: build everything from the resolved configuration, train, evaluate, record."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner import guard, logs
from runner.launch import num_processes, ranks_exist
from runner.resume import find_checkpoint

log = logging.getLogger(__name__)


class BuildError(ValueError):
    """A part of the configuration could not be built; the message names it and the original error."""


def run(config: dict[str, Any], launched: bool = False) -> dict[str, Any]:
    """Do one run.

    Args:
        config: The resolved configuration as plain data.
        launched: Whether `runner.launch` started this process; errors then propagate, so that the launcher ends the
            other ranks.

    Returns:
        ``status`` (``completed``, ``interrupted``, ``failed``), ``metrics`` (name to number), ``costs`` (the same, of
        energy), ``run_dir``, and ``error`` or ``signum`` where they apply.
    """
    logs.set_up(config["run"]["dir"])
    try:
        guard.require_sound_torchvision()
        return _run(config)
    except Exception as error:
        if launched:
            raise
        return _failed(config, error)


def build(config: dict[str, Any]) -> tuple[Any, Any]:
    """Instantiate (module, datamodule) of a resolved configuration, after seeding.

    Raises:
        BuildError: Naming the part and the original error.
    """
    import lightning.pytorch as pl

    with contextlib.redirect_stdout(None):
        pl.seed_everything(config["seed"], workers=True, verbose=False)
    datamodule = instantiate("data", config["data"])
    return instantiate("model", config["model"]), datamodule


def instantiate(key: str, node: dict[str, Any]) -> Any:
    """Build the object that a configuration node describes, with plain data as arguments.

    Raises:
        BuildError: With the original error instead of Hydra's wrapper.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        where = str(error).rsplit("full_key: ", 1)[-1] if "full_key: " in str(error) else ""
        part = f"{key}.{where}" if where else key
        raise BuildError(f"{part} ({node.get('_target_')}): {cause}") from cause


def _run(config: dict[str, Any]) -> dict[str, Any]:
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from callbacks.interrupt import Interrupt, Interrupted
    from callbacks.plateau import PlateauStep
    from callbacks.run_record import RunRecord

    logs.adopt_lightning()
    if config["num_threads"]:
        torch.set_num_threads(config["num_threads"])
    elif "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ckpt_path = find_checkpoint(config)
    record = RunRecord(config["run"]["dir"], config)
    loggers: list[Any] = []
    callbacks: list[Any] = []
    trainer = None
    with _environment_restored():
        try:
            for key, node in _members(config["callbacks"]):
                callbacks.append(instantiate(f"callbacks.{key}", node))
                _call(callbacks[-1:], "begin_run")
            module, datamodule = build(config)
            for callback in callbacks:
                if isinstance(callback, Interrupt) and ranks_exist():
                    callback.first_only = True  # a Ctrl-C comes twice: from the terminal and from the launcher
            for key, node in _members(config["logger"]):
                loggers.append(_logger(key, node, record))
            # Without a checkpoint callback Lightning would add its own, which writes where nobody looks.
            keeps = any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks)
            trainer = pl.Trainer(
                **config["trainer"] | {"enable_checkpointing": keeps and config["trainer"]["enable_checkpointing"]},
                strategy=_strategy(config),
                callbacks=[record, PlateauStep(), *callbacks],
                logger=loggers or False,
            )
            rank_zero = trainer.is_global_zero
            if rank_zero:
                trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
                record.update(world_size=trainer.world_size, parameters=trainable)
                _announce(config, trainer, module, trainable, ckpt_path)
            _log_config(trainer, config)
            metrics = _stages(config, trainer, module, datamodule, record, ckpt_path)
            _call(callbacks, "end_run", "completed")
            if rank_zero:
                record.update(status="completed", metrics=metrics)
            result = {"status": "completed", "metrics": metrics, "costs": record.costs}
            return result | {"run_dir": config["run"]["dir"]}
        except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
            # Without our callback of that name Lightning itself stops at SIGTERM.
            signum = getattr(stop, "signum", signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT)
            _call(callbacks, "end_run", "interrupted")
            if (trainer is None or trainer.is_global_zero) and not record.withdraw():
                record.update(status="interrupted", error=str(stop) or "interrupted")
            metrics = record.record["metrics"]
            return {"status": "interrupted", "signum": signum, "metrics": metrics, "run_dir": config["run"]["dir"]}
        except Exception as error:
            _call(callbacks, "end_run", "failed")
            if (trainer is None or trainer.is_global_zero) and not record.withdraw():
                # A message is enough for a mistake in the input; past the set-up the traceback matters.
                record.update(status="failed", error=f"{type(error).__name__}: {error}")
            error.computing = record.computing
            raise
        finally:
            finish(loggers, record.record["status"])


def _strategy(config: dict[str, Any]) -> Any:
    """What ``strategy=auto`` stands for: nothing for one process, counted data parallelism for several.

    Lightning would choose its DDP, which sends running statistics around in every step of an evaluation and waits for
    ever where ranks have unequal shares.
    """
    if config["strategy"]:
        return instantiate("strategy", config["strategy"])
    if num_processes(config) == 1:
        return "auto"
    from strategies.ddp import DDP

    return DDP(**config["cluster"])


def _call(callbacks: list[Any], name: str, *args: Any) -> None:
    """Tell the callbacks that want to know that the run begins or ends, which Lightning has no hooks for."""
    for callback in callbacks:
        if hook := getattr(callback, name, None):
            hook(*args)


def _members(group: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The members of a group; values for a member that the chosen option lacks are left out (`runner.check`)."""
    return [(key, node) for key, node in group.items() if node and "_target_" in node]


def _stages(config, trainer, module, datamodule, record, ckpt_path) -> dict[str, float]:
    """Fit, validate, test and predict as the configuration asks; the numbers of all stages together."""
    metrics: dict[str, float] = {}

    def collect() -> None:
        from callbacks.run_record import scalars

        metrics.update(scalars(trainer.callback_metrics))
        checkpointing = trainer.checkpoint_callback
        if checkpointing is not None and getattr(checkpointing, "best_model_score", None) is not None:
            metrics[f"{checkpointing.monitor}_best"] = float(checkpointing.best_model_score)

    trained = False
    if config["train"]:
        if any(p.requires_grad for p in module.parameters()):
            trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
            trained = True
            collect()
        else:
            log.info("%s has no parameters to train: evaluation only", type(module).__name__)
    best = _best_checkpoint(config, trainer) if trained else ckpt_path
    if trainer.is_global_zero:
        record.update(best_checkpoint=best)
    if config["validate"]:
        trainer.validate(module, datamodule=datamodule, ckpt_path=best, verbose=False)
        collect()
    if config["test"]:
        trainer.test(module, datamodule=datamodule, ckpt_path=best, verbose=False)
        collect()
    if config["predict"]:
        trainer.predict(module, datamodule=datamodule, ckpt_path=best, return_predictions=False)
    return metrics


def _best_checkpoint(config: dict[str, Any], trainer: Any) -> str | None:
    """The best checkpoint of the run; without one the module is evaluated as it is."""
    callback = trainer.checkpoint_callback
    path = getattr(callback, "best_model_path", "") if callback is not None else ""
    if path and Path(path).is_file():
        return path
    stored = Path(config["run"]["dir"]) / "checkpoints" / "best.ckpt"  # a run folder that was moved
    return str(stored) if callback is not None and stored.is_file() else None


def _logger(key: str, node: dict[str, Any], record: Any) -> Any:
    """Build a logger; a resumed W&B run keeps its id, a new one leaves it in results.json at once."""
    if not node["_target_"].endswith("WandbLogger"):
        return instantiate(f"logger.{key}", node)
    import wandb

    if not node.get("id"):
        node = node | {"id": record.record["wandb_run_id"] or secrets.token_hex(4)}
    record.record["wandb_run_id"] = node["id"]
    try:
        logger = instantiate(f"logger.{key}", node)
        if logs.global_rank() == 0:
            _ = logger.experiment
    except (BuildError, wandb.errors.UsageError) as error:
        raise BuildError(f"logger.{key}: {error}; log in with `wandb login`, or set WANDB_MODE=offline") from error
    return logger


def _log_config(trainer: Any, config: dict[str, Any]) -> None:
    """Give every logger the whole configuration."""
    flat = dict(_flatten(config))
    for logger in trainer.loggers:
        logger.log_hyperparams(flat)


def _flatten(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from _flatten(child, f"{key}/{name}" if key else str(name))
    else:
        yield key, str(node) if isinstance(node, list | dict) else node


def _announce(config: dict[str, Any], trainer: Any, module: Any, parameters: int, ckpt_path: str | None) -> None:
    kind = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    log.info("%s: %s, %s trainable parameters", config["name"], type(module).__name__, f"{parameters:,}")
    log.info("%d process(es) on %s, strategy %s", trainer.world_size, kind, type(trainer.strategy).__name__)
    log.info("folder %s", config["run"]["dir"])
    if ckpt_path:
        log.info("continues from %s", ckpt_path)


def finish(loggers: list[Any], status: str) -> None:
    """Close every logger, whatever happened; W&B would otherwise give the next job in this process the same run.

    The numbers are safe in ``results.json`` by now: a logger that fails here is reported and does not fail the run.
    """
    for logger in loggers:
        kind = type(logger).__name__
        try:
            # Lightning has told the loggers of a failure; "success" would take it back.
            if status == "completed":
                logger.finalize("success")
            if kind == "WandbLogger" and logs.global_rank() == 0:
                import wandb

                wandb.finish(exit_code=0 if status == "completed" else 1)
            elif kind == "TensorBoardLogger":
                logger.experiment.close()
        except Exception as error:
            log.warning("could not close %s: %s: %s", kind, type(error).__name__, error)


def _failed(config: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Report an error of this process: one line for a mistake in the input, the traceback for anything else."""
    trace = "".join(traceback.format_exception(error))
    return {
        "status": "failed",
        "error": describe(error),
        "trace": "" if is_input_error(error) else trace,
        "hopeless": is_input_error(error),
        "metrics": {},
        "run_dir": config["run"]["dir"],
    }


def is_input_error(error: Exception) -> bool:
    """Whether the message says all: errors of values, files and packages before the first batch, and any that say so.

    An exception says so with a true attribute ``input_error``.
    """
    if getattr(error, "input_error", False):
        return True
    return isinstance(error, ValueError | OSError | ImportError) and not getattr(error, "computing", False)


def describe(error: Exception) -> str:
    """The message of an error, with its type unless it is a plain input error."""
    return str(error) if is_input_error(error) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Undo what Lightning leaves in the environment (seeds, rendezvous), so that nothing leaks into a next run."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
