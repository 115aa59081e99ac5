"""List every node whose work in a decode step grows with the context, without need.

    python benchmarks/step_work.py MODEL... [--group G] [--only NAME] [--sample N] [--json OUT]

MODEL is a file or a folder, with a cache or without; or a corpus, FOLDER/<group>/<name>/model.onnx. A model without a
cache is injected. onnxruntime optimizes it, and runs one new token at batch 1 at three contexts, with every value as an
output: work is counted in elements of the shapes that really come about.

What grows as needed: the two products of attention; the append of new rows to the cache; and any other node whose
largest tensor grows by as many elements for each token as there are scores of it, such as softmax, scaled scores or a
row of the mask. Everything else is listed, and so is all that grows with the square of the context. Experts that a
token may select, or may not, grow if they do from each context to the next.
Ends with 1 if a model is listed that is not known, with a reason, below.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort
from coverage import quiet
from verification.corpus import find_entries, spread_sample

import kvsurgeon
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.runtime.decoder import CachedDecoder
from kvsurgeon.runtime.session import Session

CONTEXTS = ((256, 512, 4096), (40, 60, 100), (12, 16, 20))  # the first that the model's tables are long enough for

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size"})  # without a copy
PICKS = frozenset({"Slice", "Gather", "GatherElements", "GatherND", "Split"})  # they read what they write
PRODUCTS = {  # index of the second operand
    "MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "Einsum": 1, "MatMulInteger": 1, "QLinearMatMul": 3,
    "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1,
}  # fmt: skip
FUSED = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
APPENDS = frozenset({"Concat", "ScatterElements", "ScatterND", "TensorScatter", "Where"})

Known = tuple[str, set[str], str]  # end of the folder's path with wildcards, what grows there, and why
KNOWN: tuple[Known, ...] = (
    ("*fp16/*", {"Cast of cache", "Transpose of cache", "Expand of cache"},
     "onnxruntime transposes and casts float16 for its CPU kernels"),
    ("other-torch-dtype/*fp16*", {"Cast of cache", "Transpose of cache"},
     "onnxruntime transposes and casts float16 for its CPU kernels"),
    ("reports/cml2669_fp16_min_fp16", {"Cast of cache", "Transpose of cache"},
     "onnxruntime transposes and casts float16 for its CPU kernels"),
    ("quant-dynamic-attn/*",
     {"DynamicQuantizeLinear of cache", "Expand of cache", "Mul of cache", "Transpose of cache"},
     "the quantization ranges of keys and values are measured on all tokens in each call"),
    ("quant-q*/*", {"Gather of cache", "Transpose of cache", "Expand of cache", "DequantizeLinear of cache"},
     "keys are quantized before they are transposed; the products take no transposed operand"),
    ("quant-qoperator-linear/torchscript_qwen2",
     {"Split of cache", "Mul of cache", "Neg of cache", "Concat of cache", "Add of cache", "Concat of context",
      "Cos of context", "Sin of context"},
     "keys are cached before their rotation, whose result is rounded to 8 bits"),
    ("hf4*/*", {"Slice of context"}, "a table is sliced to the tokens so far, and a position beyond must fail"),
    ("other-proto/*", {"Slice of context"}, "a table is sliced to the tokens so far, and a position beyond must fail"),
    ("hf430-op17-dyn/open_llama", {"Expand of context", "GatherElements of context", "Tile of context"},
     "a table of all tokens so far is repeated for each sequence, and read by index"),
    ("further-outputs/K_causal_mask_out", {"And of context T x T", "LessOrEqual of context T x T",
     "Where of context T x T"}, "the mask of all pairs of tokens is an output of the model"),
    ("further-outputs/K_own_causal_out", {"Cast of context T x T", "LessOrEqual of context T x T"},
     "the mask of all pairs of tokens is an output of the model"),
    ("heads/dynamo_diffllama", {"Expand of cache", "Split of cache", "Tile of cache"},
     "one score product for two context products, which head grouping does not write"),
    ("reports/cond_spk1_broken", {"Mul of cache"}, "the model multiplies its whole cache by zero"),
    ("reports/mha_bias_kv", {"Concat of cache", "Tile of cache", "Concat of context T x T",
     "ConstantOfShape of context T x T", "Trilu of context T x T"},
     "torch's bias_k: a learned key and value behind those of all tokens, in each layer"),
    ("reports/opt390_decoder_withpast", {"Tile of cache"},
     "the cache is the exporter's own; remove-cache and inject give a better one"),
    ("reports/soft_prompt",
     {"And of context T x T", "LessOrEqual of context T x T", "Not of context T x T", "Concat of cache",
      "Concat of context", "Cos of context", "Sin of context", "Tile of cache", "Transpose of cache"},
     "a soft prompt: its keys and values are joined in front of those of all tokens, and masks count its rows"),
    ("third-party/labml_xl__ts", {"Slice of context", "Transpose of context"},
     "a table of distances is cut to those of all tokens, with the heads in its middle"),
    ("third-party/picogpt__dy",
     {"Add of cache", "Expand of context", "Mul of cache", "ScatterND of cache", "Slice of cache", "Slice of context",
      "Sub of cache", "Transpose of cache", "Transpose of context"},
     "keys are cached before their rotation, which an index chooses"),
    ("third-party/xt_colmem__ts", {"Concat of cache", "Pow of cache", "ReduceSum of cache"},
     "distances to all keys are sums over their features"),
    ("third-party/xt_mem__ts", {"Concat of cache", "ConstantOfShape of context T x T", "Trilu of context T x T"},
     "learned keys and values in front of those of all tokens, in each layer, and a mask that counts them"),
    ("third-party/xt_sink__ts", {"Pad of cache"},
     "a learned key and value in front of those of all tokens, in each layer"),
)  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]
Node = onnx.NodeProto


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A node whose work grows.

    Attributes:
        kind: What it does with which tensor.
        output: Name of its first output.
        per_token: Elements of work for each token of the context.
        is_quadratic: Whether the work grows with the square of the context.
        shapes: Shapes of inputs and outputs at the longest context.
    """

    kind: str
    output: str
    per_token: float
    is_quadratic: bool
    shapes: list[tuple[int, ...]]


