"""FEDformer with Fourier blocks (Zhou et al., ICML 2022; pruning study, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from networks.pruning.groups import DimGroup, Slice, columns, rows
from networks.series.attention import head_width, refuse_reference_layout
from networks.series.autoformer import DecompositionForecaster
from networks.series.decomposition import SeriesDecomposition
from networks.series.embedding import resolve_label_length
from networks.series.spectrum import complex_weights, spectrum_of


def choose_frequencies(length: int, modes: int, mode_select: Literal["random", "lowest"] = "random") -> Tensor:
    """Sorted indices of min(modes, length // 2) frequencies below length // 2, drawn by the global generator."""
    if mode_select not in ("random", "lowest"):
        raise ValueError(f"mode_select={mode_select!r} is unknown: choose 'random' or 'lowest'")
    if length < 2 or modes < 1:
        raise ValueError(f"modes={modes} of a series of {length} steps: FEDformer needs one mode and two steps or more")
    candidates = torch.randperm(length // 2) if mode_select == "random" else torch.arange(length // 2)
    return candidates[:modes].sort().values


def fourier_kernel(heads: int, width: int, modes: int) -> nn.Parameter:
    """Complex weights as pairs of real numbers (heads, modes, in, out, 2), uniform in [0, 1 / (heads * width)^2).

    Pairs, because ``module.to(float64 or bfloat16)`` drops the imaginary part of a complex parameter. The matrices of
    one frequency are contiguous: (heads, in, out, modes) costs 1.3 to 1.6 times the time forward and backward.
    """
    return nn.Parameter(torch.rand(heads, modes, width, width, 2) / (heads * width) ** 2)


class FourierBlock(nn.Module):
    """Multiplies chosen frequencies of a series by learned matrices, one per head and frequency; drops the others.

    Args:
        frequencies: indices of the kept frequencies (modes,). They are part of the model and of its checkpoint.
        heads: number of heads.
        width: width E of a head.
        slot_bug: reproduce the reference, which writes the i-th kept frequency into slot i of the output.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, heads: int, width: int, *, slot_bug: bool = False) -> None:
        super().__init__()
        self.slot_bug = slot_bug
        self.register_buffer("frequencies", frequencies)
        self.kernel = fourier_kernel(heads, width, len(frequencies))

    def forward(self, series: Tensor) -> Tensor:
        """(batch, time, heads, E) -> (batch, time, heads, E')."""
        length = series.shape[1]
        kept = spectrum_of(series)[:, self.frequencies]
        mixed = torch.einsum("bmhi,hmio->bmho", kept, complex_weights(self.kernel))
        slots = torch.arange(len(self.frequencies), device=mixed.device) if self.slot_bug else self.frequencies
        return from_modes(mixed, slots, length).to(series.dtype)


class FourierCrossAttention(nn.Module):
    """Attention between the chosen frequencies of queries and keys.

    With query modes q_m and key modes k_n: o_m = sum_n tanh(q_m . k_n) k_n per head (complex tanh, no conjugation),
    times a learned matrix per head and query mode. As in the reference the keys take the place of the values.

    Args:
        query_frequencies: kept frequencies of the queries (modes,).
        key_frequencies: kept frequencies of the keys.
        heads: number of heads.
        width: width E of a head; 1 / (heads * E)^2 scales the output.
    """

    query_frequencies: Tensor
    key_frequencies: Tensor

    def __init__(self, query_frequencies: Tensor, key_frequencies: Tensor, heads: int, width: int) -> None:
        super().__init__()
        self.scale = (heads * width) ** -2
        self.register_buffer("query_frequencies", query_frequencies)
        self.register_buffer("key_frequencies", key_frequencies)
        self.kernel = fourier_kernel(heads, width, len(query_frequencies))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(batch, L_Q, heads, E), (batch, L_K, heads, E) -> (batch, L_Q, heads, E')."""
        query_modes = spectrum_of(queries)[:, self.query_frequencies]
        key_modes = spectrum_of(keys)[:, self.key_frequencies]
        attention = torch.einsum("bmhe,bnhe->bhmn", query_modes, key_modes).tanh()
        attended = torch.einsum("bhmn,bnhe->bmhe", attention, key_modes)
        mixed = torch.einsum("bmhi,hmio->bmho", attended, complex_weights(self.kernel)) * self.scale
        return from_modes(mixed, self.query_frequencies, queries.shape[1]).to(queries.dtype)


def from_modes(modes: Tensor, slots: Tensor, length: int) -> Tensor:
    """Inverse FFT over time of (batch, modes, ...) placed at the frequencies ``slots``, zeros elsewhere."""
    spectrum = modes.new_zeros(modes.shape[0], length // 2 + 1, *modes.shape[2:])
    spectrum[:, slots] = modes
    return torch.fft.irfft(spectrum, n=length, dim=1)


class FourierLayer(nn.Module):
    """Projections around a Fourier block (self-attention) or a Fourier cross-attention.

    Args:
        block: `FourierBlock` or `FourierCrossAttention`; may be shared by several layers.
        d_model: width of the residual stream.
        heads: number of heads.
        cross: attend to a memory.
        unused_projections: keep the projections that the reference allocates although nothing reads them (keys and
            values of self-attention, values of cross-attention), frozen.
        reference_layout: reproduce the reference, which reads its (batch, heads, width, time) result as
            (batch, time, heads * width) and so mixes steps and heads before the output projection.
    """

    def __init__(
        self,
        block: nn.Module,
        d_model: int,
        heads: int,
        *,
        cross: bool = False,
        unused_projections: bool = True,
        reference_layout: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_width(d_model, heads)
        self.heads = heads
        self.reference_layout = reference_layout
        self.block = block
        self.query_projection = nn.Linear(d_model, inner)
        self.key_projection = nn.Linear(d_model, inner) if cross or unused_projections else None
        self.value_projection = nn.Linear(d_model, inner) if unused_projections else None
        self.out_projection = nn.Linear(inner, d_model)
        for projection in (None if cross else self.key_projection, self.value_projection):
            if projection is not None:
                projection.requires_grad_(False)

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        """Transform (batch, time, d_model), given memory (batch, encoder time, d_model) in cross-attention."""
        queries = self.query_projection(tokens).unflatten(-1, (self.heads, -1))
        if memory is None:
            mixed = self.block(queries)
        else:
            mixed = self.block(queries, self.key_projection(memory).unflatten(-1, (self.heads, -1)))
        if self.reference_layout:
            mixed = mixed.permute(0, 2, 3, 1).reshape(mixed.shape)
        return self.out_projection(mixed.flatten(-2))

    def reads(self) -> list[Slice]:
        """Channels of the stream that the queries come from and the output goes to."""
        return columns(self.query_projection) + rows(self.out_projection)

    def remembers(self) -> list[Slice]:
        """Channels of the stream that keys and values come from, which in self-attention nobody reads."""
        projections = (self.key_projection, self.value_projection)
        return [part for projection in projections if projection is not None for part in columns(projection)]


class FEDformer(DecompositionForecaster):
    """Autoformer's frame with attention in the frequency domain.

    The frequencies of each block are drawn once, at construction, and stored as buffers. All encoder layers share one
    Fourier block, all decoder layers one for self-attention and one for cross-attention.
    The defaults are the pruning study's (22,070,295 real numbers with 7 channels, 96 -> 96; 11,534,336 of them are the
    pairs of the complex kernels).

    Args:
        history_length: steps of the input n_in.
        horizon: steps of the forecast n_out.
        channels: series c.
        marks: calendar features per step m, 0 for none.
        label_length: steps of the history repeated in the decoder input, None for half of the history.
        d_model: width of the residual stream.
        heads: heads of the Fourier blocks.
        feed_forward: hidden width f.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        dropout: dropout of embeddings and residual branches.
        moving_average: window of the decompositions, or a list of windows mixed by learned gates.
        modes: at most this many frequencies are kept per block.
        mode_select: ``random`` or ``lowest`` frequencies.
        fedformer_slot_bug: reproduce the reference, whose self-attention writes the i-th kept frequency into slot i
            of the output instead of its own.
        reference_layout: reproduce the reference's mixing of steps and heads (see `FourierLayer`); None follows
            ``fedformer_slot_bug``, so that this one switch gives the reference's network.
        unused_projections: keep the reference's projections that nothing reads (frozen): the study counts and prunes
            them. False saves 1,838,592 numbers at the defaults and changes no forecast.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        marks: int = 4,
        label_length: int | None = None,
        d_model: int = 512,
        heads: int = 8,
        feed_forward: int = 2048,
        encoder_layers: int = 2,
        decoder_layers: int = 1,
        dropout: float = 0.05,
        moving_average: int | Sequence[int] = (24,),
        modes: int = 64,
        mode_select: Literal["random", "lowest"] = "random",
        fedformer_slot_bug: bool = False,
        reference_layout: bool | None = None,
        unused_projections: bool = True,
    ) -> None:
        label_length = resolve_label_length(label_length, history_length)
        decoder_length = label_length + horizon
        width = head_width(d_model, heads)
        scrambled = fedformer_slot_bug if reference_layout is None else reference_layout

        def layer(block: nn.Module, *, cross: bool = False) -> FourierLayer:
            return FourierLayer(
                block,
                d_model,
                heads,
                cross=cross,
                unused_projections=unused_projections,
                reference_layout=scrambled,
            )

        def block(length: int) -> FourierBlock:
            return FourierBlock(
                choose_frequencies(length, modes, mode_select), heads, width, slot_bug=fedformer_slot_bug
            )

        encoder_block, decoder_block = block(history_length), block(decoder_length)
        cross_block = FourierCrossAttention(
            choose_frequencies(decoder_length, modes, mode_select),
            choose_frequencies(history_length, modes, mode_select),
            heads,
            width,
        )
        super().__init__(
            [layer(encoder_block) for _ in range(encoder_layers)],
            [(layer(decoder_block), layer(cross_block, cross=True)) for _ in range(decoder_layers)],
            SeriesDecomposition(history_length, moving_average),
            history_length=history_length,
            horizon=horizon,
            channels=channels,
            marks=marks,
            label_length=label_length,
            d_model=d_model,
            feed_forward=feed_forward,
            dropout=dropout,
            moving_average=moving_average,
        )

    @override
    def attention_groups(self) -> list[DimGroup]:
        """Groups of every Fourier block with all layers that share it.

        The kernel's inputs follow the queries (and keys), its outputs the columns of the output projection; channels of
        the projections that nothing reads go along.
        """
        encoder = [layer.attention for layer in self.encoder.layers]
        decoder = [layer.self_attention for layer in self.decoder.layers]
        cross = [layer.cross_attention for layer in self.decoder.layers]
        groups = []
        for name, layers in (("encoder", encoder), ("decoder.self", decoder), ("decoder.cross", cross)):
            if layers:
                groups += _fourier_groups(f"{name}_attention", layers)
        return groups


def _fourier_groups(name: str, layers: Sequence[FourierLayer]) -> list[DimGroup]:
    first = layers[0]
    refuse_reference_layout(first)
    heads, _, width, out_width, _ = first.block.kernel.shape
    inputs = [Slice(first.block, "kernel", 2, heads_axis=0)]
    outputs = [Slice(first.block, "kernel", 3, heads_axis=0)]
    for layer in layers:
        inputs += rows(layer.query_projection)
        outputs += columns(layer.out_projection)
        if layer.key_projection is not None:
            inputs += rows(layer.key_projection)
        if layer.value_projection is not None:
            outputs += rows(layer.value_projection)
    return [
        DimGroup(f"{name}.qk", "qk", width, inputs, heads, list(layers)),
        DimGroup(f"{name}.v", "v", out_width, outputs, heads, list(layers)),
    ]
