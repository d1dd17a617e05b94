from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from networks.series.fedformer import FEDformer, FourierBlock, FourierCrossAttention, choose_frequencies
from tests.networks.series.contract import SMALL, BackboneContract, inputs, real_numbers


class TestFEDformer(BackboneContract):
    network = FEDformer
    sizes: ClassVar[dict[str, Any]] = {**SMALL, "moving_average": (5, 8), "modes": 6}
    zero_gradient = ("encoder.norm.norm.bias", "decoder.norm.norm.bias")


class TestReference(BackboneContract):
    """The reference's network, defects included."""

    network = FEDformer
    sizes: ClassVar[dict[str, Any]] = {**SMALL, "modes": 6, "fedformer_slot_bug": True}
    zero_gradient = ("encoder.norm.norm.bias", "decoder.norm.norm.bias")


def identity(block: FourierBlock) -> FourierBlock:
    block.kernel.data.zero_()
    block.kernel.data[..., 0] = torch.eye(block.kernel.shape[2])
    return block


def test_parameters_of_the_study() -> None:
    with torch.device("meta"):
        network = FEDformer(history_length=96, horizon=96, channels=7, label_length=48)
    assert real_numbers(network) == 22_070_295
    kernels = {id(p): p for n, p in network.named_parameters() if n.endswith("kernel")}
    assert sum(p.numel() for p in kernels.values()) == 2 * 5_767_168


def test_unused_projections_change_the_count_but_not_the_forecast() -> None:
    with torch.device("meta"):
        assert real_numbers(FEDformer(96, 96, 7, unused_projections=False)) == 22_070_295 - 1_838_592
    full = FEDformer(24, 12, 5, **SMALL).eval()
    lean = FEDformer(24, 12, 5, unused_projections=False, **SMALL).eval()
    lean.load_state_dict({k: v for k, v in full.state_dict().items() if k in lean.state_dict()})
    assert torch.equal(full(*inputs()), lean(*inputs()))


@pytest.mark.parametrize("length", [20, 21])
def test_all_modes_and_identity_weights_are_the_identity(length: int) -> None:
    block = identity(FourierBlock(torch.arange(length // 2 + 1), heads=2, width=3))
    series = torch.randn(2, length, 2, 3)
    torch.testing.assert_close(block(series), series)


def test_modes_keep_their_frequency_unless_the_reference_is_reproduced() -> None:
    """A sine of 7 cycles stays one; the reference turns it into the slot of mode 7, here 1 cycle."""
    time = torch.arange(40, dtype=torch.float32)
    series = torch.sin(2 * torch.pi * 7 * time / 40).reshape(1, 40, 1, 1)
    frequencies = torch.tensor([3, 7])
    right = identity(FourierBlock(frequencies, 1, 1))(series)
    wrong = identity(FourierBlock(frequencies, 1, 1, slot_bug=True))(series)
    torch.testing.assert_close(right, series, rtol=0, atol=1e-5)
    torch.testing.assert_close(wrong.flatten(), torch.sin(2 * torch.pi * time / 40), rtol=0, atol=1e-5)


@pytest.mark.parametrize("slot_bug", [True, False])
def test_fourier_block_follows_the_definition(slot_bug: bool) -> None:
    torch.manual_seed(0)
    series = torch.randn(2, 21, 2, 3, dtype=torch.float64)
    block = FourierBlock(choose_frequencies(21, 4), 2, 3, slot_bug=slot_bug).double()
    spectrum = torch.fft.rfft(series, dim=1)
    out = torch.zeros_like(spectrum)
    for slot, frequency in enumerate(block.frequencies.tolist()):
        for h in range(2):
            weight = torch.complex(*block.kernel[h, slot].unbind(-1))
            out[:, slot if slot_bug else frequency, h] = spectrum[:, frequency, h] @ weight
    torch.testing.assert_close(block(series), torch.fft.irfft(out, n=21, dim=1))


def test_cross_attention_follows_the_definition() -> None:
    torch.manual_seed(0)
    queries = torch.randn(2, 18, 2, 3, dtype=torch.float64)
    keys = torch.randn(2, 25, 2, 3, dtype=torch.float64)
    layer = FourierCrossAttention(choose_frequencies(18, 5), choose_frequencies(25, 4), 2, 3).double()
    out = torch.zeros(2, 10, 2, 3, dtype=torch.complex128)
    query_modes, key_modes = torch.fft.rfft(queries, dim=1), torch.fft.rfft(keys, dim=1)
    for b in range(2):
        for h in range(2):
            for m, frequency in enumerate(layer.query_frequencies.tolist()):
                attended = sum(
                    torch.tanh((query_modes[b, frequency, h] * key_modes[b, n, h]).sum()) * key_modes[b, n, h]
                    for n in layer.key_frequencies.tolist()
                )
                out[b, frequency, h] = attended @ torch.complex(*layer.kernel[h, m].unbind(-1)) / 36
    torch.testing.assert_close(layer(queries, keys), torch.fft.irfft(out, n=18, dim=1))


def test_frequencies_are_a_sorted_random_subset() -> None:
    torch.manual_seed(0)
    first, second = choose_frequencies(144, 64), choose_frequencies(144, 64)
    assert not torch.equal(first, second)
    assert len(first.unique()) == 64
    assert (first.diff() > 0).all()
    assert first.max() < 72
    assert choose_frequencies(96, 64).tolist() == list(range(48))
    assert choose_frequencies(144, 3, "lowest").tolist() == [0, 1, 2]


def test_frequencies_travel_with_the_checkpoint() -> None:
    torch.manual_seed(1)
    network, other = (FEDformer(48, 48, 5, modes=5, **SMALL) for _ in range(2))
    names = [name for name in network.state_dict() if name.endswith("frequencies")]
    assert len({name.rsplit(".", 1)[1] for name in names}) == 3
    assert any(not torch.equal(network.state_dict()[n], other.state_dict()[n]) for n in names)
    other.load_state_dict(network.state_dict())
    assert all(torch.equal(network.state_dict()[n], other.state_dict()[n]) for n in names)


def test_layers_share_their_blocks() -> None:
    network = FEDformer(24, 12, 5, encoder_layers=3, decoder_layers=2, **SMALL)
    assert len({id(layer.attention.block) for layer in network.encoder.layers}) == 1
    assert len({id(layer.self_attention.block) for layer in network.decoder.layers}) == 1
    assert len({id(layer.cross_attention.block) for layer in network.decoder.layers}) == 1


def test_slot_option_implies_the_reference_layout() -> None:
    def layouts(**options: bool) -> set[bool]:
        network = FEDformer(24, 12, 5, **SMALL, **options)
        return {layer.attention.reference_layout for layer in network.encoder.layers}

    assert layouts() == {False}
    assert layouts(fedformer_slot_bug=True) == {True}
    assert layouts(fedformer_slot_bug=True, reference_layout=False) == {False}


@pytest.mark.parametrize(("key", "value"), [("modes", 0), ("mode_select", "best")])
def test_bad_arguments_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}="):
        FEDformer(24, 12, 5, **SMALL, **{key: value})
