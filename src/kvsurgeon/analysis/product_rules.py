"""Products on token data: projections, scores, and the sum over keys, decided by which labels hold tokens."""

from __future__ import annotations

from collections.abc import Iterable

from kvsurgeon.analysis.elementwise_rules import brought
from kvsurgeon.analysis.token_flow import PER_CALL, ContextProduct, FusedAttention, NodeVisit, ScoreProduct
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.ops.contraction import PACKED, PRODUCTS, Contraction, Labels, contraction_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

Held = dict[str, SequenceAxis]  # label -> the sequence axis that it names


def product(step: NodeVisit) -> list[Axes]:
    """`MatMul`, `Gemm`, `Einsum` and their kin."""
    found = contraction_of(step.call)
    if found is None:
        raise step.refusal("a product of more than two tensors, or of tensors of unknown rank")
    if step.node.op_type == "DynamicQuantizeMatMul":
        step.assume(PER_CALL)
    if step.node.op_type in PACKED:
        return [_projected(step)]
    left, right = _held(step, found.left, found.left_labels), _held(step, found.right, found.right_labels)
    _bring(step, found, left, right)
    beside: Held = {}
    for label in found.summed:
        if label in left and label in right:
            _sum_away(step, found, label, left, right)
        elif label in left or label in right:
            beside |= _sum_beside(step, found, label, {**left, **right}[label])
    kept = _kept(step, found, left, right)
    for index, labels in ((found.left, found.left_labels), (found.right, found.right_labels)):
        if step.kind(index) is not ValueKind.TOKEN:
            _align(step, index, labels, {**kept, **beside})
    _align_further(step, found, kept)
    return [tuple(kept[label].at(axis) for axis, label in enumerate(found.result_labels) if label in kept)]


def _projected(step: NodeVisit) -> Axes:
    """A product with packed weights sums the last axis of its first input."""
    _check_parameters(step, range(1, len(step.node.inputs)))
    for axis in step.axes(0):
        if axis.axis == len(step.shape(0)) - 1:
            raise step.mixing()
    return step.axes(0)


def _held(step: NodeVisit, index: int, labels: Labels) -> Held:
    return {labels[axis.axis]: axis for axis in step.axes(index)} if step.kind(index) is ValueKind.TOKEN else {}


def _bring(step: NodeVisit, found: Contraction, left: Held, right: Held) -> None:
    """Context may bring an axis of length that token data does not have: relative positions, to queries or keys."""
    sides = ((found.left, found.left_labels, left, right), (found.right, found.right_labels, right, left))
    for index, labels, mine, theirs in sides:
        if step.kind(index) is ValueKind.TOKEN:
            continue
        beside = any(theirs[label].is_plain for label in labels if label in theirs and label not in found.summed)
        new = {
            label: brought(step, axis, size)
            for axis, (label, size) in enumerate(zip(labels, step.shape(index), strict=True))
            if label not in theirs
            and (step.holds_length(size) or (beside and size == step.flow.length and label not in found.summed))
        }
        if any(label in found.summed for label in new):
            raise step.mixing()
        if new:
            other = found.right if index == found.left else found.left
            stream = [label for label, axis in theirs.items() if axis.role.resolved() is Length.NEW]
            theirs.update({label: step.opened(theirs[label], other) for label in stream})
        mine.update(new)


def _sum_away(step: NodeVisit, found: Contraction, label: str, left: Held, right: Held) -> None:
    """Keys are summed against values: weights say how much of each."""
    one, other = left[label], right[label]
    if not one.bare.is_plain or not other.bare.is_plain or (one.ahead, one.behind) != (other.ahead, other.behind):
        raise step.mixing()
    is_left = len(left) > len(right) if one.border else one.role.resolved() is not Length.NEW
    keys, values = (one, other) if is_left else (other, one)
    if keys.role.resolved() is Length.NEW or not (
        values.role.resolved() is Length.NEW or step.flow.is_bordered(values.role)
    ):
        raise _counted(step, values) or step.mixing()  # a state summed over tokens, as linear attention has
    weights, value = (found.left, found.right) if is_left else (found.right, found.left)
    if keys.role.root().bias or not _sees_keys(step, keys.role):
        raise step.mixing()
    if one.border and not keys.role.agree(values.role):
        raise step.mixing()
    keys.role.root().length = Length.TOTAL
    for score in step.flow.scores:
        _settle(score)
    if not one.border:
        step.flow.operands[step.node, value] = keys.role
    step.flow.products.append(ContextProduct(node=step.node, weights=weights, value=value, role=keys.role))


