"""A run in this process: what it leaves where."""

from __future__ import annotations

from runner import job
from tests.composing import composed, plain, tiny


def test_without_callbacks_there_is_a_record_and_no_checkpoint(tmp_path):
    result = job.run(tiny(tmp_path, "callbacks=none", "trainer.max_epochs=1"))
    assert result["status"] == "completed"
    assert (tmp_path / "results.json").is_file()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_module_without_parameters_is_only_evaluated(tmp_path):
    config = plain(composed("experiment=recycle", "model=rhp", "debug=fast", "predict=false", run_dir=tmp_path))
    result = job.run(config)
    assert result["status"] == "completed", result
    assert result["metrics"]["test/mae_scaled"] == result["metrics"]["test/rhp_mae_scaled"]
    assert not list(tmp_path.rglob("*.ckpt"))
