"""Which attention layers of a corpus `fuse-attention` fuses, why it leaves the others, and whether results are right.

    python benchmarks/fusion.py FOLDER... [--group G] [--only NAME] [--sample N] [--json OUT]

Each model (see `coverage.py`) gets a dynamic cache; then `fuse-attention --layers supported` fuses what it can, and the
result is run on the stored texts, in one call and token by token. Layers count as fusable if they are a softmax
attention with a head_dim that is a multiple of 8, as the operator requires.
Ends with 1 if a result is wrong, or if less than 90 % of these layers are fused.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import onnx
import onnxruntime as ort
from verification.corpus import Entry, corpus_parser, find_entries, spread_sample
from verification.independent_verifier import bound_of, open_session, read_contract, score_case

from kvsurgeon import io
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.fusion.operators import GROUP_QUERY_ATTENTION
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.operators.fuse_attention import FuseAttention

GOAL = 0.9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        label: Group and name.
        layers: Number of attention layers.
        fusable: Number of softmax attention layers with a head_dim that is a multiple of 8.
        fused: Number of fused layers.
        reasons: Why the others are not fused, each with the number of its layers.
        error: Largest difference from the stored outputs, over their spread; None if nothing is stored or fused.
        not_run: Why the result could not be run on the stored texts; empty if it was.
        wrong: Whether the error exceeds the bound of the model's arithmetic.
    """

    label: str
    layers: int = 0
    fusable: int = 0
    fused: int = 0
    reasons: dict[str, int]
    error: float | None = None
    not_run: str = ""
    wrong: bool = False


def measure(entry: Entry) -> Row | None:
    """Return what is fused of a model; None if it gets no cache."""
    subject = Subject.of(entry.path)
    try:
        sites = subject.analysis().sites
        layers, fusable = len(sites), sum(map(is_fusable, sites))
        if not isinstance(Inject().apply(subject), Changed):
            return None
    except KvsurgeonError:
        return None
    subject.changed()
    before = sum(map(GROUP_QUERY_ATTENTION.is_at, subject.model.graph))
    try:
        outcome = FuseAttention(layers="supported").apply(subject)
    except KvsurgeonError as error:
        return Row(label=entry.label, layers=layers, fusable=fusable, reasons={gist(error.reason): layers})
    fused = sum(map(GROUP_QUERY_ATTENTION.is_at, subject.model.graph)) - before
    notes = outcome.notes if isinstance(outcome, Changed) else (outcome.reason,)
    reasons = Counter(gist(note) for note in notes if note.startswith("not fused"))
    original = onnx.load(entry.path, load_external_data=False)
    row = Row(label=entry.label, layers=layers, fusable=fusable, fused=fused, reasons=dict(reasons))
    try:
        error = largest_error(original, subject, entry)
    except Exception as failure:  # onnxruntime's own, and numpy's for what it was fed
        return replace(row, not_run=" ".join(str(failure).split())[:120])
    return replace(row, error=error, wrong=error is not None and not error <= bound_of(original).error)


def is_fusable(site: AttentionSite) -> bool:
    """Return whether a layer is a softmax attention with a head_dim that is a multiple of 8."""
    softmax = site.fused is not None or any(has_trait(node, Trait.SOFTMAX) for node in site.upstream_of_weights)
    return softmax and all(one.cache_point.head_dim % 8 == 0 for one in (*site.keys, *site.values))


def gist(message: str) -> str:
    """Return a message without the layer, and without names and numbers."""
    message = re.sub(r"^not fused: |layer \d+: | - at `.*|, expected .*", "", message)
    return re.sub(r"`[^`]*`", "`.`", message).strip()


def largest_error(original: onnx.ModelProto, subject: Subject, entry: Entry) -> float | None:
    """Return the largest difference from the stored outputs over their spread; None if nothing is stored.

    The operator takes several sequences in the first call and in single steps only.
    """
    session = open_session(io.to_proto(subject.model), entry.folder)
    contract = read_contract(session, original)
    scores = [score for case in entry.cases(original) for score in score_case(session, contract, case, ragged=False)]
    return max((score.error for score in scores), default=None)


def line(row: Row) -> str:
    """Return a row as text."""
    why = "; ".join(f"{reason} ({count})" for reason, count in row.reasons.items())
    error = row.not_run if row.error is None else f"{row.error:.1e}" + (" WRONG" if row.wrong else "")
    return f"{row.label:60} {row.fused} of {row.fusable} fusable layers {error} {why}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuse, run, print, and return the exit code."""
    parser = corpus_parser(__doc__)
    options = parser.parse_args(arguments)
    ort.set_default_logger_severity(4)
    entries = find_entries(options.folders, groups=options.group, names=options.only)
    entries = [entry for entry in entries if entry.expected != "refuse" and entry.path.exists()]
    rows: list[Row] = []
    for entry in spread_sample(entries, options.sample):
        found = measure(entry)
        if found is not None:
            rows.append(found)
            print(line(found), flush=True)
    reasons = sum((Counter(row.reasons) for row in rows), Counter[str]())
    print("\nnot fused because")
    for reason, count in reasons.most_common():
        print(f"  {count:4} layers: {reason}")
    fused, fusable = sum(row.fused for row in rows), sum(row.fusable for row in rows)
    share, wrong = fused / max(fusable, 1), [row.label for row in rows if row.wrong]
    print(f"{len(rows)} models: {fused} of {fusable} fusable layers fused ({share:.1%})")
    print(f"wrong: {', '.join(wrong) or 'none'}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")
    return int(bool(wrong) or share < GOAL)


if __name__ == "__main__":
    sys.exit(main())
