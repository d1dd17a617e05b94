"""The week-ahead load forecaster of the energy study: one LSTM layer and a linear map at every step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

NUM_PARAMETERS = 9841
"""Of the published network: 4 * 48 * (1 + 48) + 2 * 4 * 48 + 48 + 1."""


class WeekAheadLSTM(nn.Module):
    """Forecasts the value one window after each step of a window.

    Step j of the output is the forecast of step t + L + j from the inputs t .. t + j (L = length of the window, a week
    in the study): a causal shift, without a decoder. The names of the parameters (``lstm.*``, ``fully_connected.*``)
    are those of the published weights.

    Args:
        hidden_size: Width of the LSTM.
        num_layers: LSTM layers.
        dropout: Between LSTM layers; without effect with one.
        random_cell: Whether every forward pass begins with a cell state from the standard normal distribution, as the
            published code does, so that no forecast can be repeated. False: with zeros.
    """

    def __init__(
        self, hidden_size: int = 48, num_layers: int = 1, dropout: float = 0.0, random_cell: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"model.net.{name}={value}: must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.net.dropout={dropout}: must be at least 0 and below 1")
        self.random_cell = random_cell
        # torch warns of dropout that has no layer to follow.
        between = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(1, hidden_size, num_layers, dropout=between, batch_first=True)
        self.fully_connected = nn.Linear(hidden_size, 1)

    def forward(self, history: Tensor) -> Tensor:
        """Map ``(batch, time, 1)`` to the forecast of the following window, ``(batch, time, 1)``."""
        output, _ = self.lstm(history, self._initial_state(history) if self.random_cell else None)
        return self.fully_connected(output)

    def _initial_state(self, history: Tensor) -> tuple[Tensor, Tensor]:
        hidden = history.new_zeros(self.lstm.num_layers, len(history), self.lstm.hidden_size)
        return hidden, torch.randn_like(hidden)

    def load_published(self, path: str | Path) -> None:
        """Load weights in the layout of the published ``energy_baseline.pt``, or of a checkpoint of this program.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds no weights, or if their names or sizes are not those of this network.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"model.weights={path}: no such file")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on how the file is broken
            # Without torch's message, which advises to load the file unsafely.
            raise ValueError(
                f"model.weights={path} is no file of weights that can be read ({type(error).__name__}): it takes what "
                "torch.save wrote of a state_dict, or a checkpoint of this program"
            ) from error
        state = content.get("state_dict", content) if isinstance(content, dict) else content
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise ValueError(
                f"model.weights={path} holds no weights ({keys}); it takes tensors called lstm.* and "
                "fully_connected.*, or a checkpoint with a state_dict"
            )
        own = self.state_dict()
        state = {str(name).removeprefix("net."): value for name, value in state.items()}
        found = {name: tuple(value.shape) for name, value in state.items() if name.startswith(("lstm.", "fully_con"))}
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if found.keys() != expected.keys() and not any(name.startswith("lstm.") for name in found):
            raise ValueError(
                f"model.weights={path} holds {', '.join(state) or 'nothing'}; the network has {', '.join(own)}"
            )
        if found != expected:
            raise ValueError(
                f"model.weights={path} holds {found}, but the network has {expected}: set model.net.hidden_size and "
                "model.net.num_layers to those of the file"
            )
        self.load_state_dict({name: state[name] for name in own})