@dataclass(kw_only=True)
class Report:
    """Growth of one model.

    Attributes:
        model: The model.
        contexts: Contexts at which it ran.
        found: Nodes that grow without need.
        needed: Elements of work for each token of what grows as needed.
        failure: Why it could not be examined.
    """

    model: str
    contexts: Sequence[int] = ()
    found: list[Growth] = field(default_factory=list)
    needed: float = 0.0
    failure: str = ""


def examine(model: Path) -> Report:
    """Return what grows in a decode step of a model; a refusal or a failed run is recorded."""
    report = Report(model=str(model))
    try:
        with TemporaryDirectory() as folder:
            decoder, session, graph = _optimized(with_cache(model), model.parent, Path(folder))
            report.contexts, shapes = _measured(session, decoder, [name for node in graph.node for name in node.output])
        _classify(report, graph, shapes, decoder)
    except KvsurgeonError as error:
        report.failure = f"refused: {error}"
    except Exception as error:  # onnxruntime has no kernel for one of its operators
        report.failure = f"{type(error).__name__}: {error}"[:300]
    return report


def with_cache(model: Path) -> onnx.ModelProto:
    """Return a model, injected if it has no cache."""
    original = onnx.load(model, load_external_data=False)
    if any(given.name.startswith("past_key_values.") for given in original.graph.input):
        return original
    return kvsurgeon.KeyValueCacheInjector(model.parent).apply(original)


def _optimized(
    model: onnx.ModelProto, weights: Path, folder: Path
) -> tuple[CachedDecoder, ort.InferenceSession, onnx.GraphProto]:
    """Return a decoder, the graph that onnxruntime makes of it, and a session of that with every value as an output."""
    options, path = _options(weights), folder / "model.onnx"
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    decoder = CachedDecoder(
        Session(ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]), "the model")
    )
    optimized = onnx.load(path)
    known = {output.name for output in optimized.graph.output}
    made = (name for node in optimized.graph.node for name in node.output if name and name not in known)
    optimized.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    options = _options(folder)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(optimized.SerializeToString(), options, ["CPUExecutionProvider"])
    return decoder, session, optimized.graph


def _options(weights: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.resolve()))
    return options


