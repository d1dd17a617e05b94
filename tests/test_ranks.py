"""The pool of ranks that other tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import RankError, Ranks


def fails_once(folder: str, message: str) -> int:
    """Every rank raises at its first call."""
    mark = Path(folder, str(dist.get_rank()))
    if not mark.exists():
        mark.touch()
        raise RuntimeError(message)
    return dist.get_rank()


def test_only_a_connection_that_gloo_lost_is_tried_again(tmp_path):
    pool = Ranks(1)
    try:
        with pytest.warns(UserWarning, match="fails_once runs once more: RuntimeError: Gloo connectFullMesh failed"):
            assert pool(fails_once, str(tmp_path), "Gloo connectFullMesh failed with [pair.cc:553]") == [0]
        (tmp_path / "0").unlink()
        with pytest.raises(RankError, match="Connection closed by peer"):
            pool(fails_once, str(tmp_path), "Connection closed by peer")
    finally:
        pool.close()
