"""Dimensions of the graph inputs, in symbols: the batch, the length of the text, and extents that are neither.

Equal names are equal sizes. Different names are different sizes, until the graph requires it to equal another: two
tensors are broadcast, concatenated, multiplied, or one is reshaped to the sizes of another. Which symbol is the length
is a matter of use as well: the first output has it, and a product sums over it, as attention sums over keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import sympy

from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import find_live
from kvsurgeon.ops.operator import AxisLinks, Trait
from kvsurgeon.ops.table import contraction_of, find_links, has_trait, operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dim_names import is_standard_name
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension, Extent
from kvsurgeon.symbolic.fact import OperatorCall

GIVEN_FOR = "kvsurgeon.given_for"  # metadata of an input: what it is given for, as stated by the user
FIRST_CALL = "first-call"  # one of these: it lets tokens of the first call attend to later ones of that call
Dimensions = dict[ir.Value, tuple[Dimension, ...]]
Replacements = dict[sympy.Symbol, Dimension]


@dataclass(frozen=True, kw_only=True)
class GraphInputs:
    """The inputs that a caller must feed, and what follows from their dimensions.

    Attributes:
        dimensions: The dimensions of each input.
        length: The length of the text: a symbol, or a number if the export fixed it.
        shapes: What is known of every value that an output depends on.
    """

    dimensions: Dimensions
    length: Dimension
    shapes: Shapes


def required_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs that a caller must feed: those that are not initializers."""
    return [value for value in graph.inputs if not value.is_initializer()]


def read_inputs(graph: ir.Graph) -> GraphInputs:
    """Return the dimensions of the graph inputs in symbols.

    Raises:
        UnsupportedError: An input has no shape, names two axes like the batch, or none has a sequence axis.
    """
    dimensions, length = declared_dimensions(graph)
    live = find_live(graph)
    return resolve_inputs(graph, [node for node in graph if node in live], dimensions, length)


def resolve_inputs(graph: ir.Graph, nodes: Sequence[ir.Node], dimensions: Dimensions, length: Dimension) -> GraphInputs:
    """Return the inputs with one symbol for all sizes that the graph requires to be equal.

    Args:
        graph: The graph.
        nodes: Its nodes that are of interest, in order.
        dimensions: The dimensions of its inputs, in symbols that may be equal.
        length: The length of the text among them, as far as it is known.

    Raises:
        UnsupportedError: An input has two axes of the batch.
    """
    opset, is_chosen = graph.opset_imports.get("", 1), False
    while True:
        shapes = infer_shapes(nodes, dimensions, opset)
        replaced = _equal_symbols(nodes, shapes, dimensions)
        if not replaced and not is_chosen:
            replaced, is_chosen = _symbols_of_use(graph, nodes, shapes, dimensions, length), True
            length = LENGTH if LENGTH in replaced.values() else length
        if not replaced:
            _check_batch(dimensions)
            return GraphInputs(dimensions=dimensions, length=length, shapes=shapes)
        moves = tuple(replaced.items())
        dimensions = {
            value: tuple(dim.substitute(size, moves) for size in sizes) for value, sizes in dimensions.items()
        }


def shapes_of(graph: ir.Graph) -> Shapes:
    """Return the shapes of every value that an output depends on, in the symbols of the inputs.

    Raises:
        UnsupportedError: An input has no shape, names two axes like the batch, or none has a sequence axis.
    """
    live = find_live(graph)
    nodes = [node for node in graph if node in live]
    return infer_shapes(nodes, read_inputs(graph).dimensions, graph.opset_imports.get("", 1), named=True)


def declared_dimensions(graph: ir.Graph) -> tuple[Dimensions, Dimension]:
    """Return the dimensions of the graph inputs by their names, and the length if the graph is as most are.

    That is the second axis of the first input of rank two or three (the first of rank one; the third where the second
    is fixed and the third is not) that is more than one number; the first axis is the batch.

    Raises:
        UnsupportedError: An input has no shape, or none has a sequence axis.
    """
    shaped = [value for value in required_inputs(graph) if _has_shape(value)]
    rows = [value.shape for value in shaped if value.shape is not None and 1 <= len(value.shape) <= 3]
    first = next((shape for shape in rows if any(size != 1 for size in shape)), next(iter(rows), None))
    if first is None:
        raise UnsupportedError(
            "no input has a sequence axis",
            expected="an input such as input_ids [batch, sequence]",
            code=Code.INPUT_ROLE,
        )
    names: dict[str, Dimension] = {}
    axis = _length_axis(first)
    size = first[axis]
    length = size if isinstance(size, int) else LENGTH
    _name_dimension(names, size, length)
    if axis > 0:
        _name_dimension(names, first[0], BATCH)
    return {value: _dimensions(value, names, length) for value in shaped}, length


def _has_shape(value: ir.Value) -> bool:
    if value.shape is None:
        raise UnsupportedError(
            "an input has no shape", at=value.name, expected="a shape with a batch and a sequence axis",
            hint="give the input a shape, symbolic or not", code=Code.INPUT_ROLE,
        )  # fmt: skip
    return True


