#!/usr/bin/env python
"""Wattlight: ``python run.py experiment=recycle trainer=multi_gpu``. See README.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runner import check, overrides, record, resume, schema, supervise, sweep_table
from runner.logs import global_rank
from runner.stamp import run_stamp

schema.register()
mistyped: list[str] = []  # unknown top-level keys of the command line


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> Any:
    """Check one composed configuration, run it, return the metric that a sweeper optimises."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        config.run.group = f"{config.name}-{run_stamp()}"
        config.run.label = f"{config.name}-{HydraConfig.get().job.num}"
    try:
        check.check(config, mistyped, OmegaConf.to_container(HydraConfig.get().overrides.task), files=True)
    except check.ConfigMistakes as mistakes:
        if sweep:  # the other jobs go on
            record.mark(Path(config.run.dir), "failed", " ".join(str(mistakes).split()))
            raise supervise.RunError(str(mistakes)) from None
        print(mistakes, file=sys.stderr)
        raise SystemExit(2) from None
    if config.check:
        print("the configuration is sound")
        return None
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    return supervise.supervise(resolved, sweep=sweep)


if __name__ == "__main__":
    sys.argv, mistyped = overrides.prepare(resume.rewrite(sys.argv))
    if global_rank() > 0:  # started by torchrun or srun: rank 0 writes .hydra
        sys.argv.append("hydra.output_subdir=null")
    try:
        main()
    except HydraException as error:  # HYDRA_FULL_ERROR=1
        sys.exit(str(error))
    finally:
        sweep_table.SweepTable.show()
