"""Calibration: values of a model on a text, in onnxruntime, from which passes compute weights and scales."""

from kvsurgeon.calibration.activations import activations, calibration_rows
from kvsurgeon.calibration.cached_rows import largest_features
from kvsurgeon.calibration.latent_values import compute_latents, fit_latents, project_values
from kvsurgeon.calibration.merge_heads import merge_into_first
from kvsurgeon.calibration.moments import SecondMoment
from kvsurgeon.calibration.share_layers import read_other_layers
from kvsurgeon.calibration.single_input import project_single_input

__all__ = [
    "SecondMoment",
    "activations",
    "calibration_rows",
    "compute_latents",
    "fit_latents",
    "largest_features",
    "merge_into_first",
    "project_single_input",
    "project_values",
    "read_other_layers",
]
