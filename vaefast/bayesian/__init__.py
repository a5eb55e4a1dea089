"""Bayesian networks: a posterior over the parameters of any module, its training and its predictions."""

from __future__ import annotations

from ._prediction import Prediction
from ._priors import Gaussian
from .ivon import IVON
from .mean_field import MeanField, blundell_weights

__all__ = ["IVON", "Gaussian", "MeanField", "Prediction", "blundell_weights"]
