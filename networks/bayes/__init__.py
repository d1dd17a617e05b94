"""Bayesian networks: weights, or dropout masks, of which a forward pass evaluates several samples at once."""

from __future__ import annotations

from networks.bayes.context import Estimator, NoiseMode, SampleContext, current
from networks.bayes.convert import bayesian_layers, has_dropout, to_bayesian, to_deterministic, to_mc_dropout
from networks.bayes.gaussian import Init, Prior, gaussian_kl
from networks.bayes.layers import (
    BayesConv1d,
    BayesConv2d,
    BayesConv3d,
    BayesianLayer,
    BayesLinear,
    MCDropout,
    RandomTensor,
)
from networks.bayes.members import Members, to_ensemble
from networks.bayes.noise import Stream, counter_normal, mix64, sample_seed
from networks.bayes.objectives import (
    data_term,
    elbo,
    gaussian_log_density,
    in_chunks,
    kl_divergence,
    l2_divergence,
    moment_term,
    predictive,
)

__all__ = [
    "BayesConv1d",
    "BayesConv2d",
    "BayesConv3d",
    "BayesLinear",
    "BayesianLayer",
    "Estimator",
    "Init",
    "MCDropout",
    "Members",
    "NoiseMode",
    "Prior",
    "RandomTensor",
    "SampleContext",
    "Stream",
    "bayesian_layers",
    "counter_normal",
    "current",
    "data_term",
    "elbo",
    "gaussian_kl",
    "gaussian_log_density",
    "has_dropout",
    "in_chunks",
    "kl_divergence",
    "l2_divergence",
    "mix64",
    "moment_term",
    "predictive",
    "sample_seed",
    "to_bayesian",
    "to_deterministic",
    "to_ensemble",
    "to_mc_dropout",
]
