"""The ReCycle network: a small encoder-decoder Transformer on day tokens (ReCycle, section III and figure 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from networks.recycle.residual import NUM_CALENDAR_FEATURES, CycleTokens, LinearSkip, QuantileHead, ResidualCycles

Positions = Literal["none", "learned"]


class ReCycleTransformer(ResidualCycles):
    """Forecast = profile + Transformer(residual history, profile and calendar of the days to come) [+ linear skip].

    Encoder tokens ``e_j = W_e [r_j; m_j] + b_e``, decoder tokens ``q_f = W_d [P_f; m_f] + b_d``, all days decoded in
    one pass without masks, residual forecast ``g_f = W_o y_f + b_o``. The Transformer is torch's: post-norm, ReLU, a
    final LayerNorm on either stack, Xavier-uniform matrices. The defaults of the sizes are the paper's (28,632
    parameters); ``zero_init`` is ours: the untrained network is exactly the profile forecast, and training can only
    leave it where the loss says so.

    Args:
        history_length: L, steps before the origin; a multiple of ``cycle_length``.
        horizon: T, steps to forecast.
        cycle_length: D, steps per day.
        d_model: Width *per head*, as in the paper's code; the tokens are ``d_model * heads`` wide.
        heads: Attention heads.
        feed_forward: Hidden width of the feed-forward blocks.
        encoder_layers: Layers over the history days.
        decoder_layers: Layers over the forecast days.
        dropout: Before the embeddings and the output map, inside the Transformer, and on the input of the linear path.
        positions: ``learned`` adds a vector per day to the embeddings; without it (``none``, the paper) the encoder
            cannot tell the first Monday from the third.
        residual_input: Whether the history is given as deviation from its profile.
        residual_forecast: Whether the profile is added to the output.
        zero_init: Whether the output map starts at zero.
        window_scale: Whether residuals are measured in standard deviations of their own window.
        linear_skip: Whether a linear map of the residual history is added to the residual forecast.
        skip_rank: Terms of the separable linear path (see :class:`LinearSkip`); None for the unrestricted map.
        ridge: Weight of the penalty on the squared weights of the linear path, see :meth:`penalty`.
        profile_bank: Depths k of further profiles that the decoder sees: means of the last k days of the same type
            *within the history window*, as deviation from the profile. Series differ in the depth that suits them;
            with a bank the network chooses. Needs ``calendar``.
        profile_level: Whether the decoder sees the profile itself. If not, it sees only the shape, the profile minus
            its mean over the horizon: then a forecast does not depend on a level outside the range of the training
            part, which the absolute profile would carry into the network.
        quantiles: Q, number of quantiles, ascending in the output; 1 is a point forecast.
        calendar: Whether weekday and holidays are part of the tokens.
        past_covariates: P, number of covariates known up to the origin.
        known_covariates: K, number of covariates known over the horizon as well.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        cycle_length: int,
        d_model: int = 32,
        heads: int = 1,
        feed_forward: int = 96,
        encoder_layers: int = 1,
        decoder_layers: int = 1,
        dropout: float = 0.0,
        positions: Positions = "none",
        residual_input: bool = True,
        residual_forecast: bool = True,
        zero_init: bool = True,
        window_scale: bool = False,
        linear_skip: bool = False,
        skip_rank: int | None = None,
        ridge: float = 0.0,
        profile_bank: Sequence[int] = (),
        profile_level: bool = True,
        quantiles: int = 1,
        calendar: bool = True,
        past_covariates: int = 0,
        known_covariates: int = 0,
    ) -> None:
        super().__init__(
            history_length,
            horizon,
            cycle_length,
            residual_input=residual_input,
            residual_forecast=residual_forecast,
            window_scale=window_scale,
            quantiles=quantiles,
        )
        if positions not in get_args(Positions):
            raise ValueError(f"net.positions={positions!r} is unknown; choose one of {', '.join(get_args(Positions))}.")
        if any(depth < 1 for depth in profile_bank):
            raise ValueError(f"net.profile_bank={list(profile_bank)} has a depth below 1; give numbers of days.")
        if profile_bank and not calendar:
            raise ValueError("net.profile_bank needs the day types; set net.calendar=true or net.profile_bank=[].")
        if ridge < 0:
            raise ValueError(f"net.ridge={ridge} rewards large weights; give 0 or more.")
        self.calendar = calendar
        self.past_covariates = past_covariates
        self.known_covariates = known_covariates
        self.profile_bank = tuple(profile_bank)
        self.profile_level = profile_level
        self.ridge = ridge

        width = d_model * heads
        features = NUM_CALENDAR_FEATURES if calendar else 0
        history_width = cycle_length * (1 + past_covariates + known_covariates) + features
        forecast_width = cycle_length * (1 + len(self.profile_bank) + known_covariates) + features
        self.history_embedding = _embedding(history_width, width, dropout)
        self.forecast_embedding = _embedding(forecast_width, width, dropout)
        self.history_positions = self.forecast_positions = None
        if positions == "learned":
            self.history_positions = nn.Parameter(0.02 * torch.randn(self.history_cycles, width))
            self.forecast_positions = nn.Parameter(0.02 * torch.randn(self.forecast_cycles, width))
        self.transformer = _transformer(width, heads, feed_forward, encoder_layers, decoder_layers, dropout)
        self.head = QuantileHead(width, cycle_length, quantiles, dropout, zero_init)
        self.skip = None
        if linear_skip:
            self.skip = LinearSkip(self.history_cycles, self.forecast_cycles, cycle_length, skip_rank, dropout)

    def residual_forecast_of(self, tokens: CycleTokens, batch: Mapping[str, Tensor]) -> Tensor:
        """Residual forecast g of every day, (b, F, D, Q)."""
        encoder = self.history_embedding(self._history_tokens(tokens, batch))
        decoder = self.forecast_embedding(self._forecast_tokens(tokens, batch))
        if self.history_positions is not None:
            encoder = encoder + self.history_positions
            decoder = decoder + self.forecast_positions
        residual = self.head(self.transformer(encoder, decoder))
        return residual if self.skip is None else residual + self.skip(tokens.history).unsqueeze(-1)

    def penalty(self) -> Tensor:
        """Ridge penalty of the linear path, to be added to the loss; zero when there is none."""
        if self.skip is None or self.ridge == 0:
            return torch.zeros((), device=self.transformer.encoder.norm.weight.device)
        return self.ridge * self.skip.sum_of_squares()

    def _history_tokens(self, tokens: CycleTokens, batch: Mapping[str, Tensor]) -> Tensor:
        parts = [tokens.history]
        if self.past_covariates + self.known_covariates:
            parts.append(self.cycles.fold_shared(batch["history_covariates"], batch["history"].shape[2]))
        if self.calendar:
            parts.append(tokens.history_calendar)
        return torch.cat(parts, dim=-1)

    def _shape_of(self, profile: Tensor) -> Tensor:
        return self.cycles.fold(profile - profile.mean(dim=1, keepdim=True))

    def _forecast_tokens(self, tokens: CycleTokens, batch: Mapping[str, Tensor]) -> Tensor:
        parts = [tokens.profile if self.profile_level else self._shape_of(batch["forecast_profile"])]
        if self.profile_bank:
            parts.append(profile_bank(tokens, self.profile_bank))
        if self.known_covariates:
            parts.append(self.cycles.fold_shared(batch["forecast_covariates"], batch["history"].shape[2]))
        if self.calendar:
            parts.append(tokens.forecast_calendar)
        return torch.cat(parts, dim=-1)


