"""Verification of a model with a cache: it is run and compared with its reference model."""

from kvsurgeon.parity.arithmetic.tolerance import TOLERANCES, Tolerance, arithmetic_of
from kvsurgeon.parity.loss import AccuracyLoss, measure_loss
from kvsurgeon.parity.model_source import load_graph
from kvsurgeon.parity.report import CacheDifference, Comparison, Coverage, Progress, Report, Verdict
from kvsurgeon.parity.scenarios import Effort, Scenario, TextLengths
from kvsurgeon.parity.verifier import verify

__all__ = [
    "TOLERANCES",
    "AccuracyLoss",
    "CacheDifference",
    "Comparison",
    "Coverage",
    "Effort",
    "Progress",
    "Report",
    "Scenario",
    "TextLengths",
    "Tolerance",
    "Verdict",
    "arithmetic_of",
    "load_graph",
    "measure_loss",
    "verify",
]