def _measured(
    session: ort.InferenceSession, decoder: CachedDecoder, names: Sequence[str]
) -> tuple[Sequence[int], Sequence[Shapes]]:
    """Return the contexts at which a step runs, and the shapes of all values there."""
    for contexts in CONTEXTS:
        try:
            return contexts, [_shapes(session, decoder, names, context) for context in contexts]
        except Exception as error:
            failure = error
    raise failure


def _shapes(session: ort.InferenceSession, decoder: CachedDecoder, names: Sequence[str], context: int) -> Shapes:
    ones = np.ones((decoder.batch or 1, context), np.int64)
    feeds = decoder.inputs.part(decoder.inputs.feeds(ones, ones), context - 1, context)
    random = np.random.default_rng(0)
    for entry in decoder.cache:
        rows = [context - 1 if axis == entry.axis else size for axis, size in enumerate(entry.past.dims)]
        shape = [size if isinstance(size, int) else decoder.batch or 1 for size in rows]
        feeds[entry.past.name] = random.normal(size=shape).astype(entry.past.dtype)
    wanted = [name for name in names if name]
    values = session.run_with_ort_values(wanted, {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in feeds.items()})
    shapes = {name: tuple(value.shape()) for name, value in zip(wanted, values, strict=True) if value.is_tensor()}
    return {**shapes, **{name: array.shape for name, array in feeds.items()}}


