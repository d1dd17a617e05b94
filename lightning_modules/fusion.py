"""Fusion: trains an ensemble, makes one network of it in several ways, and trains all of these side by side."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.classification import LabelledImages
from lightning_modules.fusion_candidates import Contest, check, checked, shape_of
from lightning_modules.metrics.classification import ClassificationScores
from lightning_modules.metrics.forecast import SumRatio
from networks.fusion.members import item_weights, load_members, make_members, read_members
from networks.fusion.methods import fuse

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Diversity = Literal["seed", "bootstrap", "classes"]


class Fusion(LabelledImages):
    """Neuron transplantation and its rivals (Öz et al., 2025), in one fit.

    Members are trained for ``member_epochs`` on the sum of their losses, which is training each alone, or come from
    checkpoints. At the end of the last of these epochs (or of the fit, if that is earlier) every candidate is made of
    them; for the rest of the fit the members stand still and the candidates learn side by side. What a candidate is
    worth is known at every epoch in ``report_epochs``, counted from the fusion, by the network as it was then: nothing
    is chosen by the test images. Two candidates are always there, because a fused network means nothing without them:
    ``member``, the best member in validation trained on, and ``member_distill``, the same distilled.

    Batches are those of `datamodules.images.Images`. Steps of validation, test and predict return what
    `lightning_modules.classification.LabelledImages` says, of the main candidate.

    Logged (``val/``, ``test/``): ``loss`` and scores of the main candidate; ``members/accuracy`` (mean) and ``/nll``,
    ``best_member/...`` (the best in validation), ``ensemble/...``, ``<candidate>/...``; in a test
    ``<candidate>/epoch_<e>/accuracy``, ``/nll`` and ``/recovery``: (accuracy - mean of the members) / (ensemble - mean
    of the members).

    Args:
        net: Makes a member from keyword arguments (a partial).
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        input_shape: Channel, height and width of an image.
        num_members: m.
        variants: What differs between the members' arguments; None: nothing. Their widths may, then only candidates by
            ``nt``, ``nt_r`` and ``best`` are possible.
        members: Runs or checkpoints that members come from, of any experiment whose network is a member; a run of this
            experiment gives all its members. None: they are trained here.
        biases: Whether linear layers and convolutions have biases. The paper's have none.
        member_epochs: Epochs that members are trained. With ``members`` 0 is usual: they stay as they are.
        diversity: What sets members apart beside their initial weights: ``seed``: nothing; ``bootstrap``; ``classes``:
            disjoint shards with unequal parts of the classes (`networks.fusion.members.item_weights`).
        concentration: Of the Dirichlet distribution behind ``classes``.
        member_seed: Of initial weights and of the diversity.
        synchronize: Method by which members are fused after every epoch of theirs, and all go on from the result: a
            study of the paper, where transplantation fails. None: they train alone.
        candidates: By name ``{method, objective, ...settings}``: the method of `networks.fusion.methods.METHODS`, what
            it learns from after the fusion (``labels``, or ``distill``: the ensemble's logits), its settings.
        main: Name of the candidate that stands for the result; None: the first one.
        temperature: Of the distillation.
        finetune_lr: Learning rate after the fusion; None: that of the optimizer.
        num_inputs: Training images, without labels, that layers are fitted to and statistics estimated on.
        input_views: Views of each of them: as many random ones as the data would show in training
            (``data.augment``); 0: the images themselves.
        report_epochs: Epochs after the fusion that a test reports, 0 for right after it. The last one is reported too.
        predict_with: ``main``, ``ensemble`` or the name of a candidate.
        num_classes: Number of classes.
        top_k: k of the top-k accuracy; None: not reported.
        num_bins: Bins of the expected calibration error.
        scheduler_monitor: Metric given to schedulers that watch one.
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")
    score_names: ClassVar[tuple[str, ...]] = ()
    needs_plain_weights: ClassVar[bool] = True  # asked by callbacks that factorise

    def __init__(
        self,
        net: Callable[..., nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        input_shape: Sequence[int] = (1, 8, 8),
        num_members: int = 4,
        variants: Sequence[Mapping[str, Any]] | None = None,
        members: Sequence[str] | None = None,
        biases: bool = True,
        member_epochs: int = 30,
        diversity: Diversity = "seed",
        concentration: float = 0.5,
        member_seed: int = 0,
        synchronize: str | None = None,
        candidates: Mapping[str, Mapping[str, Any]] | None = None,
        main: str | None = None,
        temperature: float = 2.0,
        finetune_lr: float | None = None,
        num_inputs: int = 2048,
        input_views: int = 0,
        report_epochs: Sequence[int] = (0, 1, 3, 10),
        predict_with: str = "main",
        num_classes: int = 10,
        top_k: int | None = None,
        num_bins: int = 15,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        self.candidates = checked({"nt": {"method": "nt"}} if candidates is None else candidates)
        self.main = next(iter(self.candidates)) if main is None else main
        self.member_paths = None if members is None else list(members)
        check(
            num_members=num_members,
            member_epochs=(member_epochs, self.member_paths),
            main=(self.main, self.candidates),
            predict_with=(predict_with, self.candidates),
            synchronize=synchronize,
            temperature=temperature,
            num_inputs=(num_inputs, input_views),
            report_epochs=report_epochs,
        )
        item_weights(torch.zeros(1, dtype=torch.int64), 1, diversity, concentration)
        built = make_members(net, num_members, variants, member_seed, biases)
        self.example = (torch.zeros(2, *input_shape),)
        shapes = {name: shape_of(built, one, self.example) for name, one in self.candidates.items()}
        super().__init__(Contest(built, shapes, self.main), optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=list(self.objects))
        self.num_members, self.member_epochs = num_members, member_epochs
        self.diversity, self.concentration, self.member_seed = diversity, concentration, member_seed
        self.synchronize, self.temperature, self.finetune_lr = synchronize, temperature, finetune_lr
        self.num_inputs, self.input_views, self.predict_with = num_inputs, input_views, predict_with
        self.report_epochs = sorted(set(report_epochs))
        self.num_classes, self._scored = num_classes, (num_classes, top_k, num_bins)
        for stage in ("val", "test"):
            setattr(self, f"{stage}_loss", SumRatio())
        self.contest_scores = nn.ModuleDict()  # of the running evaluation, by name
        self.fused_at: int | None = None  # epochs that were over when the members were fused
        self.snapshots: dict[int, dict[str, dict[str, Tensor]]] = {}  # by epoch after the fusion, then by candidate
        self.history: list[dict[str, Any]] = []
        self.about: dict[str, dict[str, Any]] = {}  # by candidate: seconds, provenance, ...
        self.best_member: int | None = None  # in validation
        self._weights: Tensor | None = None  # (member, item)
        self._loaded = False

    # ------------------------------------------------------------------------------------------------------ the members

    @override
    def parameter_groups(self) -> list[Any]:
        fused = {"params": list(self.net.fused.parameters())}
        if self.finetune_lr is not None:
            fused["lr"] = self.finetune_lr
        return [{"params": list(self.net.members.parameters())}, fused]

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None)
        if classes not in (None, self.num_classes):
            raise ValueError(f"model.num_classes={self.num_classes}, but the data have {classes} classes")
        shape = getattr(data, "input_shape", None)
        if shape is not None and tuple(shape) != tuple(self.example[0].shape[1:]):
            raise ValueError(f"model.input_shape={list(self.example[0].shape[1:])}, but the data have {list(shape)}")
        fresh = self.member_paths is not None and not self._loaded and not self.is_fused
        if fresh and (stage == "fit" or self.trainer.ckpt_path is None):
            load_members(self.net.members, read_members(self.member_paths), "model.members")
            self._loaded = True

    @property
    def is_fused(self) -> bool:
        """Whether the candidates have been made."""
        return self.fused_at is not None

    @property
    def finetune_epochs(self) -> int:
        """Epochs that the candidates have learned, the running one included."""
        return 0 if self.fused_at is None else self.trainer.current_epoch + 1 - self.fused_at

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.diversity != "seed":
            labels = torch.as_tensor(self._dataset("train").labels)
            own = item_weights(labels, self.num_members, self.diversity, self.concentration, self.member_seed)
            # Means over all items, not over those of a batch: then ranks that share it need not know each other's.
            self._weights = (own / own.mean(1, keepdim=True).clamp(min=1 / own.shape[1])).to(self.device)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.member_epochs == 0 and not self.is_fused:
            self._fuse(epochs_over=0)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        image, label = batch["image"], batch["label"]
        learning = self.net.fused if self.is_fused else self.net.members
        total = self._fused_loss(image, label) if self.is_fused else self._member_loss(batch)
        self._add_to_epoch("loss", total.detach().double() / len(learning) * len(label), len(label))
        if self.trainer.world_size > 1:  # DDP waits for gradients of everybody
            idle = self.net.members if self.is_fused else self.net.fused
            total = total + 0.0 * sum(p.sum() for p in idle.parameters())
        return {"loss": total}

    def _member_loss(self, batch: Batch) -> Tensor:
        """Sum of the members' losses: the gradient of each is that of training it alone."""
        image, label = batch["image"], batch["label"]
        if self._weights is None:
            return sum(F.cross_entropy(member(image), label) for member in self.net.members)
        weights = self._weights[:, batch["index"]]
        losses = [
            (own * F.cross_entropy(member(image), label, reduction="none")).mean()
            for member, own in zip(self.net.members, weights, strict=True)
        ]
        return sum(losses)

    def _fused_loss(self, image: Tensor, label: Tensor) -> Tensor:
        """Sum of the candidates' losses."""
        teacher: Tensor | None = None
        if any(one["objective"] == "distill" for one in self.candidates.values()):
            self.net.members.eval()  # the ensemble is what it was when it was fused
            with torch.no_grad():
                teacher = self.net.ensemble(image)
        losses = []
        for name, one in self.candidates.items():
            logits = self.net.fused[name](image)
            if one["objective"] == "distill":
                losses.append(distillation_loss(logits, teacher, self.temperature))
            else:
                losses.append(F.cross_entropy(logits, label))
        return sum(losses)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Without gradients weights neither decay nor move on: whoever has no loss stands still.
        for parameter in (self.net.members if self.is_fused else self.net.fused).parameters():
            parameter.grad = None

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx + 1 < self.trainer.num_training_batches:
            return
        epoch = self.trainer.current_epoch + 1  # before validation and checkpoint of this epoch
        if self.is_fused:
            if self.finetune_epochs in self.report_epochs or epoch == self.trainer.max_epochs:
                self._take_snapshot(self.finetune_epochs)
        elif epoch >= self.member_epochs or epoch == self.trainer.max_epochs:
            self._fuse(epochs_over=epoch)
        elif self.synchronize is not None:
            self._synchronize()

    # ------------------------------------------------------------------------------------------------------- the fusion

    def _dataset(self, part: Literal["train", "val"]) -> Any:
        """The data set of a part, whole: what is computed with it is equal on all ranks. None: there is none."""
        loader = getattr(self.trainer.datamodule, f"{part}_dataloader")()
        return getattr(loader, "dataset", None)

    def _few(self, limit: float | int | None, batch_size: int, number: int) -> int:
        """Items of a part, fewer where a run is cut to some batches (debug=fast)."""
        return min(number, limit * batch_size) if isinstance(limit, int) else number

    def unlabelled(self) -> list[Tensor]:
        """Inputs that candidates are fitted to: training images in a fixed order, in batches."""
        data, items = self.trainer.datamodule, self._dataset("train")
        number = self._few(self.trainer.limit_train_batches, data.batch_size, min(self.num_inputs, len(items)))
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(self.member_seed))[:number]
        views = range(self.input_views) if getattr(data, "augment", False) else ()
        found = []
        for chunk in order.split(data.eval_batch_size):
            raw = items.__getitems__(chunk.tolist())
            for view in views or (None,):
                batch = data.normalized(raw) if view is None else data.augmented(raw, view)
                found.append(batch["image"].to(self.device, self.dtype))
        return found

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Validation images, or those of the training where there are none."""
        data = self.trainer.datamodule
        items = self._dataset("val")
        if items is None:
            rank_zero_warn("there are no validation images: the best member is chosen by training images")
            items = self._dataset("train")
        number = self._few(self.trainer.limit_val_batches, data.eval_batch_size, len(items))
        for chunk in torch.arange(number).split(data.eval_batch_size):
            batch = data.normalized(items.__getitems__(chunk.tolist()))
            yield batch["image"].to(self.device, self.dtype), batch["label"].to(self.device)

    @torch.no_grad()
    def accuracy(self, network: nn.Module) -> float:
        """Accuracy of a network on the validation images, and minus its loss in the digits behind."""
        mode, right, loss, total = network.training, 0, 0.0, 0
        network.eval()
        for image, label in self._labelled():
            logits = network(image)
            right += int((logits.argmax(1) == label).sum())
            loss += float(F.cross_entropy(logits, label, reduction="sum"))
            total += len(label)
        network.train(mode)
        return right / total - 1e-6 * min(loss / total, 100.0)

    def _fuse(self, epochs_over: int) -> None:
        """Make all candidates of the members as they are now."""
        members = list(self.net.members)
        scores = [self.accuracy(member) for member in members]
        self.best_member = max(range(len(scores)), key=scores.__getitem__)
        inputs = self.unlabelled()
        example = tuple(one.to(self.device, self.dtype) for one in self.example)
        for name, one in self.candidates.items():
            settings = {k: v for k, v in one.items() if k not in ("method", "objective")}
            if len(members) == 1:
                raise ValueError("model.num_members=1: fusion needs at least two members")
            result = fuse(members, one["method"], example, inputs, self.accuracy, recalibrate=True, **settings)
            self.net.fused[name].load_state_dict(result.model.state_dict())
            self.about[name] = {"seconds": result.seconds, "provenance": result.provenance}
        self.fused_at = epochs_over
        self._take_snapshot(0)
        accuracies = {name: self.accuracy(self.net.fused[name]) for name in self.candidates}
        log.info(
            "fused after %d epochs; validation accuracy: members %s; %s",
            epochs_over,
            ", ".join(f"{score:.4f}" for score in scores),
            ", ".join(f"{name} {value:.4f}" for name, value in accuracies.items()),
        )

    def _synchronize(self) -> None:
        """All members go on from their fusion."""
        example = tuple(one.to(self.device, self.dtype) for one in self.example)
        result = fuse(list(self.net.members), self.synchronize, example, self.unlabelled(), self.accuracy, True)
        for member in self.net.members:
            member.load_state_dict(result.model.state_dict())

    def _take_snapshot(self, epoch: int) -> None:
        self.snapshots[epoch] = {
            name: {key: value.detach().clone() for key, value in self.net.fused[name].state_dict().items()}
            for name in self.candidates
        }

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["fusion"] = {
            name: getattr(self, name) for name in ("fused_at", "snapshots", "history", "about", "best_member")
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, value in copy.deepcopy(checkpoint["fusion"]).items():
            setattr(self, name, value)

    # ------------------------------------------------------------------------------------------------------- evaluation

    @override
    def forward(self, image: Tensor) -> Tensor:
        """Logits of what ``predict_with`` names, (batch, class); the ensemble where nothing is fused yet."""
        if self.predict_with == "ensemble" or not self.is_fused:
            return self.net.ensemble(image)
        return self.net.fused[self.main if self.predict_with == "main" else self.predict_with](image)

    def _begin_scores(self, more: Sequence[str] = ()) -> None:
        fused = self.candidates if self.is_fused else ()
        names = [*(f"member_{k}" for k in range(self.num_members)), "ensemble", *fused, *more]
        self.contest_scores = nn.ModuleDict({n: ClassificationScores(*self._scored) for n in names}).to(self.device)

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._begin_scores()

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        if not self.is_fused and self._loaded:
            self._fuse(epochs_over=0)
        if not self.is_fused:
            rank_zero_warn("nothing is fused yet (model.member_epochs): the members alone are tested")
        self._begin_scores([_at(name, epoch) for epoch in self.snapshots for name in self.candidates])

    @override
    def _evaluation_step(self, batch: Batch, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        image, label = batch["image"], batch["label"]
        each = [member(image) for member in self.net.members]
        found = {f"member_{k}": logits for k, logits in enumerate(each)}
        found["ensemble"] = torch.stack(each).mean(0)
        if self.is_fused:
            found |= {name: self.net.fused[name](image) for name in self.candidates}
        if stage == "test":
            found |= self._of_snapshots(image)
        for name, logits in found.items():
            self.contest_scores[name].update(logits.float(), label)
        main = found[self.main if self.is_fused else "ensemble"]
        loss = F.cross_entropy(main, label)
        getattr(self, f"{stage}_loss").update(loss.double() * len(label), len(label))
        if stage == "test" and self._separation is not None:
            self._separate(main, unknown=False)
        return {"loss": loss} | self._outputs(batch, main)

    def _of_snapshots(self, image: Tensor) -> dict[str, Tensor]:
        found = {}
        for name in self.candidates:
            network = self.net.fused[name]
            for epoch, states in self.snapshots.items():
                state = {key: value.to(image.device) for key, value in states[name].items()}
                found[_at(name, epoch)] = torch.func.functional_call(network, state, (image,))
        return found

    @override
    def scores(self, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        each = {name: metric.compute() for name, metric in self.contest_scores.items()}
        main = each[self.main if self.is_fused else "ensemble"]
        members = [each[f"member_{k}"] for k in range(self.num_members)]
        values = {"loss": getattr(self, f"{stage}_loss").compute()} | main
        for metric in ("accuracy", "nll"):
            values[f"members/{metric}"] = torch.stack([scores[metric] for scores in members]).mean()
            if self.best_member is not None:
                values[f"best_member/{metric}"] = members[self.best_member][metric]
            for name in ("ensemble", *(self.candidates if self.is_fused else ())):
                values[f"{name}/{metric}"] = each[name][metric]
        if stage == "test":
            values |= self._reported(each, values)
        return values

    def _reported(self, each: Mapping[str, dict[str, Tensor]], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Candidates at the epochs that a test reports."""
        found = {}
        low, high = values["members/accuracy"], values["ensemble/accuracy"]
        for name in self.candidates if self.is_fused else ():
            for epoch in self.snapshots:
                scores = each[_at(name, epoch)]
                where = f"{name}/epoch_{epoch:02d}"
                found |= {f"{where}/accuracy": scores["accuracy"], f"{where}/nll": scores["nll"]}
                found[f"{where}/recovery"] = (scores["accuracy"] - low) / (high - low)
            found[f"{name}/recovery"] = (each[name]["accuracy"] - low) / (high - low)
        return found

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        each = {name: metric.compute() for name, metric in self.contest_scores.items()}
        row: dict[str, Any] = {"epoch": self.trainer.current_epoch + 1}
        row["finetune_epoch"] = self.finetune_epochs if self.is_fused else None
        for metric in ("accuracy", "nll"):
            row[metric] = {name: float(scores[metric]) for name, scores in each.items()}
        self.history.append(row)

    def results_table(self) -> list[dict[str, Any]]:
        """Rows of the comparison after a test: name, epochs after the fusion, accuracy, NLL, recovery."""
        each = {name: metric.compute() for name, metric in self.contest_scores.items()}
        members = [each[f"member_{k}"] for k in range(self.num_members)]
        low = sum(float(scores["accuracy"]) for scores in members) / len(members)
        high = float(each["ensemble"]["accuracy"])

        def row(name: str, epoch: int | None, scores: Mapping[str, Tensor]) -> dict[str, Any]:
            accuracy = float(scores["accuracy"])
            gain = (accuracy - low) / (high - low) if high != low else float("nan")
            values = {"accuracy": accuracy, "nll": float(scores["nll"]), "recovery": gain}
            return {"name": name, "epoch": epoch} | values

        rows = [{"name": "members, mean", "epoch": None, "accuracy": low, "recovery": 0.0}]
        if self.best_member is not None:
            rows.append(row("best member", None, members[self.best_member]))
        rows.append(row("ensemble", None, each["ensemble"]))
        for name in self.candidates if self.is_fused else ():
            rows += [row(name, epoch, each[_at(name, epoch)]) for epoch in self.snapshots]
        return rows


def _at(name: str, epoch: int) -> str:
    return f"{name}@{epoch}"


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 CE(softmax(teacher / T), log_softmax(logits / T)), mean over the batch (paper, section 2.4).

    Args:
        logits: (batch, class).
        teacher: (batch, class), of the ensemble.
        temperature: T.
    """
    return temperature**2 * F.cross_entropy(logits / temperature, (teacher / temperature).softmax(1))
