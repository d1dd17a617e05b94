from __future__ import annotations

import numpy as np
import pytest
from scipy.special import assoc_legendre_p

from physics.shallow_water.legendre import gaussian_latitudes, legendre_functions


def test_functions_are_those_of_scipy():
    mu = np.linspace(-0.97, 0.97, 23)
    p, h = legendre_functions(12, mu)
    for m in range(13):
        for degree in range(m, 13):
            # scipy has the phase (-1)^m
            value, slope = assoc_legendre_p(degree, m, mu, norm=True, diff_n=1)
            assert np.allclose(p[m, degree], (-1) ** m * value, atol=1e-12)
            assert np.allclose(h[m, degree], (-1) ** m * slope * (1 - mu**2), atol=1e-11)
        assert (p[m, :m] == 0).all() and (h[m, :m] == 0).all()


def test_functions_are_orthonormal():
    mu, weights = gaussian_latitudes(32)
    assert mu[0] > mu[-1] and weights.sum() == pytest.approx(2, abs=1e-14)
    p, _ = legendre_functions(21, mu)
    for m in (0, 1, 7, 21):
        products = np.einsum("lj,kj,j->lk", p[m], p[m], weights)
        assert np.allclose(products[m:, m:], np.eye(22 - m), atol=1e-13)


def test_one_latitude_is_refused():
    with pytest.raises(ValueError, match="height=1"):
        gaussian_latitudes(1)
