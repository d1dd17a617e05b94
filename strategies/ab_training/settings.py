"""Settings of AB-training that are one of several words."""

from __future__ import annotations

from typing import Any

import torch

WIRE_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types on the wire; None: that of the tensor."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "sync": ("only-learned", "with-stale", "full", "only-b"),
    "sigma_split": ("both", "trained"),
    "opt_state": ("hold", "reset", "project"),
    "init": ("unified", "ortho-sigma", "rand-sigma", "sloped-sigma"),
    "eval_model": ("consensus", "group"),
    "resume": ("exact", "consensus"),
    "wire_dtype": tuple(WIRE_TYPES),
}


def check_choices(**chosen: Any) -> None:
    """Refuse a word that is unknown.

    Raises:
        ValueError: Names the setting, its value and what there is.
    """
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"strategy.{name}={value!r}: choose one of {', '.join(_CHOICES[name])}")
