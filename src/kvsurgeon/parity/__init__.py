"""The judge: runs a model with a cache against the original, and says whether, where and how far they differ."""

from kvsurgeon.parity.judge import Progress, verify
from kvsurgeon.parity.loss import LayerLoss, Loss, measure_loss
from kvsurgeon.parity.report import CacheFault, Position, Report, Trial, Verdict
from kvsurgeon.parity.scenario import Lengths, Scenario, plan
from kvsurgeon.parity.tolerance import TOLERANCES, Arithmetic, Tolerance, arithmetic_of

__all__ = [
    "TOLERANCES",
    "Arithmetic",
    "CacheFault",
    "LayerLoss",
    "Lengths",
    "Loss",
    "Position",
    "Progress",
    "Report",
    "Scenario",
    "Tolerance",
    "Trial",
    "Verdict",
    "arithmetic_of",
    "measure_loss",
    "plan",
    "verify",
]
