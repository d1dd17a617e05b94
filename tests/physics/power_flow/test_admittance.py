"""Admittances: the closed form, batches, gradients, the sparse matrix, and pandapower's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from physics.power_flow import Equations, Grid, admittances, branch_flows, currents_ka, loadings, ybus, ybus_sparse
from tests.physics.power_flow.grids import F64, embedded, projected, reference, tiny_case


def test_one_branch_by_hand():
    grid = Grid.from_matpower(tiny_case()).replace(g=torch.full((3,), 0.004, dtype=F64))
    y = admittances(grid)
    series, half, a = 1 / (0.02 + 0.2j), 0.5 * (0.004 + 0.05j), 0.98
    assert complex(y.ff[1]) == pytest.approx((series + half) / a**2)
    assert complex(y.ft[1]) == pytest.approx(-series / a) and complex(y.tf[1]) == pytest.approx(-series / a)
    assert complex(y.tt[1]) == pytest.approx(series + half)
    turn = complex(math.cos(math.radians(5)), math.sin(math.radians(5)))
    series = 1 / (0.01 + 0.15j)
    assert complex(y.ft[2]) == pytest.approx(-series * turn)  # -y / conj(a)
    assert complex(y.tf[2]) == pytest.approx(-series / turn)


def test_asymmetric_terms_count_at_the_to_side():
    grid = Grid.from_matpower(tiny_case())
    more = {name: torch.tensor([0.0, value, 0.0], dtype=F64) for name, value in
            (("r_asym", 0.003), ("x_asym", -0.02), ("g_asym", 0.001), ("b_asym", 0.01))}  # fmt: skip
    y, plain = admittances(grid.replace(**more)), admittances(grid)
    assert y.ff[1] == plain.ff[1] and y.ft[1] == plain.ft[1]
    series = 1 / (0.023 + 0.18j)
    assert complex(y.tf[1]) == pytest.approx(-series / 0.98)
    assert complex(y.tt[1]) == pytest.approx(series + 0.5 * (0.001 + 0.06j))


def test_status_takes_the_whole_branch():
    grid = Grid.from_matpower(tiny_case())
    without = admittances(grid, status=torch.tensor([1.0, 0.0, 1.0], dtype=F64))
    assert all(complex(value[1]) == 0 for value in without)
    assert torch.allclose(without.ff[::2], admittances(grid).ff[::2])


def test_matrix_is_symmetric_without_phase_shifters():
    y = ybus(embedded("case118"))
    assert torch.equal(y, y.mT)
    shifted = ybus(Grid.from_matpower(tiny_case()))
    assert not torch.allclose(shifted, shifted.mT)


@pytest.mark.parametrize("name", ["case14", "case118", "case300"])
def test_sparse_and_dense_and_the_equations_agree(name):
    grid = embedded(name)
    dense = ybus(grid)
    assert torch.allclose(ybus_sparse(grid).to_dense(), dense, atol=1e-12, rtol=0)
    eq = Equations(grid)
    again = torch.zeros_like(dense).index_put_((eq.order[eq.rows], eq.order[eq.columns]), eq.y, accumulate=True)
    assert torch.allclose(again, dense, atol=1e-12, rtol=0)
    pairs = {tuple(sorted(pair)) for pair in zip(grid.from_bus.tolist(), grid.to_bus.tolist(), strict=True)}
    assert len(eq.y) == grid.num_buses + 2 * len(pairs)


def test_batches():
    grid = embedded("case14")
    x = grid.x * torch.rand(3, 1, 20, dtype=F64).add(0.5)
    status = (torch.rand(4, 20) < 0.8).double()
    together = ybus(grid, status, x=x)
    assert together.shape == (3, 4, 14, 14)
    one = ybus(grid.replace(x=x[1, 0], status=status[2]))
    assert torch.allclose(together[1, 2], one, atol=1e-13, rtol=0)
    with pytest.raises(TypeError, match="unknown branch parameters ratio"):
        admittances(grid, ratio=x)


def test_gradients():
    grid = Grid.from_matpower(tiny_case())
    names = ("r", "x", "g", "b", "r_asym", "x_asym", "g_asym", "b_asym", "tap", "shift", "status", "b_shunt", "g_shunt")
    values = [getattr(grid, name).clone().requires_grad_() for name in names]
    assert gradcheck(lambda *v: torch.view_as_real(ybus(grid.replace(**dict(zip(names, v, strict=True))))), values)


@pytest.mark.parametrize("name", ["case14", "case118", "case300", "case1354pegase", "case9241pegase"])
def test_product_with_pandapowers_matrix(name):
    """The T-model of transformers included."""
    expected = reference(name)
    grid = Grid.from_pandapower(expected.net)
    product = projected((ybus_sparse(grid) @ torch.from_numpy(expected.probe)[:, None])[:, 0].numpy())
    assert abs(product - expected.product).max() < 1e-13 * expected.largest * grid.num_buses


def test_flows_of_the_case_file():
    """Currents, loadings and losses by hand on one branch, and power that leaves one bus at every end."""
    grid = Grid.from_matpower(tiny_case())
    vm, va = torch.tensor([[1.02], [1.01], [0.95]], dtype=F64), torch.tensor([[0.0], [0.05], [-0.1]], dtype=F64)
    flows, v = branch_flows(grid, vm, va), torch.polar(vm, va)[:, 0]
    y = admittances(grid)
    current = y.ff[1] * v[1] + y.ft[1] * v[2]
    assert torch.allclose(flows.i_from[1, 0], current)
    assert torch.allclose(flows.s_from[1, 0], v[1] * current.conj())
    total = torch.zeros(3, 1, dtype=torch.complex128).index_add(0, grid.from_bus, flows.s_from)
    total = total.index_add(0, grid.to_bus, flows.s_to) + (vm**2) * torch.complex(grid.g_shunt, -grid.b_shunt)[:, None]
    assert torch.allclose(total[:, 0], v * (ybus(grid) @ v).conj())
    at_from, _ = currents_ka(grid, flows)
    assert float(at_from[1]) == pytest.approx(
        float(flows.s_from[1].abs()) * 100 / (math.sqrt(3) * 1.01 * 110), rel=1e-12
    )
    largest = max(float(flows.i_from[1].abs()), float(flows.i_to[1].abs()))
    assert float(loadings(grid, flows)[1]) == pytest.approx(largest * 100 / 120)
    assert math.isnan(float(loadings(grid, flows)[2]))  # no limit
    largest = max(float(flows.s_from[1].abs()), float(flows.s_to[1].abs()))
    assert float(loadings(grid, flows, of="power")[1]) == pytest.approx(largest * 100 / 120)
    with pytest.raises(ValueError, match="choose 'current' or 'power'"):
        loadings(grid, flows, of="heat")
    assert bool((flows.losses.real > 0).all())


def test_outages_and_parameters_of_flows():
    grid = embedded("case14")
    vm, va = 1 + 0.05 * torch.rand(14, 2, dtype=F64), 0.1 * torch.rand(14, 2, dtype=F64)
    status = grid.status[:, None].repeat(1, 2)
    status[3, 1] = 0
    x = torch.stack([grid.x, 2 * grid.x])
    flows = branch_flows(grid, vm, va, status, x=x)
    assert flows.s_from[3, 1] == 0 and flows.s_from[3, 0] != 0
    one = branch_flows(grid.replace(x=2 * grid.x, status=status[:, 1]), vm[:, 1:], va[:, 1:])
    assert torch.allclose(flows.s_to[:, 1:], one.s_to)
