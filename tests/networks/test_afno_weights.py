"""Weights under their published names: shapes of the whole network, and what a small one computes with them."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from networks.afno import AFNOFilter, AFNONet
from networks.afno_weights import convert, from_published, published_grid
from runner import job
from tests.composing import composed, plain
from tests.networks.test_afno import published as published_filter


def shapes(height: int, width: int, channels: int, patch: int, dim: int, depth: int, blocks: int) -> dict[str, tuple]:
    """Of the published state, names and order as in the public code."""
    size, hidden = dim // blocks, 4 * dim
    found = {
        "pos_embed": (1, (height // patch) * (width // patch), dim),
        "patch_embed.proj.weight": (dim, channels, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        found |= {f"blocks.{i}.norm1.weight": (dim,), f"blocks.{i}.norm1.bias": (dim,)}
        for layer in "12":
            found[f"blocks.{i}.filter.w{layer}"] = (2, blocks, size, size)
            found[f"blocks.{i}.filter.b{layer}"] = (2, blocks, size)
        found |= {f"blocks.{i}.norm2.weight": (dim,), f"blocks.{i}.norm2.bias": (dim,)}
        found |= {f"blocks.{i}.mlp.fc1.weight": (hidden, dim), f"blocks.{i}.mlp.fc1.bias": (hidden,)}
        found |= {f"blocks.{i}.mlp.fc2.weight": (dim, hidden), f"blocks.{i}.mlp.fc2.bias": (dim,)}
    return found | {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (channels * patch**2, dim)}


def state(sizes: dict[str, tuple], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}


def test_every_parameter_of_the_published_network_has_a_place():
    sizes = shapes(720, 1440, 20, 8, 768, 12, 8)
    with torch.device("meta"):
        whole = {name: torch.empty(size) for name, size in sizes.items()}
        assert sum(value.numel() for value in whole.values()) == 74_691_840
        net = AFNONet(720, 1440, 20, compat="nvlabs")
        net.load_state_dict(from_published(whole, published_grid(whole), "nvlabs"), assign=True)
        AFNONet(720, 1440, 20).load_state_dict(from_published(whole, (90, 180)), assign=True)


def published(weights: dict[str, Tensor], x: Tensor, patch: int, blocks: int) -> Tensor:
    """What the published network computes, from its description (section 2.4)."""
    dim = weights["patch_embed.proj.bias"].numel()
    batch, channels, height, width = x.shape
    h, w = height // patch, width // patch
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=patch)
    x = (x.flatten(2).transpose(1, 2) + weights["pos_embed"]).reshape(batch, h, w, dim)
    for i in range(sum(name.endswith("filter.w1") for name in weights)):
        of = {key.removeprefix(f"blocks.{i}."): v for key, v in weights.items() if key.startswith(f"blocks.{i}.")}
        layer = AFNOFilter(dim, blocks, compat="nvlabs").double()
        layer.load_state_dict({name: of[f"filter.{name}"] for name in ("w1", "b1", "w2", "b2")})
        x = x + published_filter(layer, F.layer_norm(x, (dim,), of["norm1.weight"], of["norm1.bias"], 1e-6))
        hidden = F.linear(F.layer_norm(x, (dim,), of["norm2.weight"], of["norm2.bias"], 1e-6), of["mlp.fc1.weight"])
        x = x + F.linear(F.gelu(hidden + of["mlp.fc1.bias"]), of["mlp.fc2.weight"], of["mlp.fc2.bias"])
    x = (x @ weights["head.weight"].T).reshape(batch, h, w, patch, patch, channels)
    out = torch.empty(batch, channels, height, width, dtype=x.dtype)
    for row in range(patch):
        for column in range(patch):
            out[:, :, row::patch, column::patch] = x[:, :, :, row, column].movedim(-1, 1)
    return out


SMALL = {"height": 16, "width": 32, "channels": 3, "patch": 4, "dim": 16, "depth": 2, "blocks": 4}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_with_them_computes_what_the_published_one_does(wrapped):
    weights = state(shapes(**SMALL))
    net = AFNONet(16, 32, 3, patch_size=4, dim=16, depth=2, num_blocks=4, compat="nvlabs").double()
    stored = {f"module.{name}": value for name, value in weights.items()} if wrapped else weights
    net.load_state_dict(from_published(stored, (4, 8), "nvlabs"))
    x = torch.randn(2, 3, 16, 32, dtype=torch.float64)
    torch.testing.assert_close(net(x), published(weights, x, patch=4, blocks=4), atol=1e-11, rtol=1e-11)


def test_a_file_that_the_program_begins_with(tmp_path, monkeypatch):
    sizes = SMALL | {"channels": 4}
    weights = state(shapes(**sizes) | {"patch_embed.proj.weight": (16, 5, 4, 4)}, torch.float32)
    torch.save({"epoch": 3, "model_state": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "published.tar")
    monkeypatch.setattr(sys, "argv", ["afno_weights", str(tmp_path / "published.tar"), str(tmp_path / "ours.ckpt")])
    runpy.run_module("networks.afno_weights", run_name="__main__")
    overrides = (
        "experiment=energy_scaling/afno_pretrain", "trainer=cpu", "train=false", "data.height=16", "data.width=32",
        "data.num_train=1", "data.records=24", f"data.cache_dir={tmp_path / 'cache'}", "model.net.patch_size=4",
        "data.truncation=5", "model.net.dim=16", "model.net.depth=2", "model.net.num_blocks=4", "callbacks=none",
        "logger=none", "num_threads=1", f"model.weights={tmp_path / 'ours.ckpt'}", "model.linear_patterns=0",
    )  # fmt: skip
    result = job.run(plain(composed(*overrides, run_dir=tmp_path / "run")))
    assert result["status"] == "completed", result.get("error")
    convert(str(tmp_path / "published.tar"), str(tmp_path / "kept.ckpt"), "nvlabs")
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"]
    assert {"net.net.norm.weight", "net.net.norm.bias"} <= kept.keys()


def test_other_files_are_refused():
    weights = state(shapes(**SMALL))
    with pytest.raises(ValueError, match="cls_token is no parameter of the published AFNO network"):
        from_published(weights | {"cls_token": torch.zeros(1)}, (4, 8))
    with pytest.raises(ValueError, match="pos_embed has 32 tokens, not 8 x 8"):
        from_published(weights, (8, 8))
    with pytest.raises(ValueError, match="30 tokens, no grid of 2:1"):
        published_grid({"pos_embed": torch.zeros(1, 30, 4)})