def _length_axis(shape: ir.Shape) -> int:
    """Return the sequence axis: after the batch, or after several rows of numbers for each token."""
    stacked = len(shape) == 3 and isinstance(shape[1], int) and not isinstance(shape[2], int)
    return 2 if stacked else min(1, len(shape) - 1)


def _name_dimension(names: dict[str, Dimension], size: int | ir.SymbolicDim, dimension: Dimension) -> None:
    if not isinstance(size, int) and size.value is not None:
        names.setdefault(str(size.value), dimension)


def _dimensions(value: ir.Value, names: dict[str, Dimension], length: Dimension) -> tuple[Dimension, ...]:
    """Return the dimensions of an input; an axis without a name has the size that is usual for its place."""
    shape = value.shape or ()
    usual = {1: {0: length}, 2: {0: BATCH, 1: length}, 3: {0: BATCH, 1: length}, 4: {0: BATCH, 2: length, 3: length}}
    result: list[Dimension] = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            result.append(size)
            continue
        if size.value is None:
            result.append(usual.get(len(shape), {}).get(axis, _extent(value, axis)))
            continue
        _name_dimension(names, size, _extent(value, axis))
        is_stated = value.metadata_props.get(GIVEN_FOR) == "fixed" and names[str(size.value)] is LENGTH
        result.append(dim.extent(f"{value.name}_{size.value}") if is_stated else names[str(size.value)])
    return tuple(result)


def _check_batch(dimensions: Mapping[ir.Value, tuple[Dimension, ...]]) -> None:
    for value, sizes in dimensions.items():
        if sizes.count(BATCH) > 1:
            raise UnsupportedError(
                "an input names two axes like the batch", at=value.name, found=str(value.shape),
                expected="another name for each size", hint="rename its dimensions", code=Code.INPUT_ROLE,
            )  # fmt: skip


def _equal_symbols(nodes: Iterable[ir.Node], shapes: Shapes, dimensions: Dimensions) -> Replacements:
    """Return what replaces each extent that the graph requires to equal another size."""
    if not any(_extents(size) for sizes in dimensions.values() for size in sizes):
        return {}
    found: Replacements = {}
    for node in nodes:
        facts = (shapes.facts.get(value) for value in node.inputs if value is not None)
        if not any(_extents(size) for fact in facts if fact is not None for size in fact.shape or ()):
            continue
        for one, other in _required_equal(shapes.call(node)):
            moves = tuple(found.items())
            pair = _solved(dim.substitute(one, moves), dim.substitute(other, moves))
            if pair is not None:
                found = {symbol: dim.substitute(size, (pair,)) for symbol, size in found.items()} | dict([pair])
    return found


def required_length(nodes: Iterable[ir.Node], shapes: Shapes) -> tuple[ir.Node, int] | None:
    """Return the first node that runs at one length only, and that length; None if all run at any."""
    for node in nodes:
        for pair in _required_equal(shapes.call(node)):
            for number, size in (pair, pair[::-1]):
                if isinstance(number, int) and not isinstance(size, int) and size.free_symbols == {LENGTH}:
                    rest = dim.subtract(size, LENGTH)
                    if isinstance(rest, int) and number > rest:
                        return node, number - rest
    return None


@dim.cached
def _extents(size: Dimension) -> frozenset[sympy.Symbol]:
    return frozenset() if isinstance(size, int) else frozenset(size.atoms(Extent))


@dim.cached
def _solved(one: Dimension, other: Dimension) -> tuple[sympy.Symbol, Dimension] | None:
    """Return an extent and what it must be, so that two sizes are equal; None if no replacement makes them so."""
    if not dim.all_known((one, other)) or dim.is_equal(one, other):
        return None
    for mine, theirs in ((one, other), (other, one)):
        if isinstance(mine, Extent) and mine not in getattr(theirs, "free_symbols", ()):
            return mine, theirs
    for mine, theirs in ((one, other), (other, one)):
        for symbol in sorted(_extents(mine), key=str):
            for candidate in sorted(getattr(theirs, "free_symbols", ()), key=str):
                moves = ((symbol, candidate),)
                if symbol is not candidate and dim.is_equal(*(dim.substitute(size, moves) for size in (mine, theirs))):
                    return symbol, candidate
    return None


def _required_equal(call: OperatorCall) -> Iterator[tuple[Dimension, Dimension]]:
    """Yield pairs of sizes that must be equal for a node to run, as far as neither of them is 1."""
    links = find_links(call)
    if links is None:
        return
    if links.addressing is not None:
        yield from _addressed_sizes(call, links)
        return
    if links.row_major:
        yield from _reshaped_sizes(call)
        return
    sizes: dict[object, Dimension] = {}
    for label, size in _labeled_sizes(call, links):
        if label is None or label == links.joined or size == 1:
            continue
        if label in sizes:
            yield sizes[label], size
        else:
            sizes[label] = size


