from __future__ import annotations

import torch

from networks.series.normalization import InstanceNormalization, NoNormalization


def test_window_is_standardised_along_time() -> None:
    history = torch.randn(4, 50, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 100.0]) + 7
    normalized, statistics = InstanceNormalization(eps=0.0).normalize(history)
    torch.testing.assert_close(normalized.mean(1), torch.zeros(4, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(normalized.square().mean(1), torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(statistics.location[:, 0], history.mean(1))


def test_affine_is_applied_and_inverted() -> None:
    history = torch.randn(4, 50, 2, dtype=torch.float64) * 3 - 1
    plain, _ = InstanceNormalization().normalize(history)
    normalization = InstanceNormalization(2).double()
    with torch.no_grad():
        normalization.weight.copy_(torch.tensor([2.0, -0.5]))
        normalization.bias.copy_(torch.tensor([0.3, 1.0]))
    normalized, statistics = normalization.normalize(history)
    torch.testing.assert_close(normalized[..., 1], 1.0 - 0.5 * plain[..., 1])
    torch.testing.assert_close(normalization.denormalize(normalized, statistics), history)


def test_no_normalization_is_the_identity() -> None:
    history = torch.randn(2, 5, 3)
    normalization = NoNormalization()
    normalized, statistics = normalization.normalize(history)
    assert normalized is history
    assert normalization.denormalize(history, statistics) is history
