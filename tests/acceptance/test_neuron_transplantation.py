"""What neuron transplantation must achieve: the numbered lines of the acceptance list.

Numbers in comments were measured with these tests. Those on MNIST and CIFAR-10 need the files of data=mnist and
data=cifar10 (`WATTLIGHT_DATA`).
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import neuron_transplantation as benchmark
from benchmarks.measure import compare, ratio
from datamodules.images import Images
from lightning_modules.fusion import distillation_loss
from networks.cifar_resnet import CifarResNet
from networks.cnn import CNN
from networks.fusion import (
    RedundancyWarning,
    UnsupportedNetworkError,
    concat,
    examined,
    fuse,
    permuted,
    trace,
    transplant,
)
from networks.fusion.members import without_biases
from networks.fusion.selection import importance
from networks.lenet import LeNet
from networks.load_lstm import WeekAheadLSTM
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.simple_vit import SimpleViT
from networks.vgg import VGG
from networks.vit import ViT
from runner import job
from tests.composing import ROOT, composed, plain
from tests.networks.fusion.nets import ConvNet, members

DATA = Path(os.environ.get("WATTLIGHT_DATA", ROOT.parent / "shared" / "data"))
Pair = tuple[Tensor, Tensor]


# --- 1: the concatenation is the ensemble -----------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], float]] = {
    "mlp": (lambda k: MLP(hidden=(64, 64)), (1, 8, 8), 1e-6),
    "mlp without biases": (lambda k: without_biases(MLP(hidden=(64, 64))), (1, 8, 8), 1e-6),
    "mlp of unequal widths": (lambda k: MLP(hidden=(48 + 8 * k, 64 - 4 * k)), (1, 8, 8), 1e-6),
    "lenet": (lambda k: LeNet(), (3, 32, 32), 1e-6),
    "vgg-bn": (lambda k: VGG(11, 10, 3, 0.125, 2, 32), (3, 32, 32), 1e-6),
    "resnet18": (lambda k: ResNet(18, 10, 3, "cifar", 0.125), (3, 16, 16), 1e-6),
    "transformer": (lambda k: ViT(10, 3, 16, 4, 32, 2, 4), (3, 16, 16), 1e-5),
}


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_concatenation_is_the_ensemble(name, count):
    build, shape, tolerance = NETWORKS[name]
    torch.manual_seed(count)
    networks = [build(k).eval() for k in range(count)]
    x = torch.randn(4, *shape)
    with torch.no_grad():
        got = concat(networks, x[:2], weighting="equal").eval()(x)
        want = torch.stack([network(x) for network in networks]).mean(0)
    assert float((got - want).abs().max()) <= tolerance


# --- 2: torch-pruning finds the same ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("name", ["mlp", "convolution", "resnet18"])
def test_the_same_as_torch_pruning(name, count):
    pruning = pytest.importorskip("torch_pruning")
    build, shape = {
        "mlp": (lambda k: MLP(hidden=(64, 48, 32)), (2, 1, 8, 8)),
        "convolution": (lambda k: ConvNet(), (2, 3, 8, 8)),
        "resnet18": (lambda k: ResNet(18, 10, 3, "cifar", 0.125), (2, 3, 8, 8)),
    }[name]
    networks = members(build, count)
    image = torch.randn(shape)
    whole = concat(networks, image)
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    pruning.pruner.MagnitudePruner(
        whole,
        image,
        importance=pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=1 - 1 / count,
        ignored_layers=[last],
    ).step()
    ours = transplant(networks, examined(networks, [image])).network.state_dict()
    theirs = whole.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# --- 3: exact widths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 17))
def test_every_group_has_its_width_again(count):
    torch.manual_seed(0)
    networks = [MLP(hidden=(512, 64)) for _ in range(count)]
    state = transplant(networks, examined(networks, [torch.zeros(2, 1, 8, 8)])).network.state_dict()
    own = MLP(hidden=(512, 64))
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in own.state_dict().items()}
    own.load_state_dict(state, strict=True)


# --- 4: special cases -------------------------------------------------------------------------------------------------


def test_special_cases():
    torch.manual_seed(0)
    networks = [MLP(hidden=(64, 48)) for _ in range(3)]
    image, x = torch.zeros(2, 1, 8, 8), torch.randn(5, 1, 8, 8)
    pair = networks[:2]
    for r, network in ((0.0, pair[0]), (1.0, pair[1])):
        state = transplant(pair, examined(pair, [image]), fraction=r).network.state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    same = [networks[0], networks[0]]
    with pytest.warns(RedundancyWarning):
        transplant(same, examined(same, [image]))
    outputs = []
    for order in ((0, 1, 2), (1, 2, 0)):
        chosen = [networks[k] for k in order]
        with torch.no_grad():
            outputs.append(transplant(chosen, examined(chosen, [image])).network(x))
    assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-6
    groups = trace(networks[0], image)
    order = {g: torch.randperm(groups.groups[g].width) for g in groups.free}
    for g in groups.free:
        moved = importance(permuted(networks[0], groups, order), groups, g)
        torch.testing.assert_close(moved, importance(networks[0], groups, g)[order[g]])


# --- 5 to 7: 5,000 images of MNIST ------------------------------------------------------------------------------------


def prepared(part: Any, data: Images) -> Pair:
    loader = data._loader(part, 1000)
    batches = [data.normalized(batch) for batch in loader]
    return torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])


def train(
    networks: Sequence[nn.Module],
    data: Pair,
    epochs: int,
    seed: int,
    teacher: Any = None,
    batch: int = 256,
    cosine: bool = False,
) -> None:
    """Each network on its own: SGD at 0.01, momentum 0.9; on labels, or on the logits of a teacher.

    With ``cosine`` the rate falls to 0.
    """
    image, label = data
    optimizer = torch.optim.SGD([p for n in networks for p in n.parameters()], lr=0.01, momentum=0.9)
    steps = epochs * (len(image) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    generator = torch.Generator().manual_seed(seed)
    for network in networks:
        network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(image), generator=generator)[: len(image) // batch * batch].split(batch):
            x, y = image[chosen], label[chosen]
            if teacher is None:
                loss = sum(F.cross_entropy(network(x), y) for network in networks)
            else:
                with torch.no_grad():
                    target = teacher(x)
                loss = sum(distillation_loss(network(x), target, 2.0) for network in networks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    for network in networks:
        network.eval()


@torch.no_grad()
def accuracy(network: Callable[[Tensor], Tensor], data: Pair) -> float:
    """In percent."""
    return 100 * float((network(data[0]).argmax(1) == data[1]).double().mean())


def ensemble_of(networks: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([network(x) for network in networks]).mean(0)


@pytest.fixture(scope="module")
def mnist() -> dict[str, Pair]:
    """The first 500 training images of every digit, and the 10,000 test images."""
    if not (DATA / "mnist").is_dir():
        pytest.skip("needs the files of MNIST, which do not ship with the program")
    config = plain(composed("experiment=classification/mnist", f"data_dir={DATA}", "data.max_train=5000"))
    data = Images(**{k: v for k, v in config["data"].items() if k != "_target_"} | {"val_fraction": 0.0})
    data.setup()
    return {part: prepared(part, data) for part in ("train", "test")}


@pytest.fixture(scope="module")
def mnist5k(mnist) -> Pair:
    """The 5,000 images."""
    return mnist["train"]


def members_of_mnist(images: Pair, seed: int, count: int) -> tuple[list[nn.Module], Pair, Pair]:
    """Bias-free perceptrons 784-64-64-10 of 30 epochs, the 4,000 images they have seen, the 1,000 others."""
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
    own, test = ((images[0][part], images[1][part]) for part in (order[:4000], order[4000:]))
    torch.manual_seed(seed)
    networks = [without_biases(MLP(10, 1, 28, (64, 64))) for _ in range(count)]
    train(networks, own, 30, seed)
    return networks, own, test


@pytest.fixture(scope="module")
def small(mnist5k) -> dict[int, list[dict[str, float]]]:
    """By number of members: accuracies of three seeds on 1,000 images."""
    found: dict[int, list[dict[str, float]]] = {2: [], 4: []}
    for count, each in found.items():
        for seed in (0, 1, 2):
            networks, own, test = members_of_mnist(mnist5k, seed, count)
            values = {"member": statistics.fmean(accuracy(network, test) for network in networks)}
            fused = {}
            for method in ("average", "rebasin", "nt", "nt_r"):
                fused[method] = fuse(networks, method, [own[0][:2]], [own[0][:512]]).model
                values[method] = accuracy(fused[method], test)
            for epoch in (1, 2, 3):
                train(list(fused.values()), own, 1, seed=50 + epoch)
                values |= {f"{method} {epoch}": accuracy(network, test) for method, network in fused.items()}
            each.append(values)
    return found


def mean(rows: Sequence[dict[str, float]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_shot_on_mnist(small):
    rows = small[4]  # nt 70.7, nt_r 92.1, average 20.6
    assert 50 <= mean(rows, "nt") <= 80
    assert mean(rows, "nt_r") >= 91
    assert mean(rows, "average") <= 45


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fitting_beats_alignment(small):
    assert mean(small[2], "nt_r") >= mean(small[2], "rebasin") + 0.5  # 92.4, 89.8
    assert mean(small[4], "nt_r") >= mean(small[4], "rebasin") + 3  # 92.1, 81.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xfail(strict=True, reason="92.4 against 92.8 of a member: 1,000 test images tell 0.8 points apart")
def test_within_three_epochs_the_fused_network_is_as_good_as_a_member_on_a_thousand_images(small):
    """As the list reads it: three seeds, a constant rate."""
    rows = small[2]
    best = max(mean(rows, f"{method} {epoch}") for method in ("nt", "nt_r") for epoch in (1, 2, 3))
    assert best >= mean(rows, "member")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_within_three_epochs_the_fused_network_is_as_good_as_a_member(mnist):
    """Six seeds and the 10,000 test images of MNIST, of which no network has seen any.

    Two members and their ensemble are 0.2 points apart, which 1,000 images do not tell: on those of three seeds the
    best of `nt` and `nt_r` at the constant rate has 92.3 against 92.8, which misses the line as it is written. Here
    channels are chosen by activations and the rate falls to 0: 91.59 against 91.52, with a standard error of 0.07. The
    members trained on for as long with that rate have 91.67 (docs/experiments/neuron_transplantation.md).
    """
    found: dict[str, list[float]] = {"member": [], "ensemble": [], "fused": [], "tuned": []}
    for seed in range(6):
        networks, own, _ = members_of_mnist(mnist["train"], seed, 2)
        fused = fuse(networks, "nt_r", [own[0][:2]], own[0].split(1000), channels="activations").model
        found["member"].append(statistics.fmean(accuracy(network, mnist["test"]) for network in networks))
        found["ensemble"].append(accuracy(ensemble_of(networks), mnist["test"]))
        found["fused"].append(accuracy(fused, mnist["test"]))
        train([fused], own, 3, seed=50, cosine=True)
        found["tuned"].append(accuracy(fused, mnist["test"]))
    print({name: (statistics.fmean(each), each) for name, each in found.items()})
    assert statistics.fmean(found["tuned"]) >= statistics.fmean(found["member"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_epoch_brings_back_what_transplantation_has_lost(small):
    """Of the drop of plain transplantation, 6.2 points: 0.86 are back without a fit, with one 0.91."""
    rows = small[2]
    drop = mean(rows, "member") - mean(rows, "nt")
    assert drop > 3
    recovered = [(mean(rows, f"{method} 1") - mean(rows, "nt")) / drop for method in ("nt", "nt_r")]
    assert max(recovered) >= 0.9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_middle_of_the_fraction_loses_most(tmp_path):
    """On the digits, with the experiment a user runs."""
    lean = ("logger=none", "~callbacks.energy", "~callbacks.communication", "num_threads=1", "trainer.max_epochs=21")
    curves = []
    for seed in (0, 1, 2):
        config = composed(
            "experiment=neuron_transplantation/fraction", *lean, f"seed={seed}", run_dir=tmp_path / str(seed)
        )
        result = job.run(plain(config))
        assert result["status"] == "completed", result.get("error")
        report = json.loads((tmp_path / str(seed) / "fusion.json").read_text())
        at = {row["name"]: row["accuracy"] for row in report["results"] if row["epoch"] == 0}
        names = [name for name in report["settings"] if name.startswith("r_")]
        curves.append([at[name] for name in names])
        shown = report["history"][20 - 1]["accuracy"]
        assert shown["r_000"] == shown["member_0"] and shown["r_1000"] == shown["member_1"]
    average = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    lowest = average.index(min(average)) / 8
    assert 0.375 <= lowest <= 0.75


# --- 8 to 10: 12,000 images of CIFAR-10 -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar() -> dict[str, Pair]:
    if not (DATA / "cifar10-imagefolder.zip").is_file():
        pytest.skip("needs cifar10-imagefolder.zip, which does not ship with the program")
    config = plain(
        composed(
            "experiment=neuron_transplantation/cifar10_mlp",
            *(f"data_dir={DATA}", "data.val_fraction=0.0", "data.max_train=12000", "data.max_test=3000"),
        )
    )
    data = Images(**{key: value for key, value in config["data"].items() if key != "_target_"})
    data.prepare_data()
    data.setup()
    return {"train": prepared("train", data), "test": prepared("test", data)}


@pytest.fixture(scope="module")
def perceptrons(cifar) -> Callable[[int], list[nn.Module]]:
    """Four bias-free perceptrons 3072-256-256-10 of 30 epochs with batches of 128, by seed.

    The list was written from members of 45.1 % and an ensemble of 49.0 %; it does not name the size of a batch. With
    256 ours have 43.8 and 46.2 %, with 128 44.3 and 47.6 % (seed 0).
    """
    done: dict[int, list[nn.Module]] = {}

    def of(seed: int) -> list[nn.Module]:
        if seed not in done:
            torch.manual_seed(seed)
            done[seed] = [without_biases(MLP(10, 3, 32, (256, 256))) for _ in range(4)]
            train(done[seed], cifar["train"], 30, seed, batch=128)
        return done[seed]

    return of


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fitting_to_all_images_of_cifar(cifar, perceptrons):
    above = []
    for seed in (0, 1):
        networks, image = perceptrons(seed), cifar["train"][0]
        found = {
            method: accuracy(fuse(networks, method, [image[:2]], image.split(2000), **options).model, cifar["test"])
            for method, options in (("nt", {}), ("nt_r", {"channels": "activations"}))
        }
        best = max(accuracy(network, cifar["test"]) for network in networks)
        assert found["nt_r"] >= 45.5, (found, best)
        assert found["nt_r"] - found["nt"] >= 12, found
        above.append(found["nt_r"] > best)
    assert any(above)


def fused_perceptrons(cifar, perceptrons) -> Iterator[tuple[int, list[nn.Module], list[float], nn.Module]]:
    """Of five seeds: the networks, their accuracies on the test images, and what they are fused to."""
    for seed in range(5):
        networks, image = perceptrons(seed), cifar["train"][0]
        fused = fuse(networks, "nt_r", [image[:2]], image.split(2000), channels="activations").model
        yield seed, networks, [accuracy(network, cifar["test"]) for network in networks], fused


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_ambition_at_once(cifar, perceptrons):
    """60 % of the way from the members to the ensemble, without a step of training: 0.67, by seed 0.64 to 0.71."""
    ways = []
    for _, networks, each, fused in fused_perceptrons(cifar, perceptrons):
        low, high = statistics.fmean(each), accuracy(ensemble_of(networks), cifar["test"])
        ways.append((accuracy(fused, cifar["test"]) - low) / (high - low))
    assert statistics.fmean(ways) >= 0.6, ways


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_ambition_distilled(cifar, perceptrons):
    """Half a point above the distilled best member, both after three epochs: 0.68, by seed -0.3 to 2.4."""
    gains = []
    for seed, networks, each, fused in fused_perceptrons(cifar, perceptrons):
        control = copy.deepcopy(networks[each.index(max(each))])
        train([fused, control], cifar["train"], 3, seed=100 + seed, teacher=ensemble_of(networks), batch=128)
        gains.append(accuracy(fused, cifar["test"]) - accuracy(control, cifar["test"]))
    assert statistics.fmean(gains) >= 0.5, gains


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_convolutions_are_fitted(cifar):
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks = [LeNet() for _ in range(2)]
        train(networks, cifar["train"], 30, seed)
        image = cifar["train"][0]
        fused = fuse(networks, "nt_r", [image[:2]], image[:4096].split(512)).model
        assert accuracy(fused, cifar["test"]) >= 45


# --- 11: seconds and memory -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gathering_is_fast():
    pytest.importorskip("torch_pruning")
    timings = compare({k: v for k, v in benchmark.calls(512).items() if k in ("transplantation", "torch-pruning")}, 5)
    assert ratio(timings["torch-pruning"].cpu, timings["transplantation"].cpu).value >= 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_transport_as_published_is_slow():
    pytest.importorskip("ot")
    chosen = ("transplantation", "transport as published")
    timings = compare({k: v for k, v in benchmark.calls(512).items() if k in chosen}, 3)
    assert ratio(timings[chosen[1]].cpu, timings[chosen[0]].cpu).value >= 200


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_block_diagonal_matrix_is_made():
    assert benchmark.extra_memory() <= 2.2


# --- 12: honesty ------------------------------------------------------------------------------------------------------


def test_controls_are_in_every_table(tmp_path):
    """Fine-tuning and choices see no test image, and the table has what a fused network must be compared with."""
    config = composed(
        "experiment=neuron_transplantation",
        *("logger=none", "debug=fast", "~callbacks.energy", "~callbacks.communication"),
        run_dir=tmp_path,
    )
    result = job.run(plain(config))
    assert result["status"] == "completed", result.get("error")
    names = {row["name"] for row in json.loads((tmp_path / "fusion.json").read_text())["results"]}
    assert {"members, mean", "best member", "ensemble", "member", "member_distill"} <= names
    _, data = job.build(plain(config))
    data.setup()
    parts = {part: {data.images(part).pixels[row].tobytes() for row in data.images(part).rows} for part in _PARTS}
    assert not parts["test"] & (parts["train"] | parts["val"])


_PARTS = ("train", "val", "test")


# --- 13 and 14: see also tests/lightning_modules/test_fusion.py and, for other modules, tests/callbacks/test_fusion.py


def test_the_first_evaluation_changes_no_buffer():
    networks = members(NETWORKS["resnet18"][0], 2)
    x = torch.randn(16, 3, 16, 16)
    fused = fuse(networks, "nt", [x[:2]], [x], recalibrate=True).model
    before = {name: value.clone() for name, value in fused.named_buffers()}
    with torch.no_grad():
        fused(torch.randn(16, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in fused.named_buffers())


def test_networks_of_other_experiments_are_fused_or_refused_by_name():
    """As by callbacks=fuse_checkpoints, which tests/callbacks/test_fusion.py runs in a fit."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    for build in (lambda: CNN(10, 3, (8, 12)), lambda: CifarResNet(8), lambda: SimpleViT(10, 3, 16, 4, 32, 2, 4)):
        networks = [build().eval() for _ in range(2)]
        fused = fuse(networks, "nt_r", [x[:2]], [x]).model
        build().load_state_dict(fused.state_dict(), strict=True)
    with pytest.raises(UnsupportedNetworkError, match=r"LSTM \(lstm\) calls lstm.*register_module\(LSTM\)"):
        fuse([WeekAheadLSTM(), WeekAheadLSTM()], "nt", [torch.zeros(2, 7, 1)])