def profile_bank(tokens: CycleTokens, depths: Sequence[int]) -> Tensor:
    """Means of the last k history tokens of the same day type as each forecast token, for several k.

    Returns:
        Deviations from the profile, (b, F, len(depths) * D); zero where the window has no day of the type.
    """
    same = _day_type(tokens.forecast_calendar).unsqueeze(2) == _day_type(tokens.history_calendar).unsqueeze(1)
    recency = same.flip(2).cumsum(2).flip(2)  # 1 for the latest day of the type, 2 for the one before it, ...
    means = []
    for depth in depths:
        chosen = (same & (recency <= depth)).to(tokens.history.dtype)
        means.append(chosen @ tokens.history / chosen.sum(2, keepdim=True).clamp(min=1))
    return torch.cat(means, dim=-1)


def _day_type(calendar: Tensor) -> Tensor:
    """0 working day, 1 Saturday, 2 Sunday or holiday, from calendar vectors (..., 9)."""
    saturday, sunday, holiday = calendar[..., 5] > 0.5, calendar[..., 6] > 0.5, calendar[..., 7] > 0.5
    return torch.where(holiday | sunday, 2, saturday.to(torch.int64))


def _embedding(tokens_width: int, width: int, dropout: float) -> nn.Module:
    """Dropout and linear map; the map is left out where the widths agree, as in the paper's code."""
    projection = nn.Identity() if tokens_width == width else nn.Linear(tokens_width, width)
    return nn.Sequential(nn.Dropout(dropout), projection)


def _transformer(
    width: int, heads: int, feed_forward: int, encoder_layers: int, decoder_layers: int, dropout: float
) -> nn.Transformer:
    """``nn.Transformer`` without the nested-tensor path, which only serves padding masks and warns for odd heads."""
    layer = nn.TransformerEncoderLayer(width, heads, feed_forward, dropout, batch_first=True)
    encoder = nn.TransformerEncoder(layer, encoder_layers, nn.LayerNorm(width), enable_nested_tensor=False)
    return nn.Transformer(
        width,
        heads,
        num_decoder_layers=decoder_layers,
        dim_feedforward=feed_forward,
        dropout=dropout,
        custom_encoder=encoder,
        batch_first=True,
    )