def _classify(report: Report, graph: onnx.GraphProto, shapes: Sequence[Shapes], decoder: CachedDecoder) -> None:
    """Fill in what grows with need and without."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    known = [{**weights, **one} for one in shapes]
    presents, pasts = {entry.present for entry in decoder.cache}, {entry.past.name for entry in decoder.cache}
    cached = set(pasts)  # values that are computed from the cache, and from no score yet
    selected = _selected(graph)
    grown = [(node, _growth(node, known, report.contexts, steady=node.output[0] in selected)) for node in graph.node]
    growing = [(node, growth) for node, growth in grown if growth is not None]
    needed: list[tuple[Node, float]] = []
    others: list[tuple[Node, float, bool, str]] = []
    scores = 0.0
    growths = {id(node): growth for node, growth in growing}
    for node, growth in grown:
        reads = [name for name in node.input if name in cached]
        if growth is None:
            if reads and _rate(node.output, known, report.contexts)[1] > 0:
                cached.update(node.output)
            continue
        work, largest, is_quadratic = growth
        operands = _operands(node)
        is_product = bool(operands) and not any(name in weights for name in operands)
        if is_product and not is_quadratic:
            heads = known[-1][operands[0]][-1] if node.op_type in FUSED else 0
            scores = max(scores, heads, _rate(node.output[:1], known, report.contexts)[0])
            needed.append((node, work))
            continue
        if reads and not is_product:
            cached.update(name for name in node.output if _rate([name], known, report.contexts)[0] > 0)
        if node.op_type in APPENDS and (presents & set(node.output) or pasts & set(node.input)):
            needed.append((node, work))
            continue
        others.append((node, largest, is_quadratic, "cache" if reads else "context"))
    for node, largest, is_quadratic, source in others:
        work = growths[id(node)][0]
        if largest <= scores and not is_quadratic:
            needed.append((node, work))
        else:
            report.found.append(
                Growth(
                    kind=f"{node.op_type} of {source}" + (" T x T" if is_quadratic else ""), output=node.output[0],
                    per_token=work, is_quadratic=is_quadratic,
                    shapes=[known[-1].get(name, ()) for name in (*node.input, *node.output)],
                )
            )  # fmt: skip
    report.needed = sum(work for _, work in needed)


def _selected(graph: onnx.GraphProto) -> set[str]:
    """Return the values of rows selected by content, whose number differs from call to call."""
    values: set[str] = set()
    for node in graph.node:
        if node.op_type == "NonZero" or not values.isdisjoint(node.input):
            values.update(node.output)
    return values


def _growth(
    node: Node, shapes: Sequence[Shapes], contexts: Sequence[int], *, steady: bool
) -> tuple[float, float, bool] | None:
    """Return the growth of a node's work for each token, that of its largest tensor, and whether it is quadratic.

    If it must be `steady`, there is none unless the work grows from each context to the next.
    """
    if node.op_type in VIEWS:
        return None
    work = [_work(node, one) for one in shapes]
    names = node.output if node.op_type in PICKS else (*node.input, *node.output)
    first, second = (_slope(work[i : i + 2], contexts[i : i + 2]) for i in range(2))
    if second <= 0 or (steady and first <= 0):
        return None
    largest = max(_rate([name], shapes, contexts)[1] for name in names)
    return second, largest, second > 1.5 * first


def _rate(names: Sequence[str], shapes: Sequence[Shapes], contexts: Sequence[int]) -> tuple[float, float]:
    sizes = [sum(math.prod(one[name]) for name in names if name in one) for one in shapes]
    return _slope(sizes[:2], contexts[:2]), _slope(sizes[1:], contexts[1:])


def _slope(work: Sequence[float], contexts: Sequence[int]) -> float:
    return (work[1] - work[0]) / (contexts[1] - contexts[0])


def _work(node: Node, shapes: Shapes) -> int:
    """Return the elements that a node multiplies, or reads and writes."""
    inputs = [math.prod(shapes[name]) for name in node.input if name in shapes]
    outputs = sum(math.prod(shapes[name]) for name in node.output if name in shapes)
    if node.op_type in PRODUCTS:
        return _multiplied(node, shapes)
    if node.op_type in FUSED:
        return sum(inputs)
    return outputs if node.op_type in PICKS else sum(inputs) + outputs


def _operands(node: Node) -> list[str]:
    """Return what a product multiplies, or the queries and keys of a whole attention; empty for other operators."""
    return [node.input[0], node.input[PRODUCTS.get(node.op_type, 1)]] if node.op_type in {*PRODUCTS, *FUSED} else []


def _multiplied(node: Node, shapes: Shapes) -> int:
    if node.op_type == "Einsum":
        equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
        terms = equation.replace(" ", "").split("->")[0].split(",")
        sizes = {label: size for term, name in zip(terms, node.input, strict=True)
                 for label, size in zip(term, shapes[name], strict=False)}  # fmt: skip
        return math.prod(sizes.values())
    left, right = (shapes[name] for name in _operands(node))
    outputs = math.prod(shapes[node.output[0]])
    transposed = {attribute.name: attribute.i for attribute in node.attribute}
    return outputs * (left[-2] if transposed.get("transA") else left[-1]) if len(left) > 1 else outputs * right[0]


def _reason(report: Report) -> str:
    """Return why the work of a model grows, if it is known."""
    known = [(kinds, reason) for name, kinds, reason in KNOWN if Path(report.model).parent.match(name)]
    unknown = {found.kind for found in report.found}.difference(*(kinds for kinds, _ in known))
    return "" if unknown else "; ".join(reason for _, reason in known)


def _entries(options: argparse.Namespace) -> Iterator[Path]:
    for model in options.models:
        if model.is_file():
            yield model
        elif (model / "model.onnx").exists():
            yield model / "model.onnx"
        else:
            entries = find_entries([model], groups=options.group, names=options.only)
            entries = [entry for entry in entries if entry.expected != "refuse" and not entry.damaged]
            yield from (entry.path for entry in spread_sample(entries, options.sample))


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--group", action="append", default=[], help="only this group; wildcards, repeatable")
    parser.add_argument("--only", action="append", default=[], help="only this name, or group/name; wildcards")
    parser.add_argument("--sample", type=int, help="only so many models of a corpus, evenly spaced")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    """Examine, print and write."""
    options = parse()
    quiet()
    reports = []
    for model in _entries(options):
        report = examine(model)
        reports.append(report)
        wasted = sum(found.per_token for found in report.found)
        print(
            f"{report.model}: {wasted:.0f} elements per token without need, {report.needed:.0f} with {report.failure}"
        )
        if reason := _reason(report):
            print(f"  known: {reason}")
        for found in report.found:
            print(f"  {found.kind} `{found.output}` {found.per_token:.0f} per token {found.shapes}")
    kinds = Counter(kind for report in reports for kind in {found.kind for found in report.found})
    for kind, count in kinds.most_common():
        print(f"{count:5} models: {kind}")
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1), encoding="utf-8")
    return 1 if any(report.found and not _reason(report) for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
