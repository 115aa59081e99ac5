"""A plain function as a pass: what it takes first says in which library it is written, the rest are its options."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import field, fields, make_dataclass
from typing import Any

import onnx_ir as ir

from kvsurgeon.errors import PluginError
from kvsurgeon.passes.contract import Changed, Outcome, Pass, Subject, Unchanged

Edit = Callable[..., Any]
Apply = Callable[[Edit, Subject, Mapping[str, Any]], Outcome]


def as_pass_class(edit: Edit, name: str | None = None) -> type[Pass]:
    """Return a pass class that does what the function `edit` does.

    The annotation of its first parameter decides: `gs.Graph` (edited in place, or a new one returned), `ir.Model`
    (likewise), or `Subject` (an `Outcome`, or None if it changed something). Its further parameters become fields.

    Raises:
        PluginError: It takes none of the three, or a parameter has a name that every pass uses.
    """
    name = name or getattr(edit, "__name__", "edit").replace("_", "-")
    first, *others = inspect.signature(edit).parameters.values()
    annotations = _annotations(edit)
    apply = _kind(name, annotations.get(first.name))
    taken = {"name", "apply"} & {one.name for one in others}
    if taken:
        raise PluginError(f"pass {name}: a parameter may not be called {min(taken)}; give it another name")

    def apply_edit(self: Any, subject: Subject) -> Outcome:
        return apply(edit, subject, {one.name: getattr(self, one.name) for one in fields(self)})

    options = [
        (one.name, annotations.get(one.name, str))
        if one.default is one.empty
        else (one.name, annotations.get(one.name, type(one.default)), field(default=one.default))
        for one in others
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    members = {"name": name, "apply": apply_edit, "__doc__": inspect.getdoc(edit) or f"Apply `{name}`."}
    made: type[Pass] = make_dataclass(name, options, frozen=True, kw_only=True, namespace=members)
    return made


def _annotations(edit: Edit) -> dict[str, Any]:
    """Return the function's annotations; as they are written if they name what only a type checker imports."""
    try:
        return typing.get_type_hints(edit)
    except NameError:
        return dict(getattr(edit, "__annotations__", {}))


def _kind(name: str, annotation: Any) -> Apply:
    """Return how a function is applied that takes an `annotation` first."""
    dim_names = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    module = "" if isinstance(annotation, str) else getattr(annotation, "__module__", "")
    if annotation is Subject or dim_names == "Subject":
        return _apply_to_subject
    if annotation is ir.Model or dim_names in ("ir.Model", "onnx_ir.Model"):
        return _apply_to_model
    if module.startswith("onnx_graphsurgeon") or dim_names in ("gs.Graph", "onnx_graphsurgeon.Graph"):
        return _apply_to_graph
    raise PluginError(
        f"pass {name}: expected a function whose first parameter is annotated as gs.Graph, ir.Model or Subject, "
        f"found {dim_names or 'no annotation'}; annotate it"
    )


def _apply_to_subject(edit: Edit, subject: Subject, options: Mapping[str, Any]) -> Outcome:
    outcome = edit(subject, **options)
    return Changed(edits=1) if outcome is None else outcome


def _apply_to_model(edit: Edit, subject: Subject, options: Mapping[str, Any]) -> Outcome:
    before = _nodes(subject.model)
    result = edit(subject.model, **options)
    if result is not None and not isinstance(result, ir.Model):
        raise TypeError(f"expected an ir.Model or None from it, found {type(result).__name__}")
    if result is not None and result is not subject.model:
        result.meta.update({key: value for key, value in subject.model.meta.items() if key not in result.meta})
        subject.model = result
    return Changed(edits=_edits(before, _nodes(subject.model)))


def _apply_to_graph(edit: Edit, subject: Subject, options: Mapping[str, Any]) -> Outcome:
    import onnx_graphsurgeon as gs

    from kvsurgeon.interop.graph_bridge import Loan

    loan = Loan(subject.model)
    result = edit(loan.graph, **options)
    if result is not None and not isinstance(result, gs.Graph):
        raise TypeError(f"expected a gs.Graph or None from it, found {type(result).__name__}")
    model = loan.take_back(loan.graph if result is None else result, subject.folder)
    if model is None:
        return Unchanged(reason="the function left the graph as it was")
    model.meta.update(subject.model.meta)
    edits = _edits(_nodes(subject.model), _nodes(model))
    subject.model = model
    return Changed(edits=edits)


def _nodes(model: ir.Model) -> Counter[bytes]:
    return Counter(ir.to_proto(node).SerializeToString(deterministic=True) for node in model.graph)


def _edits(before: Counter[bytes], after: Counter[bytes]) -> int:
    """Return how many nodes were added, removed or altered; one at least, where something else was changed."""
    return max(1, (before - after).total(), (after - before).total())
