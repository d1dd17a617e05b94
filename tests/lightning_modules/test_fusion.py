"""Fusion: members trained together are members trained alone; the fusion; controls; checkpoints; what is refused."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F

from datamodules.images import Images
from lightning_modules.classification import Classifier
from lightning_modules.fusion import Fusion, distillation_loss
from networks.cnn import CNN
from networks.fusion import fuse, transplant
from networks.fusion.assembly import examined
from networks.fusion.members import item_weights, load_members, make_members, read_members
from networks.mlp import MLP

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
NET = functools.partial(MLP, hidden=(16, 12))
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


def digits(**options: Any) -> Images:
    return Images(**{"max_train": 320, "test_size": 450, "image_size": 8, "batch_size": 64, **options})


def module(**options: Any) -> Fusion:
    torch.manual_seed(0)
    defaults = {"num_members": 3, "member_epochs": 2, "num_inputs": 256, "report_epochs": [0, 1]}
    return Fusion(NET, SGD, **{**defaults, **options})


def trainer(folder: Path, epochs: int = 4, **options: Any) -> pl.Trainer:
    defaults = {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": folder}
    return pl.Trainer(max_epochs=epochs, use_distributed_sampler=False, **QUIET | defaults | options)


CANDIDATES = {
    "nt": {"method": "nt"},
    "nt_r": {"method": "nt_r", "objective": "distill"},
    "average": {"method": "average"},
}


def test_members_are_trained_as_each_would_be_alone(tmp_path):
    fusion = module(candidates=CANDIDATES)
    starts = copy.deepcopy(list(fusion.net.members))
    assert not torch.equal(starts[0].layers[0].weight, starts[1].layers[0].weight)
    trainer(tmp_path, 2).fit(fusion, datamodule=digits())
    for start, member in zip(starts, fusion.net.members, strict=True):
        alone = Classifier(start, SGD, num_classes=10, top_k=None)
        trainer(tmp_path, 2).fit(alone, datamodule=digits())
        for key, value in alone.net.state_dict().items():
            torch.testing.assert_close(member.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_members_stand_still_and_candidates_learn(tmp_path):
    decaying = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
    fusion = Fusion(NET, decaying, num_members=2, member_epochs=2, candidates=CANDIDATES, report_epochs=[0, 1])
    data = digits()
    trainer(tmp_path, 2).fit(fusion, datamodule=data)
    assert fusion.fused_at == 2
    members = copy.deepcopy(fusion.net.members.state_dict())
    fused = {name: copy.deepcopy(net.state_dict()) for name, net in fusion.net.fused.items()}
    for name, state in fused.items():  # the fit is over: the candidates are as they were made
        assert all(torch.equal(fusion.snapshots[0][name][key], value) for key, value in state.items())
    again = Fusion(NET, decaying, num_members=2, member_epochs=2, candidates=CANDIDATES, report_epochs=[0, 1])
    trainer(tmp_path, 4).fit(again, datamodule=digits())
    assert all(torch.equal(again.net.members.state_dict()[key], value) for key, value in members.items())
    for name, state in fused.items():
        assert all(torch.equal(again.snapshots[0][name][key], value) for key, value in state.items())
        now = again.net.fused[name].state_dict()
        assert not any(torch.equal(now[key], value) for key, value in state.items() if "weight" in key)
    assert sorted(again.snapshots) == [0, 1, 2] and set(again.candidates) == {*CANDIDATES, "member", "member_distill"}


def test_candidates_are_what_the_functions_make(tmp_path):
    fusion = module(candidates={**CANDIDATES, "narrow": {"method": "nt", "target_width": 0.5}})
    data = digits()
    trainer(tmp_path, 2).fit(fusion, datamodule=data)
    members = list(fusion.net.members)
    want = transplant(members, examined(members, fusion.example)).network.state_dict()
    assert all(torch.equal(fusion.net.fused["nt"].state_dict()[key], value) for key, value in want.items())
    assert fusion.net.fused["narrow"].layers[0].weight.shape == (8, 64)
    inputs = fusion.unlabelled()
    assert sum(len(batch) for batch in inputs) == 256
    want = fuse(members, "nt_r", fusion.example, inputs).model.state_dict()
    for key, value in want.items():
        torch.testing.assert_close(fusion.net.fused["nt_r"].state_dict()[key], value)
    best = members[fusion.best_member].state_dict()
    for control in ("member", "member_distill"):
        assert all(torch.equal(fusion.net.fused[control].state_dict()[key], value) for key, value in best.items())
    assert sum(fusion.about["nt"]["provenance"]["layers.0"]) == 16


def test_inputs_for_the_fit_are_training_images(tmp_path):
    data = digits(augment=True, padding=1)
    fusion = module(num_inputs=5000, input_views=2)
    trainer(tmp_path, 2).fit(fusion, datamodule=data)
    assert sum(len(batch) for batch in fusion.unlabelled()) == 2 * len(data.images("train").rows)
    fusion.input_views = 0
    (batch,) = fusion.unlabelled()[:1]
    raw = data.normalized(data.train_dataloader().dataset.__getitems__(list(range(288))))["image"]
    assert all(any(torch.equal(image, other) for other in raw) for image in batch[:10])


def test_a_test_reports_every_epoch_that_was_asked_for(tmp_path):
    fusion = module(candidates=CANDIDATES, main="nt_r")
    data = digits()
    run = trainer(tmp_path, 4)
    run.fit(fusion, datamodule=data)
    (found,) = run.test(fusion, datamodule=data, verbose=False)
    image, label = _test_images(data)
    with torch.no_grad():
        each = [member.eval()(image) for member in fusion.net.members]

        def accuracy(logits):
            return float((logits.argmax(1) == label).double().mean())

        ensemble = accuracy(torch.stack(each).mean(0))
        low = sum(accuracy(logits) for logits in each) / 3
        assert found["test/ensemble/accuracy"] == pytest.approx(ensemble)
        assert found["test/members/accuracy"] == pytest.approx(low)
        assert found["test/best_member/accuracy"] == pytest.approx(accuracy(each[fusion.best_member]))
        now = accuracy(fusion.net.fused["nt_r"](image))
        assert found["test/accuracy"] == found["test/nt_r/accuracy"] == pytest.approx(now)
        assert found["test/nt_r/epoch_02/accuracy"] == pytest.approx(now)
        for epoch in (0, 1, 2):
            network = copy.deepcopy(fusion.net.fused["nt"])
            network.load_state_dict(fusion.snapshots[epoch]["nt"])
            value = accuracy(network(image))
            assert found[f"test/nt/epoch_{epoch:02d}/accuracy"] == pytest.approx(value)
            if ensemble != low:
                recovery = (value - low) / (ensemble - low)
                assert found[f"test/nt/epoch_{epoch:02d}/recovery"] == pytest.approx(recovery, abs=1e-6)
    rows = fusion.results_table()
    assert [row["name"] for row in rows[:3]] == ["members, mean", "best member", "ensemble"]
    assert {row["name"] for row in rows[3:]} == {*CANDIDATES, "member", "member_distill"}
    assert [row["finetune_epoch"] for row in fusion.history] == [None, 0, 1, 2]


def _test_images(data: Images) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [data.shifted(batch) for batch in data.test_dataloader()]
    return torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])


def test_test_images_are_for_the_end():
    """No test image is among those of training and validation, and the best member is chosen by the latter."""
    data = digits(max_train=None, max_test=None)
    data.setup()
    rows = {part: set(data.images(part).rows.tolist()) for part in ("train", "val", "test")}
    pixels = {p: {data.images(p).pixels[r].tobytes() for r in rows[p]} for p in rows}
    assert not pixels["test"] & (pixels["train"] | pixels["val"]) and not pixels["train"] & pixels["val"]


def test_a_run_goes_on_where_it_stopped(tmp_path):
    """Before and after the fusion, bit for bit."""
    whole = module(candidates=CANDIDATES)
    trainer(tmp_path, 4).fit(whole, datamodule=digits())
    for epochs in (1, 3):
        first = module(candidates=CANDIDATES, member_epochs=2)
        run = trainer(tmp_path, 4, callbacks=[_StopAfter(epochs)])
        run.fit(first, datamodule=digits())
        run.save_checkpoint(tmp_path / "stopped.ckpt")
        torch.load(tmp_path / "stopped.ckpt", weights_only=True)
        second = module(candidates=CANDIDATES, member_epochs=2)
        trainer(tmp_path, 4).fit(second, datamodule=digits(), ckpt_path=tmp_path / "stopped.ckpt")
        for key, value in whole.state_dict().items():
            assert torch.equal(second.state_dict()[key], value), (epochs, key)
        assert sorted(second.snapshots) == sorted(whole.snapshots)
        for name, state in whole.snapshots[0].items():
            assert all(torch.equal(second.snapshots[0][name][key], value) for key, value in state.items())
        assert [row["epoch"] for row in second.history] == [1, 2, 3, 4]


class _StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def test_members_come_from_earlier_runs(tmp_path):
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        classifier = Classifier(NET(), SGD, num_classes=10, top_k=None)
        run = trainer(tmp_path, 1)
        run.fit(classifier, datamodule=digits())
        folder = tmp_path / f"run{seed}" / "checkpoints"
        run.save_checkpoint(folder / "last.ckpt")
        paths.append(str(folder.parent))
        last = classifier
    fusion = module(members=paths, member_epochs=0, num_members=2, candidates=CANDIDATES)
    data = digits()
    run = trainer(tmp_path, 1)
    run.fit(fusion, datamodule=data)
    assert fusion.fused_at == 0 and sorted(fusion.snapshots) == [0, 1]
    assert all(torch.equal(fusion.net.members[1].state_dict()[k], v) for k, v in last.net.state_dict().items())
    run.save_checkpoint(tmp_path / "fusion.ckpt")
    assert len(read_members([tmp_path / "fusion.ckpt"])) == 2  # a run of this experiment gives all its members
    untrained = module(members=paths, member_epochs=0, num_members=2, candidates=CANDIDATES)
    (found,) = trainer(tmp_path).test(untrained, datamodule=digits(), verbose=False)
    assert found["test/nt/epoch_00/accuracy"] == found["test/accuracy"]
    with pytest.raises(ValueError, match=r"gives 2 networks: set model\.num_members=2"):
        trainer(tmp_path).fit(module(members=paths, member_epochs=0), datamodule=digits())
    with pytest.raises(FileNotFoundError, match=r"model\.members: no checkpoint"):
        read_members([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"network 0 differs from model\.net at layer layers\.0\.weight"):
        load_members([MLP(hidden=(17, 12))], read_members(paths[:1]), "model.members")


def test_members_see_what_is_theirs():
    labels = torch.arange(10).repeat(50)
    assert bool((item_weights(labels, 3, "seed") == 1).all())
    drawn = item_weights(labels, 3, "bootstrap", seed=1)
    assert drawn.sum(1).tolist() == [500.0] * 3 and 0.3 < float((drawn == 0).float().mean()) < 0.43  # 1/e
    shards = item_weights(labels, 3, "classes", 0.3, seed=1)
    assert bool((shards.sum(0) == 1).all())  # everything belongs to somebody
    parts = torch.stack([shards[:, labels == c].mean(1) for c in range(10)])
    assert float(parts.std(0).mean()) > 0.2  # and classes are shared unevenly
    assert torch.equal(shards, item_weights(labels, 3, "classes", 0.3, seed=1))


def test_members_do_not_depend_on_what_was_drawn_before():
    first = make_members(NET, 3, seed=4)
    torch.rand(7)
    again = make_members(NET, 2, seed=4)
    assert all(torch.equal(a.layers[0].weight, b.layers[0].weight) for a, b in zip(first, again, strict=False))
    wide = make_members(NET, 2, [{}, {"hidden": (20, 12)}], biases=False)
    assert wide[1].layers[0].weight.shape == (20, 64) and wide[0].layers[0].bias is None


def test_distillation_has_its_minimum_at_the_teacher():
    teacher = torch.randn(5, 10)
    logits = teacher.clone().requires_grad_()
    loss = distillation_loss(logits, teacher, 2.0)
    entropy = -((teacher / 2).softmax(1) * (teacher / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, 4 * entropy)
    loss.backward()
    assert float(logits.grad.abs().max()) < 1e-6
    torch.testing.assert_close(
        distillation_loss(torch.zeros(5, 10), teacher, 1.0), F.cross_entropy(torch.zeros(5, 10), teacher.softmax(1))
    )


def test_the_first_evaluation_leaves_statistics_alone(tmp_path):
    fusion = Fusion(functools.partial(CNN, widths=(4, 6)), SGD, num_members=2, member_epochs=1, candidates=CANDIDATES)
    data = digits()
    run = trainer(tmp_path, 1)
    run.fit(fusion, datamodule=data)
    before = {name: b.clone() for name, b in fusion.net.named_buffers()}
    run.validate(fusion, datamodule=data, verbose=False)
    assert before and all(torch.equal(b, before[name]) for name, b in fusion.net.named_buffers())


def test_synchronised_members_are_equal_after_every_epoch(tmp_path):
    for method in ("average", "nt"):
        fusion = module(synchronize=method, diversity="bootstrap", member_epochs=3)
        run = trainer(tmp_path, 3, callbacks=[_StopAfter(1)])
        run.fit(fusion, datamodule=digits())
        states = [member.state_dict() for member in fusion.net.members]
        assert all(torch.equal(states[0][key], state[key]) for state in states for key in states[0])
        assert not fusion.is_fused


def test_prediction_by_name(tmp_path):
    data = digits()
    found = {}
    fusion = module(candidates=CANDIDATES)
    run = trainer(tmp_path, 2)
    run.fit(fusion, datamodule=data)
    for name in ("main", "average", "ensemble"):
        fusion.predict_with = name
        found[name] = torch.cat([b["probability"] for b in run.predict(fusion, datamodule=data)])
    image, _ = _test_images(data)
    with torch.no_grad():
        torch.testing.assert_close(found["main"], fusion.net.fused["nt"](image).softmax(1))
        torch.testing.assert_close(found["ensemble"], fusion.net.ensemble(image).softmax(1))


@pytest.mark.parametrize(("options", "message"), [
    ({"num_members": 1}, r"model\.num_members=1: fusion needs at least 2"),
    ({"member_epochs": 0}, r"model\.member_epochs=0: must be at least 1, or 0 with model\.members"),
    ({"main": "nope"}, r"model\.main='nope' is no candidate"),
    ({"predict_with": "nope"}, r"model\.predict_with='nope'"),
    ({"synchronize": "nope"}, r"model\.synchronize='nope' is unknown"),
    ({"temperature": 0.0}, r"model\.temperature=0\.0"),
    ({"num_inputs": 0}, r"model\.num_inputs=0"),
    ({"report_epochs": [-1]}, r"model\.report_epochs=\[-1\]"),
    ({"diversity": "nope"}, r"model\.diversity='nope' is unknown"),
    ({"variants": [{}]}, r"model\.variants has 1 entries for model\.num_members=3"),
    ({"candidates": {"a b": {"method": "nt"}}}, "a name has letters"),
    ({"candidates": {"ensemble": {"method": "nt"}}}, "the name is taken"),
    ({"candidates": {"keys": {"method": "nt"}}}, "the name is taken"),
    ({"candidates": {"x": {"method": "nope"}}}, r"model\.candidates\.x\.method='nope' is unknown"),
    ({"candidates": {"x": {"method": "nt", "objective": "nope"}}}, r"model\.candidates\.x\.objective='nope'"),
    ({"candidates": {"x": {"method": "ot", "ridge": 1}}}, r"model\.candidates\.x\.ridge: method ot takes no settings"),
])  # fmt: skip
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_data_must_fit(tmp_path):
    with pytest.raises(ValueError, match=r"model\.num_classes=9, but the data have 10 classes"):
        fusion = Fusion(functools.partial(MLP, hidden=(8,), num_classes=9), SGD, num_classes=9)
        trainer(tmp_path).fit(fusion, datamodule=digits())
    with pytest.raises(ValueError, match=r"model\.input_shape=\[1, 16, 16\], but the data have \[1, 8, 8\]"):
        fusion = Fusion(functools.partial(MLP, hidden=(8,), image_size=16), SGD, input_shape=(1, 16, 16))
        trainer(tmp_path).fit(fusion, datamodule=digits())


def _on_ranks(folder: str, devices: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    fusion = module(candidates=CANDIDATES, diversity="bootstrap")
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    run = trainer(Path(folder), 3, devices=devices, strategy=strategy)
    data = digits(max_train=128, test_size=151)
    run.fit(fusion, datamodule=data)
    (found,) = run.test(fusion, datamodule=data, verbose=False)
    return found, {key: value.detach().clone() for key, value in fusion.net.state_dict().items()}


def test_two_ranks_do_what_one_process_does(ranks2, tmp_path):
    """Members that stand still are no parameters that DDP waits for in vain; the fusion is the same on all ranks."""
    alone, state = _on_ranks(str(tmp_path), 1)
    for found, weights in ranks2(_on_ranks, str(tmp_path), 2):
        for key, value in state.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)
        assert found["test/members/accuracy"] == pytest.approx(alone["test/members/accuracy"], abs=1e-6)
        assert found["test/nt/epoch_00/accuracy"] == pytest.approx(alone["test/nt/epoch_00/accuracy"], abs=1e-6)