def _counted(step: NodeVisit, axis: SequenceAxis) -> UnsupportedError | None:
    """Why tokens have no role: what they are made of is a number of other tokens, which were compared with them."""
    for score in step.flow.scores:
        roles = score.left_role.root(), score.right_role.root()
        if score.node.op_type in PRODUCTS or axis.role.root() not in roles:
            continue
        other = roles[1] if axis.role.root() is roles[0] else roles[0]
        counts = [node for node, role in step.flow.along_keys.items() if role.root() is other]
        if counts:
            return UnsupportedError(
                "positions, or other numbers, come from counting tokens that are compared with each other, and a step "
                "would have to be given all of them",
                at=counts[0].outputs[0].name,
                expected="positions by place, by the mask, or given",
                found=f"{counts[0].op_type} of {score.node.op_type}",
            )
    return None


def _sum_beside(step: NodeVisit, found: Contraction, label: str, keys: SequenceAxis) -> Held:
    """Keys are summed against context, such as values that depend on the distance: right where they are keys."""
    context, labels = (
        (found.right, found.right_labels)
        if step.kind(found.left) is ValueKind.TOKEN
        else (found.left, found.left_labels)
    )
    is_context = step.kind(context) is ValueKind.CONTEXT and step.holds_length(step.shape(context)[labels.index(label)])
    if not is_context or keys.role.root().bias or not _sees_keys(step, keys.role):
        raise step.mixing()
    step.works_along(keys)
    return {label: keys}


def _sees_keys(step: NodeVisit, role: LengthVariable) -> bool:
    roots = {id(side.root()) for score in step.flow.scores for side in (score.left_role, score.right_role)}
    return id(role.root()) in roots


def _settle(score: ScoreProduct) -> None:
    """Once one side of the scores is the keys', the other is the queries'."""
    left, right = score.left_role.root(), score.right_role.root()
    if left.length is Length.TOTAL and right.length is None:
        right.length = Length.NEW
    elif right.length is Length.TOTAL and left.length is None:
        left.length = Length.NEW


def _kept(step: NodeVisit, found: Contraction, left: Held, right: Held) -> Held:
    """The labels of the result that hold tokens; two of the stream side by side are scores."""
    kept: Held = {}
    for label in found.result_labels:
        mine, theirs = left.get(label), right.get(label)
        if mine is not None and theirs is not None:
            kept[label] = step.meet((found.left, mine), (found.right, theirs))
        elif (held := mine or theirs) is not None:
            kept[label] = held
    return _met(step, found, left, right, kept)


def _met(step: NodeVisit, found: Contraction, left: Held, right: Held, kept: Held) -> Held:
    stream = [label for label, axis in kept.items() if axis.role.resolved() is Length.NEW]
    if len(stream) < 2:
        return _met_bordered(step, found, left, right, kept)
    first, second, *more = stream
    if first in right:
        first, second = second, first
    if more or first in right or second in left or first not in left or second not in right:
        raise step.mixing()
    name = step.node.outputs[0].name or ""
    left_role, right_role = LengthVariable(at=name), LengthVariable(at=name)
    step.flow.scores.append(
        ScoreProduct(node=step.node, left=found.left, right=found.right, left_role=left_role, right_role=right_role)
    )
    step.flow.operands[step.node, found.left] = left_role
    step.flow.operands[step.node, found.right] = right_role
    return {**kept, first: kept[first].with_role(left_role), second: kept[second].with_role(right_role)}


