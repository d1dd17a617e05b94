"""A tiny space of stacks, and networks for it, that train and design within a second."""

from __future__ import annotations

import functools
from typing import Any

import torch

from datamodules.thin_films import ThinFilms
from lightning_modules.thin_film import InverseDesign, Refinement
from networks.diffusion import Sampler
from networks.optogpt import OptoGPT
from networks.optollama import MaskedDiffusionDenoiser

SIZES = {"num_tokens": 12, "length": 4, "num_wavelengths": 11, "width": 16, "depth": 1, "heads": 2, "hidden": 32}


def films(**options: Any) -> ThinFilms:
    settings = {
        "materials": ["Ag", "SiO2", "TiO2"],
        "thickness_nm": [50, 150, 50],
        "max_layers": 3,
        "wavelength_nm": [400, 1000, 60],
        "num_train": 200,
        "num_val": 10,
        "num_test": 9,
        "num_tokens": 12,
        "length": 4,
        "num_wavelengths": 11,
        "batch_size": 40,
        "eval_batch_size": 4,
    }
    return ThinFilms(**settings | options)


def denoiser(**options: Any) -> MaskedDiffusionDenoiser:
    """With the weights that torch's seed gives."""
    return MaskedDiffusionDenoiser(**SIZES | {"time_scale": 1000.0, "sampler": Sampler(steps=4)} | options)


def module(net=None, seed: int = 0, **options: Any) -> InverseDesign:
    torch.manual_seed(seed)
    settings = {
        "optimizer": functools.partial(torch.optim.Adam, lr=3e-3),
        "num_draws": 6,
        "report_draws": (2, 6),
        "refine_top": 2,
        "refinement": Refinement(steps=10),
        "templates": (20, "equal"),
        "hybrid": 3,
        "diversity_draws": 4,
        "val_draws": 2,
        "predict_templates": 5,
        "num_candidates": 3,
    }
    return InverseDesign(denoiser() if net is None else net, **settings | options)


def decoder(**options: Any) -> OptoGPT:
    torch.manual_seed(1)
    return OptoGPT(**SIZES | options)
