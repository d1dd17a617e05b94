"""Which weight samples a forward pass evaluates, and the random numbers that belong to them.

Activations of S samples travel as one batch of S B rows, sample after sample, so that every ordinary module works on
them unchanged. The first random layer makes S B rows of B; modules before it compute once for all samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from networks.bayes.noise import Stream, mix64, sample_seed

Estimator = Literal["weight", "lrt", "flipout"]
NoiseMode = Literal["counter", "rank"]

_active = threading.local()


def current() -> SampleContext | None:
    """The innermost context that was entered in this thread; None outside of any."""
    stack = getattr(_active, "stack", None)
    return stack[-1] if stack else None


class SampleContext:
    """Inside it, Bayesian layers evaluate the weight samples ``ids``; outside, the means.

    Entering seeds all generators anew: the same arguments give the same random numbers, also when a checkpointed
    segment is computed again. Layers draw in the order in which they are called.

    Args:
        ids: Global numbers of the samples to evaluate here.
        num_samples: S over all ranks.
        batch: Items in the input of the network.
        seed: Of the run.
        step: Optimizer step, or the number of an evaluation.
        stream: Purpose; training and evaluation have streams of their own.
        estimator: ``weight``: explicit weights. ``lrt``: local reparametrisation, random outputs of a layer (Kingma et
            al., 2015). ``flipout``: the deviation of the weights has its signs flipped from item to item (Wen et al.,
            2018). The last two are for training: one sample is then no function.
        noise: ``counter``: one generator for each sample, whatever the rank. ``rank``: one for all samples here, which
            is faster on GPUs and depends on how samples are laid out.
        antithetic: Whether samples 2i and 2i + 1 have opposite noise.
        rank: Of the process, for ``noise="rank"``.
        rows: (d, D): item i of this batch is item d + i D of the batch of all ranks that share the data, so that
            numbers which belong to items do not depend on D either (``noise="counter"``).
        part: Number of the batch within an accumulated step: items then differ, weights do not.
        expanded: Whether the input was repeated for every sample before it entered the network. Any number of rows that
            divides by the samples is then understood, e.g. when channels are folded into the batch.
        allow_shared_lrt: Whether ``lrt`` is accepted where weights are used at several places of an item.

    Raises:
        ValueError: For unknown choices, and for antithetic samples that are no whole pairs.
    """

    def __init__(
        self,
        ids: Sequence[int],
        num_samples: int,
        *,
        batch: int,
        seed: int = 0,
        step: int = 0,
        stream: int = Stream.WEIGHTS,
        estimator: Estimator = "weight",
        noise: NoiseMode = "counter",
        antithetic: bool = False,
        rank: int = 0,
        rows: tuple[int, int] = (0, 1),
        part: int = 0,
        expanded: bool = False,
        allow_shared_lrt: bool = False,
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"model.estimator={estimator!r} is unknown; choose one of weight, lrt, flipout")
        if noise not in get_args(NoiseMode):
            raise ValueError(f"model.noise={noise!r} is unknown; choose counter or rank")
        self.ids = list(ids)
        if not self.ids:
            raise ValueError("a forward pass needs at least one weight sample")
        if antithetic and not _in_pairs(self.ids):
            raise ValueError(
                f"antithetic samples {self.ids} are no whole pairs (2i, 2i + 1): use an even model.num_samples and an "
                "even model.sample_chunk"
            )
        self.num_samples, self.batch = num_samples, batch
        self.seed, self.step, self.stream = seed, step, stream
        self.estimator, self.noise_mode, self.antithetic = estimator, noise, antithetic
        self.rank, self.rows, self.part = rank, rows, part
        self.expanded, self.allow_shared_lrt = expanded, allow_shared_lrt
        self._generators: dict[tuple[int, torch.device], list[torch.Generator]] = {}

    def __enter__(self) -> SampleContext:
        self._generators = {}
        if not hasattr(_active, "stack"):
            _active.stack = []
        _active.stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _active.stack.remove(self)

    @property
    def samples(self) -> int:
        """S_local, the samples that are evaluated here."""
        return len(self.ids)

    # -------------------------------------------------------------------------------------------------------- rows

    def is_folded(self, x: Tensor) -> bool:
        """Whether a layer's input has rows for every sample already; False: B rows that all samples share.

        Raises:
            ValueError: If it is neither.
        """
        rows = len(x)
        if self.expanded:
            if rows % self.samples == 0:
                return True
        elif rows in (self.samples * self.batch, self.batch):
            return rows == self.samples * self.batch
        raise ValueError(
            f"an input of {rows} rows is neither the batch of {self.batch} items nor {self.samples} samples of it; if "
            "the network changes the number of rows, set model.expand_input=true"
        )

    def by_sample(self, x: Tensor) -> Tensor:
        """View folded rows ``(S B, ...)`` as ``(S, B, ...)``."""
        return x.unflatten(0, (self.samples, len(x) // self.samples))

    # -------------------------------------------------------------------------------------------------- random numbers

    def noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers for each sample, ``(S, *shape)``, with the type and device of ``like``."""
        return self._drawn(self.stream, tuple(shape), like, lambda t, g: t.normal_(generator=g), torch.neg)

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Numbers in [0, 1) for each sample, ``(S, *shape)``; an antithetic one is 1 - u."""
        stream = mix64(self.stream, Stream.DROPOUT)
        return self._drawn(stream, tuple(shape), like, lambda t, g: t.uniform_(generator=g), lambda u: 1 - u)

    def item_noise(self, shape: Sequence[int], like: Tensor, rows: int | None = None) -> Tensor:
        """Standard normal numbers for each sample and row, ``(S, rows, *shape)``; every item has rows / B rows."""
        return self._of_items(shape, like, rows, lambda t, g: t.normal_(generator=g), torch.neg)

    def item_uniform(self, shape: Sequence[int], like: Tensor, rows: int | None = None) -> Tensor:
        """Numbers in [0, 1) for each sample and row, ``(S, rows, *shape)``; an antithetic one is 1 - u."""
        return self._of_items(shape, like, rows, lambda t, g: t.uniform_(generator=g), lambda u: 1 - u)

    def item_signs(self, shape: Sequence[int], like: Tensor, rows: int | None = None) -> Tensor:
        """-1 or 1 for each sample and row, ``(S, rows, *shape)``; antithetic samples have the same."""

        def draw(t: Tensor, generator: torch.Generator) -> Tensor:
            return t.random_(0, 2, generator=generator).mul_(2).sub_(1)

        return self._of_items(shape, like, rows, draw, lambda signs: signs)

    def _of_items(
        self,
        shape: Sequence[int],
        like: Tensor,
        rows: int | None,
        draw: Callable[[Tensor, torch.Generator], Tensor],
        opposite: Callable[[Tensor], Tensor],
    ) -> Tensor:
        each, rest = divmod(self.batch if rows is None else rows, self.batch)
        if rest:
            raise ValueError(f"{rows} rows of each sample are no multiple of the {self.batch} items of the batch")
        place, size = self.rows if self.noise_mode == "counter" else (0, 1)
        stream = mix64(self.stream, Stream.ITEMS, self.part)
        drawn = self._drawn(stream, (size * self.batch, each, *shape), like, draw, opposite)
        return drawn[:, place::size].flatten(1, 2)

    def _drawn(
        self,
        stream: int,
        shape: tuple[int, ...],
        like: Tensor,
        draw: Callable[[Tensor, torch.Generator], Tensor],
        opposite: Callable[[Tensor], Tensor],
    ) -> Tensor:
        dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
        out = torch.empty((self.samples, *shape), dtype=dtype, device=like.device)
        first = out[::2] if self.antithetic else out
        generators = self._seeded(stream, like.device)
        with torch.no_grad():
            if self.noise_mode == "rank":
                if first.is_contiguous():
                    draw(first, generators[0])
                else:
                    first.copy_(draw(torch.empty_like(first), generators[0]))
            else:
                for part, generator in zip(first, generators, strict=True):
                    draw(part, generator)
            if self.antithetic:
                out[1::2] = opposite(first)
        return out.to(like.dtype)

    def _seeded(self, stream: int, device: torch.device) -> list[torch.Generator]:
        """The generators of one purpose, made when they are first asked for."""
        if (stream, device) not in self._generators:
            if self.noise_mode == "rank":
                seeds = [mix64(self.seed, stream, self.step, self.rank, self.ids[0])]
            else:
                drawn = self.ids[::2] if self.antithetic else self.ids
                seeds = [sample_seed(self.seed, stream, self.step, i // 2 if self.antithetic else i) for i in drawn]
            self._generators[stream, device] = [torch.Generator(device).manual_seed(s) for s in seeds]
        return self._generators[stream, device]


def _in_pairs(ids: Sequence[int]) -> bool:
    return len(ids) % 2 == 0 and all(a % 2 == 0 and b == a + 1 for a, b in zip(ids[::2], ids[1::2], strict=True))