def _met_bordered(step: NodeVisit, found: Contraction, left: Held, right: Held, kept: Held) -> Held:
    """Queries meet keys that have rows of the model's own beside them."""
    sides = ((left, found.left), (right, found.right))
    for (queries, index), (keys, _) in (sides, sides[::-1]):
        if len(queries) != 1 or len(keys) != 1:
            continue
        (label, query), (key,) = *queries.items(), keys.values()
        if label in keys or query.role.resolved() is not Length.NEW or not step.flow.is_bordered(key.role):
            continue
        role = step.flow.operands[step.node, index] = LengthVariable(at=step.node.outputs[0].name or "")
        left_role, right_role = (role, key.role) if queries is left else (key.role, role)
        step.flow.scores.append(
            ScoreProduct(node=step.node, left=found.left, right=found.right, left_role=left_role, right_role=right_role)
        )
        return {**kept, label: query.with_role(role)}
    return kept


def _align(step: NodeVisit, index: int, labels: Labels, kept: Held) -> None:
    """Demand of context what the tokens it is multiplied with ask of it."""
    wanted = []
    for axis, (label, size) in enumerate(zip(labels, step.shape(index), strict=True)):
        if label in kept and size != 1:
            wanted.append(kept[label].at(axis))
    step.demand(index, tuple(wanted))


def _align_further(step: NodeVisit, found: Contraction, kept: Held) -> None:
    """The bias of a `Gemm` is added to its result; what else a product reads are scales and zero points."""
    further = [index for index in range(len(step.node.inputs)) if index not in (found.left, found.right)]
    _check_parameters(step, further)
    if step.node.op_type not in ("Gemm", "FusedGemm") or not step.call.given(2):
        return
    shape = step.shape(2)
    labels = found.result_labels[len(found.result_labels) - len(shape) :]
    _align(step, 2, labels, kept)


def _check_parameters(step: NodeVisit, indices: Iterable[int]) -> None:
    for index in indices:
        if step.kind(index) is ValueKind.TOKEN and step.axes(index):
            raise step.refusal(f"its input {index} is token data", at=step.node.inputs[index])


def attention(step: NodeVisit) -> list[Axes]:
    """`Attention` of opset 23, [batch, heads, sequence, head_dim] or [batch, sequence, hidden], with no past."""
    if step.node.domain == "com.microsoft":
        raise step.refusal("a fused attention that also projects is not supported yet")
    four = len(step.shape(0)) == 4
    if any(value is not None for value in step.node.inputs[4:6]):
        raise step.refusal("the model already has a cache", hint="inject a model exported without one")
    if len([value for value in step.node.outputs if value.name and value.uses()]) > 1:
        raise step.refusal("its further outputs are used")
    layout = ("batch", "kv_heads", "sequence", "head_dim") if four else ("batch", "sequence", "hidden")
    mask = 3 if len(step.node.inputs) > 3 and step.node.inputs[3] is not None else None
    keys = _fused(step, FusedAttention(
        node=step.node, query=0, key=1, value=2, mask=mask, layout=layout,
        causal=bool(step.call.integer("is_causal", 0)),
        heads_beside=1 if four else step.call.integer("kv_num_heads", 1),
    ))  # fmt: skip
    if mask is not None and step.kind(mask) is ValueKind.TOKEN:
        raise step.refusal(
            "its mask is made of tokens, and would have to be remembered with the keys", at=step.node.inputs[mask],
            expected="a mask that is given for all tokens so far, or computed from lengths",
        )  # fmt: skip
    if mask is not None:
        shape = step.shape(mask)
        rank = len(shape)
        query = step.axes(0)[0]
        wanted = {rank - 2: query, rank - 1: SequenceAxis(0, keys)}
        step.demand(mask, tuple(wanted[axis].at(axis) for axis in sorted(wanted) if axis >= 0 and shape[axis] != 1))
    return [step.axes(0)] * len(step.node.outputs)


def _fused(step: NodeVisit, fused: FusedAttention) -> LengthVariable:
    """Note a fused attention, and return the role of its keys."""
    place = fused.layout.index("sequence")
    for index in (fused.query, fused.key, fused.value):
        axes = step.axes(index)
        if len(axes) != 1 or axes[0].axis != place or not axes[0].is_plain or axes[0].role.resolved() is not Length.NEW:
            raise step.refusal("its input does not hold the tokens where the operator expects them",
                               at=step.node.inputs[index])  # fmt: skip
    keys = LengthVariable(Length.TOTAL, at=step.node.outputs[0].name or "")
    step.flow.operands[step.node, fused.key] = keys
    step.flow.operands[step.node, fused.value] = keys
    step.flow.fused.append(fused)
    return keys
