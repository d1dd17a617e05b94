from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.load_lstm import NUM_PARAMETERS, WeekAheadLSTM


def test_size_is_the_published_one():
    net = WeekAheadLSTM()
    assert sum(p.numel() for p in net.parameters()) == NUM_PARAMETERS == 9841
    assert {name.split(".")[0] for name in net.state_dict()} == {"lstm", "fully_connected"}


def test_each_step_forecasts_from_the_inputs_up_to_it():
    """Causal: what comes later changes nothing."""
    torch.manual_seed(0)
    net, history = WeekAheadLSTM().eval(), torch.rand(3, 168, 1)
    changed = history.clone()
    changed[:, 100:] = 0.5
    before, after = net(history), net(changed)
    assert before.shape == history.shape
    assert torch.equal(before[:, :100], after[:, :100])
    assert (before[:, 100:] != after[:, 100:]).any()


def test_two_forecasts_of_one_input_are_identical():
    torch.manual_seed(0)
    net, history = WeekAheadLSTM(), torch.rand(4, 168, 1)
    assert torch.equal(net(history), net(history))
    torch.testing.assert_close(net(history)[:2], net(history[:2]), rtol=0, atol=1e-6)  # whatever shares the batch


def test_random_cell_is_that_of_the_published_code():
    torch.manual_seed(0)
    net, history = WeekAheadLSTM(random_cell=True), torch.rand(4, 168, 1)
    assert not torch.equal(net(history), net(history))
    torch.manual_seed(1)
    got = net(history)
    torch.manual_seed(1)
    state = torch.zeros(1, 4, 48), torch.randn(1, 4, 48)
    torch.testing.assert_close(got, net.fully_connected(net.lstm(history, state)[0]), rtol=0, atol=0)
    other = WeekAheadLSTM()
    other.load_state_dict(net.state_dict())  # the same weights serve both


class Published(nn.Module):
    """The modules of the published code."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 48, num_layers=1, dropout=0, batch_first=True)
        self.fully_connected = nn.Linear(48, 1)


def test_published_weights_load(tmp_path):
    torch.manual_seed(3)
    published, net = Published(), WeekAheadLSTM()
    torch.save(published.state_dict(), tmp_path / "energy_baseline.pt")
    net.load_published(tmp_path / "energy_baseline.pt")
    history = torch.rand(2, 168, 1)
    expected = published.fully_connected(published.lstm(history)[0])
    assert torch.equal(net(history), expected)
    # The weights of a checkpoint of this program are called net.lstm..., beside others.
    state = {f"net.{name}": value for name, value in published.state_dict().items()} | {"other": torch.zeros(2)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "best.ckpt")
    net = WeekAheadLSTM()
    net.load_published(tmp_path / "best.ckpt")
    assert torch.equal(net(history), expected)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(Published().state_dict(), tmp_path / "energy_baseline.pt")
    with pytest.raises(ValueError, match=r"model\.weights=.*hidden_size"):
        WeekAheadLSTM(hidden_size=32).load_published(tmp_path / "energy_baseline.pt")
    with pytest.raises(FileNotFoundError, match=r"model\.weights=.*nowhere"):
        WeekAheadLSTM().load_published(tmp_path / "nowhere.pt")


def write_torn(path):
    torch.save(WeekAheadLSTM().state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("lstm.weight,1.0\n"), "is no file of weights that can be read"),
        (lambda path: path.write_bytes(b""), "is no file of weights that can be read"),
        (write_torn, "is no file of weights that can be read"),
        (lambda path: torch.save(WeekAheadLSTM(), path), r"is no file of weights that can be read \(UnpicklingError\)"),
        (lambda path: torch.save([torch.zeros(2)], path), r"holds no weights \(list\)"),
        (lambda path: torch.save({"epoch": 3, "loss": 0.1}, path), r"holds no weights \(epoch, loss\)"),
        (lambda path: torch.save({"state_dict": None}, path), r"holds no weights \(state_dict\)"),
        (lambda path: torch.save(nn.Linear(2, 1).state_dict(), path), r"holds weight, bias; the network has lstm"),
        (lambda path: torch.save({"state_dict": {}}, path), r"holds nothing; the network has lstm"),
    ],
)
def test_bad_files_of_weights_are_named_with_what_they_hold(tmp_path, write, message):
    path = tmp_path / "w.pt"
    write(path)
    with pytest.raises(ValueError, match=rf"model\.weights=.*w\.pt {message}"):
        WeekAheadLSTM().load_published(path)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 0), ("num_layers", 0), ("dropout", 1.0)])
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=rf"model\.net\.{key}={value}"):
        WeekAheadLSTM(**{key: value})


def test_dropout_needs_a_second_layer(recwarn):
    WeekAheadLSTM(dropout=0.1)
    assert not recwarn.list
    assert WeekAheadLSTM(num_layers=2, dropout=0.1).lstm.dropout == 0.1
