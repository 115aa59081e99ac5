"""The judge: runs a model with a cache against the original, and says whether, where and how far they differ."""

from kvsurgeon.parity.loss import LayerLoss, Loss, measure_loss
from kvsurgeon.parity.report import CacheFault, Position, Report, Trial, Verdict
from kvsurgeon.parity.scenarios import Scenario, TextLengths, plan
from kvsurgeon.parity.tolerance import TOLERANCES, Arithmetic, Tolerance, arithmetic_of
from kvsurgeon.parity.verifier import Progress, verify

__all__ = [
    "TOLERANCES",
    "Arithmetic",
    "CacheFault",
    "LayerLoss",
    "Loss",
    "Position",
    "Progress",
    "Report",
    "Scenario",
    "TextLengths",
    "Tolerance",
    "Trial",
    "Verdict",
    "arithmetic_of",
    "measure_loss",
    "plan",
    "verify",
]
