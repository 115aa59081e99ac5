"""Training: weights of a changed model, fitted to the logits of the original by gradients (needs torch)."""

from kvsurgeon.training.distillation import Schedule, Trained, distill
from kvsurgeon.training.projections import projection_weights, replace_weights

__all__ = ["Schedule", "Trained", "distill", "projection_weights", "replace_weights"]
