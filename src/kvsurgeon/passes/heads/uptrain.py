"""Train the projections around attention on the logits of the original model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from kvsurgeon import io
from kvsurgeon.errors import UsageError
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.remove_cache import detach_cache
from kvsurgeon.passes.contract import Changed, Outcome, Subject
from kvsurgeon.passes.options import check_count


@dataclass(frozen=True, kw_only=True)
class Uptrain:
    """Train the projections around attention on the logits of the original model (uptraining, distillation).

    Before: a model that lost accuracy when its KV heads were merged, shared or approximated. After: the same graph,
    with query, key, value and output projections that give the logits of the original as well as possible on a text
    (`--text FILE`). Needs the extra `train`. Not exact: the report states the accuracy loss to the original.

    Not supported: quantized projections, and operators behind the first projection that are not in a table for torch.

    Attributes:
        against: The original model, whose logits are wanted.
        minutes: Time to train, at most.
        steps: Number of steps, at most, one row of the text each.
        learning_rate: Learning rate of Adam. It falls to zero at the end.
        row_length: Tokens of a row, at most.
    """

    name: ClassVar[str] = "uptrain"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    against: str
    minutes: float = 10.0
    steps: int | None = None
    learning_rate: float = 1e-3
    row_length: int = 256

    def apply(self, subject: Subject) -> Outcome:
        """Train the weights.

        Raises:
            UsageError: There is no text or no torch, or an option is not valid.
            UnsupportedError: The weights cannot be found or trained.
        """
        text, original = subject.text_for("to train on"), Path(self.against)
        self._check()
        from kvsurgeon.parity import measure_loss  # onnxruntime is slow to import
        from kvsurgeon.training import Schedule, distill, projection_weights, replace_weights

        work = subject.with_model(subject.model)
        detach_cache(work)
        with deep_recursion():
            analysis = work.analysis_of_copy()
            weights = projection_weights(analysis)
        with io.staged(analysis.model, None, subject.folder) as proto:
            before = measure_loss(
                original, proto, text=text, held_out=True, folder=subject.folder, progress=subject.progress
            )
        schedule = Schedule(
            minutes=self.minutes, steps=self.steps, learning_rate=self.learning_rate, row=self.row_length
        )
        trained = distill(analysis.model, weights, original, text, subject.folder, schedule, subject.progress)
        edits = replace_weights(subject.model, trained.weights)
        replace_weights(analysis.model, trained.weights)
        notes = (
            f"before training: KL divergence {before.kl_divergence:.3f} nats per token, perplexity "
            f"{before.candidate_perplexity:.3f}",
            f"{trained.steps} steps of {trained.tokens} tokens",
        )
        model = analysis.model
        return Changed(edits=edits, notes=notes, exact=False, equal_models=lambda: [(model, model)], original=original)

    def _check(self) -> None:
        for option, number in (("minutes", self.minutes), ("learning-rate", self.learning_rate)):
            if not number > 0:
                raise UsageError(f"option {option}: expected a number above 0, found {number:g}")
        check_count("steps", self.steps)
        check_count("row-length", self.row_length, least=2)
        if find_spec("torch") is None:
            raise UsageError("expected torch, found none; install the extra: pip install 'kvsurgeon[train]'")
