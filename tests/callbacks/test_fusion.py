"""FusionCallback on other modules of the program, and the report of a run of fused networks."""

from __future__ import annotations

import functools
import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from callbacks.figures import fusion as figures
from callbacks.fusion import FusionCallback
from callbacks.fusion_report import FusionReport, table
from datamodules.images import Images
from lightning_modules.classification import Classifier
from networks.cnn import CNN
from networks.fusion import UnsupportedNetworkError, average

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


def digits():
    return Images(max_train=320, test_size=450, image_size=8, batch_size=64)


def fit(folder, net, callback, top_k=2):
    torch.manual_seed(0)
    module = Classifier(net, SGD, num_classes=10, top_k=None)
    kept = pl.callbacks.ModelCheckpoint(
        folder, "{epoch}", monitor="val/accuracy", mode="max", save_top_k=top_k, auto_insert_metric_name=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, callbacks=[kept, callback], use_distributed_sampler=False, **QUIET
    )
    trainer.fit(module, datamodule=digits())
    return module, kept, trainer


@pytest.mark.parametrize("method", ["average", "nt_r"])
def test_the_best_checkpoints_become_one_network(tmp_path, method):
    callback = FusionCallback(tmp_path, method=method)
    module, kept, trainer = fit(tmp_path, CNN(widths=(4, 6)), callback)
    content = torch.load(tmp_path / "fused.ckpt", weights_only=True)
    module.load_state_dict(content["state_dict"])
    files = sorted(kept.best_k_models, key=lambda path: -float(kept.best_k_models[path]))
    members = []
    for file in files:
        member = CNN(widths=(4, 6))
        state = torch.load(file, weights_only=True)["state_dict"]
        member.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
        members.append(member)
    if method == "average":
        want = average(members).features[0].weight
        torch.testing.assert_close(module.net.features[0].weight, want)
    (found,) = trainer.test(module, datamodule=digits(), verbose=False)
    assert 0 <= found["test/accuracy"] <= 1 and 0 < found["test/nll"] < 10
    assert callback._hook is None and callback._inputs == [] and not module.net._forward_pre_hooks


def test_unknown_networks_are_refused_by_name(tmp_path):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

        def forward(self, image):
            return self.last(self.rnn(image[:, 0])[0][:, -1])

    with pytest.raises(UnsupportedNetworkError, match=r"LSTM \(rnn\) calls lstm"):
        fit(tmp_path, Gated(), FusionCallback(tmp_path, method="nt"))
    fit(tmp_path, Gated(), FusionCallback(tmp_path, method="average"))  # which needs no channels
    assert (tmp_path / "fused.ckpt").is_file()


def test_two_checkpoints_are_needed(tmp_path):
    with pytest.raises(ValueError, match="has kept less than two checkpoints"):
        fit(tmp_path, CNN(widths=(4,)), FusionCallback(tmp_path), top_k=1)
    for options, message in (({"method": "best"}, "method='best' is unknown"), ({"num": 1}, "at least 2 checkpoints")):
        with pytest.raises(ValueError, match=message):
            FusionCallback(tmp_path, **options)


REPORT = {
    "settings": {
        "nt": {"method": "nt", "objective": "labels", "fraction": 0.25},
        "other": {"method": "nt", "objective": "distill", "fraction": 0.5},
        "member": {"method": "best", "objective": "labels"},
    },
    "history": [
        {"epoch": 1, "finetune_epoch": None, "accuracy": {"member_0": 0.8, "member_1": 0.7, "ensemble": 0.85}},
        *(
            {
                "epoch": 2 + e,
                "finetune_epoch": e,
                "accuracy": {
                    **{"member_0": 0.8, "member_1": 0.7, "ensemble": 0.85},
                    **{"nt": 0.2 + 0.3 * e, "other": 0.8, "member": 0.8},
                },
            }
            for e in range(3)
        ),
    ],
    "results": [
        {"name": "members, mean", "epoch": None, "accuracy": 0.75},
        {"name": "best member", "epoch": None, "accuracy": 0.8, "nll": 0.5, "recovery": 0.5},
        {"name": "ensemble", "epoch": None, "accuracy": 0.85, "nll": 0.4, "recovery": 1.0},
        *(
            {"name": name, "epoch": e, "accuracy": 0.5 + 0.1 * e, "nll": 0.4, "recovery": 0.1}
            for name in ("nt", "other")
            for e in (0, 1)
        ),
    ],
    "candidates": {
        "nt": {"seconds": 0.1, "provenance": {"layers.0": [3, 1], "layers.1": [2, 2]}},
        "other": {"seconds": 0.1, "provenance": {}},
    },
}


def test_the_report_of_a_test(tmp_path):
    class Known(nn.Module):
        history, about, candidates = REPORT["history"], REPORT["candidates"], REPORT["settings"]

        def results_table(self):
            return REPORT["results"]

    class Trainer:
        is_global_zero, loggers = True, ()

    report = FusionReport(tmp_path, ["accuracy_after_fusion", "provenance", "accuracy_over_fraction"])
    report.on_test_end(Trainer(), Known())
    assert json.loads((tmp_path / "fusion.json").read_text())["results"] == REPORT["results"]
    assert (tmp_path / "fusion.csv").read_text().splitlines()[4] == "nt,0,0.5,0.4,0.1"
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"accuracy_after_fusion", "provenance", "accuracy_over_fraction"}
    report.on_test_end(Trainer(), nn.Linear(1, 1))  # other modules are left alone
    with pytest.raises(ValueError, match="'nope' is unknown"):
        FusionReport(tmp_path, ["nope"])


def test_the_printed_table():
    lines = table(REPORT["results"]).splitlines()
    assert lines[0] == "| test accuracy | 0 epochs | 1 epoch |"
    assert lines[4] == "| ensemble | 0.8500 |  |" and lines[5] == "| nt | 0.5000 | 0.6000 |"


def test_figures_show_what_the_report_says():
    figure = figures.accuracy_after_fusion(REPORT)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["nt"].get_ydata() == pytest.approx([20, 50, 80]) and lines["other"].get_linestyle() == "--"
    assert lines["member"].get_color() == figures.CONTROL
    figure = figures.accuracy_over_fraction(REPORT)
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([0.25, 0.5])
    assert figures.accuracy_over_width(REPORT) is None
    assert figures.accuracy_after_fusion({**REPORT, "history": REPORT["history"][:2]}) is None
    figure = figures.provenance(REPORT)
    assert figure.axes[0].images[0].get_array()[0].tolist() == [0.75, 0.25]
    assert figures.provenance({"candidates": {"other": {"provenance": {}}}}) is None