def _labeled_sizes(call: OperatorCall, links: AxisLinks) -> Iterator[tuple[object, Dimension]]:
    for labels, fact in zip(links.inputs, call.inputs, strict=True):
        if labels is not None and fact is not None and fact.shape is not None:
            yield from zip(labels, fact.shape, strict=True)
    if links.target is not None:
        target = call.numbers(links.target) or ()
        yield from zip(links.outputs[0][len(links.outputs[0]) - len(target) :], target, strict=True)
    if links.attention is not None:
        stated, place = links.attention, links.attention.layout.index("sequence")
        for index in (stated.key, stated.value):
            yield "keys", (call.fact(index).shape or (1,) * (place + 1))[place]
        if stated.mask is not None:
            yield from zip(("queries", "keys"), (call.fact(stated.mask).shape or ())[-2:], strict=False)
            yield "queries", (call.fact(stated.query).shape or (1,) * (place + 1))[place]


def _addressed_sizes(call: OperatorCall, links: AxisLinks) -> Iterator[tuple[Dimension, Dimension]]:
    """Yield an extent of a mask that is read at a place for each token: the mask is as long as the tokens.

    The places may be right for that length alone, as in a mask that is flattened with its batch.
    """
    mask, places = call.fact(0), call.fact(1)
    if mask.shape is None or places.shape is None or mask.dtype is None or mask.dtype.is_floating_point():
        return
    counts = [size for size in places.shape if not isinstance(size, int) and size is not BATCH]
    if not counts or not any(dim.contains(size, BATCH) for size in mask.shape if not isinstance(size, int)):
        return
    kept = {*links.outputs[0]} - links.mixed
    for label, size in zip(links.inputs[0] or (), mask.shape, strict=True):
        if label is None or label not in kept:
            yield from ((extent, counts[-1]) for extent in _extents(size))


def _reshaped_sizes(call: OperatorCall) -> Iterator[tuple[Dimension, Dimension]]:
    """Yield the symbols before and after a reshape in order, if they are as many, or the number of elements.

    [batch, keys, hidden] as [batch, length, heads, head_dim] needs as many keys as the length, as heads are a number.
    """
    before, after = call.fact(0).shape, call.result.shape
    if before is None or after is None:
        return
    common = Counter(before) & Counter(after)
    mine, theirs = (
        [size for size in (Counter(sizes) - common).elements() if not isinstance(size, int) and dim.is_known(size)]
        for sizes in (before, after)
    )
    if len(mine) == len(theirs):
        yield from zip(mine, theirs, strict=True)
    elif dim.all_known(after):
        yield dim.product(before), dim.product(after)


def _symbols_of_use(
    graph: ir.Graph, nodes: Iterable[ir.Node], shapes: Shapes, dimensions: Dimensions, length: Dimension
) -> Replacements:
    """Return how symbols change places so that the length is what the first output has and attention sums over."""
    fact = shapes.facts.get(graph.outputs[0]) if graph.outputs else None
    sizes = [] if fact is None else [size for size in fact.shape or () if not isinstance(size, int)]
    symbols = {symbol: None for size in sizes for symbol in sorted(size.free_symbols, key=str)}
    summed: dict[Dimension, None] = {}
    for size in _summed_sizes(nodes, shapes):
        if size is length and size in symbols:
            return {}
        summed[size] = None
    found = next((symbol for symbol in symbols if symbol in summed), None)
    if found is None:
        return {}
    other = BATCH if found is BATCH else _declared_extent(dimensions, length)
    return {found: LENGTH} | ({LENGTH: other} if length is LENGTH else {})


def _declared_extent(dimensions: Dimensions, size: Dimension) -> Dimension:
    """Return the extent of the first axis of a size, as the input declares it."""
    value, axis = next((value, sizes.index(size)) for value, sizes in dimensions.items() if size in sizes)
    return _extent(value, axis)


def _extent(value: ir.Value, axis: int) -> Extent:
    """Return the extent of an axis by its name, which must not be that of an axis of tokens."""
    size = None if value.shape is None else value.shape[axis]
    name = size.value if isinstance(size, ir.SymbolicDim) else None
    if name is None or is_standard_name(name):
        name = f"{value.name}_{axis if name is None else name}"
    return dim.extent(name)


def _summed_sizes(nodes: Iterable[ir.Node], shapes: Shapes) -> Iterator[Dimension]:
    """Yield the sizes of the axes that products sum over, and of the keys of operators that hold an attention."""
    for node in nodes:
        if has_trait(node, Trait.PRODUCT):
            call = shapes.call(node)
            product = contraction_of(call)
            if product is not None:
                sizes = zip(product.left_labels, call.fact(product.left).shape or (), strict=True)
                yield from (size for label, size in sizes if label in product.summed)
        elif (operator := operator_of(node)) is not None and operator.axes is not None and operator.decomposition:
            yield from _keys_of(shapes.call(node))


def _keys_of(call: OperatorCall) -> Iterator[Dimension]:
    links = find_links(call)
    if links is not None and links.attention is not None:
        shape = call.fact(links.attention.key).shape
        yield from () if shape is None else (shape[links.attention.layout.index("sequence")],)
