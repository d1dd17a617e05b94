"""Ticket files: they come back as they were, fit or say why not, and are read across kinds of networks."""

from __future__ import annotations

import pytest
import torch

from networks.lottery.tickets import (
    Ticket,
    apply_ticket,
    find_tickets,
    load_ticket,
    means,
    mismatches,
    save_ticket,
    select_ticket,
    ticket_path,
)
from networks.masks import install_masks, masked_weights, masks_of
from networks.mlp import MLP


def network(seed: int = 0, hidden: tuple[int, ...] = (12, 8)) -> MLP:
    torch.manual_seed(seed)
    net = MLP(hidden=hidden)
    install_masks(net)
    return net


def ticket(level: int = 3, seed: int = 0) -> Ticket:
    net = network(seed)
    masks = {n: torch.rand(m.shape) < 0.5 for n, m in masks_of(masked_weights(net)).items()}
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("_mask")}
    trained = {name: value + 1 for name, value in state.items()}
    return Ticket(masks, state, trained, None, {"level": level, "metrics": {"val/accuracy": 0.5}})


def test_a_file_comes_back(tmp_path):
    path = ticket_path(tmp_path / "tickets", 3)
    one = ticket()
    save_ticket(path, one)
    assert [p.name for p in path.parent.iterdir()] == ["level_03.pt"]
    other = load_ticket(path)
    assert other.level == 3 and other.about == one.about and other.best is None and not other.bayesian
    for kind in ("masks", "initial", "trained"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    with pytest.raises(ValueError, match="holds no 'best' weights"):
        other.state("best")


def test_masks_take_a_bit_per_weight(tmp_path):
    shape = (512, 512)
    big = Ticket({"w": torch.ones(shape, dtype=torch.bool)}, {})
    save_ticket(tmp_path / "level_00.pt", big)
    assert (tmp_path / "level_00.pt").stat().st_size < 512 * 512 / 8 + 4000


def test_finding_tickets(tmp_path):
    for level in (0, 1, 11):
        save_ticket(ticket_path(tmp_path / "tickets", level), ticket(level))
    (tmp_path / "tickets" / "notes.txt").touch()
    for place in (tmp_path, tmp_path / "tickets"):
        assert list(find_tickets(place)) == [0, 1, 11]
    file = tmp_path / "tickets" / "level_11.pt"
    assert find_tickets(file) == {11: file} and select_ticket(tmp_path, None) == file
    with pytest.raises(ValueError, match=r"model\.level=7: .* has the levels 0, 1, 11"):
        select_ticket(tmp_path, 7)
    with pytest.raises(FileNotFoundError, match="no tickets in"):
        find_tickets(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no ticket"):
        load_ticket(tmp_path / "level_99.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is no ticket"):
        load_ticket(tmp_path / "other.ckpt")


def test_applying(tmp_path):
    one, net = ticket(), network(seed=5)
    apply_ticket(net, one, "trained")
    state = net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in one.trained.items())
    assert all(torch.equal(w.mask, one.masks[w.name]) for w in masked_weights(net))


def test_every_mismatch_is_named():
    net = network(hidden=(12, 9))
    net.layers[0].bias = None
    found = "\n".join(mismatches(ticket(), net))
    for words in ("layers.1.weight has shape [9, 12], in the ticket [8, 12]", "layers.1.bias", "layers.2.weight"):
        assert words in found
    assert "the ticket has layers.0.bias, which this network lacks" in found
    with pytest.raises(ValueError, match="the ticket does not fit the network: "):
        apply_ticket(net, ticket())
    deeper = "\n".join(mismatches(ticket(), network(hidden=(12, 8, 8))))
    assert "layers.2.weight may be pruned here, the ticket has no mask for it" in deeper
    shallow = "\n".join(mismatches(ticket(), network(hidden=(12,))))
    assert "the ticket has a mask for layers.1.weight" in shallow


def test_means_have_the_names_of_ordinary_weights():
    one = torch.zeros(1)
    state = {"a.weight_mu": one, "a.weight_log_sigma": one, "a.weight_mask": one, "bn.weight": one}
    assert set(means(state)) == {"a.weight", "bn.weight"}
