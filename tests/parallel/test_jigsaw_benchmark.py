"""What `benchmarks/jigsaw.py` compares does the same work."""

from __future__ import annotations

import pytest
import torch

from benchmarks.jigsaw import PEER, PlainBlock, jigsaw, run, saved_bytes
from parallel.sharding import JigsawGrid

SIZES = (24, 16, 12, 8)


def test_the_peer_computes_the_same_and_keeps_as_much():
    ours, theirs = jigsaw(JigsawGrid(), SIZES), PlainBlock(*SIZES)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 24, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [block(own) for block, own in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted.pop(name).grad, atol=1e-4, rtol=1e-4)
    assert not wanted
    saved = [saved_bytes(block, own) for block, own in zip((ours, theirs), inputs, strict=True)]
    assert saved[0] == pytest.approx(saved[1], rel=0.02)


@pytest.mark.slow
def test_rows_of_the_benchmark():
    rows = run(repeats=1, calls=1, sizes=SIZES, worlds=(2,)).rows
    assert {row["variant"] for row in rows if row["what"] == "mixer block, 2 process(es)"} == {PEER, "1 x 2", "2 x 1"}
    (ratio,) = (row for row in rows if row["what"].endswith("ratio"))
    assert ratio["variant"].endswith(f" / {PEER}") and ratio["at_most"] == 0.7
