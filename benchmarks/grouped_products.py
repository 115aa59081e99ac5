"""Times one decode step at a long context against an equal decoder whose attention is written as grouped products.

    python benchmarks/grouped_products.py MODEL... [--context N] [--steps N] [--threads N] [--json OUT]

MODEL is a decoder without a cache. It is injected, and so is a Llama with as many layers, heads, features per head and
KV heads as `inspect` finds, written as an exporter writes it. If each pair of a query and a key of the model has a
forget gate, which takes a third product and fits no running sum, the Llama has such gates too. Both take turns, one
step each, at a short context and at the long one; the growth of a step between them is what attention over the context
costs. Ends with 1 if the growth, or the step at the long context, of a model is more than 1.3 times that of its equal.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from decode import measure
from sizes.workloads import DecoderShape, with_weights

import kvsurgeon

SHORT = 16  # tokens
MOST = 1.3  # times the step of the equal decoder


def equal_decoder(injected: Path) -> onnx.ModelProto:
    """Return a decoder with the layers, heads and forget gates of a model, without a cache."""
    facts = kvsurgeon.inspect(injected)
    sites, first = facts.attentions, facts.attentions[0]
    gate_keys = any(pair.kind == "state" and "past_sequence_length" in pair.shape for pair in facts.cache)
    hidden = first.query_heads * first.head_dim
    shape = DecoderShape(
        layers=len(sites), hidden=hidden, ffn=4 * hidden, query_heads=first.query_heads, kv_heads=first.kv_heads,
        head_dim=first.head_dim, vocab=1000, forget_gates=gate_keys,
    )  # fmt: skip
    return with_weights(shape, "dynamo")


def compare(model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step of both at both contexts, and the ratios."""
    files = {"injected": folder / "injected.onnx", "grouped": folder / "grouped.onnx"}
    kvsurgeon.inject(model).save(files["injected"])
    kvsurgeon.inject(equal_decoder(files["injected"])).save(files["grouped"])
    arguments = argparse.Namespace(contexts=[SHORT, options.context], steps=options.steps, slow_steps=0)
    arguments.threads = options.threads
    seconds = measure(files, arguments)
    short, long = seconds[SHORT], seconds[options.context]
    growth = {name: long[name] - short[name] for name in files}
    return {
        "seconds": seconds,
        "step": long["injected"] / long["grouped"],
        "growth": growth["injected"] / growth["grouped"],
    }


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--context", type=int, default=4096, help="tokens")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write."""
    options, found = parse(), {}
    print(f"{'model':32} {'step ms':>9} {'equal ms':>9} {'ratio':>7} {'growth':>7}")
    for model in options.models:
        with TemporaryDirectory() as folder:
            row = found[str(model)] = compare(model, Path(folder), options)
        long = row["seconds"][options.context]
        print(
            f"{model.name:32} {1e3 * long['injected']:9.2f} {1e3 * long['grouped']:9.2f} {row['step']:7.2f} "
            f"{row['growth']:7.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(any(max(row["step"], row["growth"]) > MOST for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
