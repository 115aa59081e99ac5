"""Products on token data: projections, scores, and sums over keys; the labels with sequence axes decide."""

from __future__ import annotations

from collections.abc import Iterable

from kvsurgeon.analysis.axis_merging import AxesByLabel, brought, placed
from kvsurgeon.analysis.token_flow import ContextProduct, FusedAttention, NodeVisit, ScoreProduct, is_of_queries
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import is_operator
from kvsurgeon.ops.contraction import Contraction
from kvsurgeon.ops.operator import AttentionInputs, AxisLinks, Labels, Trait
from kvsurgeon.ops.table import contraction_of, has_trait
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis


def product(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """A product of two tensors: a projection, scores, or the sum over keys."""
    found = contraction_of(visit.call)
    assert found is not None
    packed = links.inputs[found.right] is None
    if packed:
        _check_parameters(visit, range(1, len(visit.node.inputs)))
    left = _traced(visit, found.left, found.left_labels)
    right = {} if packed else _traced(visit, found.right, found.right_labels)
    sides = [(found.left, found.left_labels), *([] if packed else [(found.right, found.right_labels)])]
    _bring(visit, found, left, right, packed=packed)
    aside: AxesByLabel = {}
    for label in found.summed:
        if label in left and label in right:
            _sum_away(visit, found, label, left, right)
        elif label in left or label in right:
            if packed:
                raise visit.mixing()
            aside |= _sum_with_context(visit, found, label, {**left, **right}[label])
    kept = _kept(visit, found, left, right)
    for index, labels in sides:
        if visit.kind(index) is not ValueKind.TOKEN:
            _align(visit, index, labels, {**kept, **aside})
    _align_further(visit, found, links, kept)
    return [placed(kept, links.outputs[0])]


def _traced(visit: NodeVisit, index: int, labels: Labels) -> AxesByLabel:
    return {str(labels[axis.axis]): axis for axis in visit.axes(index)} if visit.kind(index) is ValueKind.TOKEN else {}


def _bring(visit: NodeVisit, found: Contraction, left: AxesByLabel, right: AxesByLabel, *, packed: bool) -> None:
    """Context may add an axis of the sequence length to token data, such as relative positions."""
    sides = ((found.left, found.left_labels, left, right), (found.right, found.right_labels, right, left))
    for index, labels, mine, theirs in sides[:1] if packed else sides:
        if visit.kind(index) is ValueKind.TOKEN:
            continue
        plain = any(theirs[label].is_plain for label in labels if label in theirs and label not in found.summed)
        new = {
            label: brought(visit, size)
            for label, size in zip(labels, visit.shape(index), strict=True)
            if label not in theirs
            and (visit.holds_length(size) or (plain and size == visit.flow.length and label not in found.summed))
        }
        if any(label in found.summed for label in new):
            raise visit.mixing()
        if new:
            other = found.right if index == found.left else found.left
            query_axis = [label for label, axis in theirs.items() if axis.variable.resolved() is Length.NEW]
            theirs.update({label: visit.open_length(theirs[label], other) for label in query_axis})
        mine.update(new)


def _sum_away(visit: NodeVisit, found: Contraction, label: str, left: AxesByLabel, right: AxesByLabel) -> None:
    """Sum weights against values along the axis of the keys."""
    one, other = left[label], right[label]
    if (
        not one.without_rows.is_plain
        or not other.without_rows.is_plain
        or (one.rows_before, one.rows_after) != (other.rows_before, other.rows_after)
    ):
        raise visit.mixing()
    is_left = len(left) > len(right) if one.learned_rows else one.variable.resolved() is not Length.NEW
    keys, values = (one, other) if is_left else (other, one)
    if keys.variable.resolved() is Length.NEW or not (
        values.variable.resolved() is Length.NEW or visit.flow.has_learned_rows(values.variable)
    ):
        raise _counted(visit, values) or visit.mixing()  # a state summed over tokens, as linear attention has
    weights, value = (found.left, found.right) if is_left else (found.right, found.left)
    if keys.variable.root().bias or not _sees_keys(visit, keys.variable):
        raise visit.mixing()
    if one.learned_rows and not keys.variable.agree(values.variable):
        raise visit.mixing()
    keys.variable.root().length = Length.TOTAL
    for score in visit.flow.scores:
        _settle(score)
    if not one.learned_rows:
        visit.flow.operands[visit.node, value] = keys.variable
    visit.flow.products.append(ContextProduct(node=visit.node, weights=weights, value=value, variable=keys.variable))


def _counted(visit: NodeVisit, axis: SequenceAxis) -> UnsupportedError | None:
    """Return why an axis cannot be traced: positions are counted by comparing tokens with each other."""
    for score in visit.flow.scores:
        variables = score.left_variable.root(), score.right_variable.root()
        if has_trait(score.node, Trait.PRODUCT) or axis.variable.root() not in variables:
            continue
        other = variables[1] if axis.variable.root() is variables[0] else variables[0]
        counts = [node for node, variable in visit.flow.mixes_keys.items() if variable.root() is other]
        if counts:
            return UnsupportedError(
                "positions are counted by comparing all tokens with each other, so a decode step would need all "
                "of them",
                code=Code.TOKEN_DEPENDENT_MASK,
                at=counts[0].outputs[0].name,
                expected="positions by index, from the mask, or as an input",
                found=f"{counts[0].op_type} of {score.node.op_type}",
            )
    return None


def _sum_with_context(visit: NodeVisit, found: Contraction, label: str, keys: SequenceAxis) -> AxesByLabel:
    """Sum keys against context, such as values that depend on the distance."""
    context, labels = (
        (found.right, found.right_labels)
        if visit.kind(found.left) is ValueKind.TOKEN
        else (found.left, found.left_labels)
    )
    is_context = visit.kind(context) is ValueKind.CONTEXT and visit.holds_length(
        visit.shape(context)[labels.index(label)]
    )
    if not is_context or keys.variable.root().bias or not _sees_keys(visit, keys.variable):
        raise visit.mixing()
    visit.mix_along(keys)
    return {label: keys}


def _sees_keys(visit: NodeVisit, variable: LengthVariable) -> bool:
    roots = {id(side.root()) for score in visit.flow.scores for side in (score.left_variable, score.right_variable)}
    return id(variable.root()) in roots


def _settle(score: ScoreProduct) -> None:
    """Decide the axis of the queries once that of the keys is decided."""
    left, right = score.left_variable.root(), score.right_variable.root()
    if left.length is Length.TOTAL and right.length is None:
        right.length = Length.NEW
    elif right.length is Length.TOTAL and left.length is None:
        left.length = Length.NEW


def _kept(visit: NodeVisit, found: Contraction, left: AxesByLabel, right: AxesByLabel) -> AxesByLabel:
    """The labels of the result that hold tokens; two of the query_axis side by side are scores."""
    kept: AxesByLabel = {}
    for label in found.result_labels:
        mine, theirs = left.get(label), right.get(label)
        if mine is not None and theirs is not None:
            kept[label] = visit.meet((found.left, mine), (found.right, theirs))
        elif (traced := mine or theirs) is not None:
            kept[label] = traced
    return _met(visit, found, left, right, kept)


def _met(visit: NodeVisit, found: Contraction, left: AxesByLabel, right: AxesByLabel, kept: AxesByLabel) -> AxesByLabel:
    query_axis = [label for label, axis in kept.items() if axis.variable.resolved() is Length.NEW]
    if len(query_axis) < 2:
        return _scores_of_learned_rows(visit, found, left, right, kept)
    first, second, *more = query_axis
    if first in right:
        first, second = second, first
    if more or first in right or second in left or first not in left or second not in right:
        raise visit.mixing()
    left_variable, right_variable = visit.scores(found.left, found.right)
    visit.flow.operands[visit.node, found.left] = left_variable
    visit.flow.operands[visit.node, found.right] = right_variable
    return {**kept, first: kept[first].with_variable(left_variable), second: kept[second].with_variable(right_variable)}


def _scores_of_learned_rows(
    visit: NodeVisit, found: Contraction, left: AxesByLabel, right: AxesByLabel, kept: AxesByLabel
) -> AxesByLabel:
    """Scores of queries and keys with learned rows."""
    sides = ((left, found.left), (right, found.right))
    rows = [visit.flow.has_learned_rows(axis.variable) for side, _ in sides for axis in side.values()]
    if len(rows) == 2 and all(rows) and len(kept) == 2:
        padded = (is_operator(node, "Pad") for node, _ in visit.flow.learned_row_inputs)
        if isinstance(visit.flow.length, int) and any(padded):
            raise visit.refusal(
                "tokens are padded to whole chunks, and a chunk attends to itself: a recurrence that is not recognized",
                code=Code.MIXES_TOKENS, expected="the gated delta rule",
            )  # fmt: skip
        raise visit.refusal(
            "learned rows next to the tokens are queries too, so that every call would have to compute them",
            code=Code.MIXES_TOKENS, expected="learned rows of keys and values only",
        )  # fmt: skip
    for (queries, index), (keys, _) in (sides, sides[::-1]):
        if len(queries) != 1 or len(keys) != 1:
            continue
        (label, query), (key,) = *queries.items(), keys.values()
        if (
            label in keys
            or query.variable.resolved() is not Length.NEW
            or not visit.flow.has_learned_rows(key.variable)
        ):
            continue
        variable = visit.flow.operands[visit.node, index] = LengthVariable(at=visit.node.outputs[0].name or "")
        left_variable, right_variable = (variable, key.variable) if queries is left else (key.variable, variable)
        visit.flow.scores.append(
            ScoreProduct(
                node=visit.node,
                left=found.left,
                right=found.right,
                left_variable=left_variable,
                right_variable=right_variable,
            )
        )
        return {**kept, label: query.with_variable(variable)}
    return kept


def _align(visit: NodeVisit, index: int, labels: Labels, kept: AxesByLabel) -> None:
    """Demand of context the sequence axes of the tokens that it is multiplied with."""
    wanted = []
    for axis, (label, size) in enumerate(zip(labels, visit.shape(index), strict=True)):
        if label in kept and size != 1:
            wanted.append(kept[label].at(axis))
    visit.demand(index, tuple(wanted))


def _align_further(visit: NodeVisit, found: Contraction, links: AxisLinks, kept: AxesByLabel) -> None:
    """A bias is added to the result; other inputs of a product are scales and zero points."""
    further = [index for index in range(len(visit.node.inputs)) if index not in (found.left, found.right)]
    _check_parameters(visit, further)
    for index in further:
        if links.inputs[index] is not None:
            _align(visit, index, links.inputs[index] or (), kept)


def _check_parameters(visit: NodeVisit, indices: Iterable[int]) -> None:
    for index in indices:
        if visit.kind(index) is ValueKind.TOKEN and visit.axes(index):
            raise visit.refusal(f"its input {index} is token data", at=visit.node.inputs[index])


def attention(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """An operator that computes a whole attention, without a past."""
    stated = links.attention
    assert stated is not None
    if any(value is not None for value in visit.node.inputs[4:6]):
        raise visit.refusal(
            "the model already has a cache", hint="inject a model exported without one", code=Code.HAS_CACHE
        )
    if len([value for value in visit.node.outputs if value.name and value.uses()]) > 1:
        raise visit.refusal("its further outputs are used", code=Code.FUSED_OPERATOR)
    mask = stated.mask
    if visit.kind(stated.key) is not ValueKind.TOKEN and visit.kind(stated.value) is not ValueKind.TOKEN:
        return _cross_attention(visit, stated)
    keys = _fused(visit, FusedAttention(node=visit.node, inputs=stated))
    if mask is not None and visit.kind(mask) is ValueKind.TOKEN:
        raise visit.refusal(
            "its mask is made of tokens, and would have to be cached with the keys", at=visit.node.inputs[mask],
            expected="a mask that is given for all tokens so far, or computed from lengths",
            code=Code.TOKEN_DEPENDENT_MASK,
        )  # fmt: skip
    if mask is not None:
        shape = visit.shape(mask)
        rank = len(shape)
        wanted = {rank - 2: visit.axes(0)[0], rank - 1: SequenceAxis(0, keys)}
        visit.demand(mask, tuple(wanted[axis].at(axis) for axis in sorted(wanted) if axis >= 0 and shape[axis] != 1))
    return [visit.axes(0)] * len(visit.node.outputs)


def _cross_attention(visit: NodeVisit, stated: AttentionInputs) -> list[Axes]:
    """An operator that computes a whole attention to keys and values that no token is part of."""
    axes, mask = visit.axes(stated.query), stated.mask
    place = stated.layout.index("sequence")
    if len(axes) != 1 or axes[0].axis != place or not axes[0].is_plain or not is_of_queries(axes):
        raise visit.refusal("its input does not have the sequence axis where the operator expects it")
    fixed = [index for index in (stated.key, stated.value) if visit.node.inputs[index] in visit.flow.fixed]
    if len(fixed) < 2 or stated.causal or (mask is not None and visit.kind(mask) is ValueKind.TOKEN):
        raise visit.refusal("its keys, values or mask change from call to call", code=Code.UNTRACEABLE_SEQUENCE)
    if mask is not None:
        shape = visit.shape(mask)
        rows = axes[0].at(len(shape) - 2)
        visit.demand(mask, (rows,) if len(shape) > 1 and shape[rows.axis] != 1 else ())
    return [axes] * len(visit.node.outputs)


def _fused(visit: NodeVisit, fused: FusedAttention) -> LengthVariable:
    """Note a fused attention, and return the length variable of its keys."""
    place = fused.inputs.layout.index("sequence")
    for index in (fused.inputs.query, fused.inputs.key, fused.inputs.value):
        axes = visit.axes(index)
        if (
            len(axes) != 1
            or axes[0].axis != place
            or not axes[0].is_plain
            or axes[0].variable.resolved() is not Length.NEW
        ):
            raise visit.refusal("its input does not have the sequence axis where the operator expects it",
                               at=visit.node.inputs[index])  # fmt: skip
    keys = LengthVariable(Length.TOTAL, at=visit.node.outputs[0].name or "")
    visit.flow.operands[visit.node, fused.inputs.key] = keys
    visit.flow.operands[visit.node, fused.inputs.value] = keys
    visit.flow.fused.append(fused)
    return keys
