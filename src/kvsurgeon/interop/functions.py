"""Plain functions as passes: the first parameter is the graph, in one of three libraries, and the rest are options."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Any

import onnx_ir as ir

from kvsurgeon.errors import PluginError
from kvsurgeon.passes.contract import Changed, Outcome, Pass, Subject, Unchanged

Edit = Callable[..., Any]
Apply = Callable[[Edit, Subject, Mapping[str, Any]], Outcome]


@cache
def as_pass_class(edit: Edit, name: str | None = None) -> type[Pass]:
    """Return a pass class that applies a function.

    The annotation of its first parameter is `gs.Graph` or `ir.Model`, which the function edits or replaces by its
    result, or `Subject`, for which it returns an `Outcome`, or None after a change. Further parameters become fields.

    Raises:
        PluginError: The first parameter is none of the three, or a parameter is called `name` or `apply`.
    """
    name = name or getattr(edit, "__name__", "edit").replace("_", "-")
    first, *others = inspect.signature(edit).parameters.values()
    annotations = _annotations(edit)
    apply = _apply_function(name, annotations.get(first.name))
    taken = {"name", "apply"} & {one.name for one in others}
    if taken:
        raise PluginError(f"pass {name}: no parameter can be called {min(taken)}; rename it")

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
    pass_class: type[Pass] = make_dataclass(name, options, frozen=True, kw_only=True, namespace=members)
    return pass_class


def _annotations(edit: Edit) -> dict[str, Any]:
    """Return the annotations of a function; as text if they use names that only a type checker imports."""
    try:
        return typing.get_type_hints(edit)
    except NameError:
        return dict(getattr(edit, "__annotations__", {}))


def _apply_function(name: str, annotation: Any) -> Apply:
    """Return what applies a function whose first parameter has this annotation."""
    written = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    module = "" if isinstance(annotation, str) else getattr(annotation, "__module__", "")
    if annotation is Subject or written == "Subject":
        return _apply_to_subject
    if annotation is ir.Model or written in ("ir.Model", "onnx_ir.Model"):
        return _apply_to_model
    if module.startswith("onnx_graphsurgeon") or written in ("gs.Graph", "onnx_graphsurgeon.Graph"):
        return _apply_to_graph
    raise PluginError(
        f"pass {name}: expected a function whose first parameter is annotated as gs.Graph, ir.Model or Subject, "
        f"found {written or 'no annotation'}; annotate it"
    )


def _apply_to_subject(edit: Edit, subject: Subject, options: Mapping[str, Any]) -> Outcome:
    outcome = edit(subject, **options)
    return Changed(edits=1) if outcome is None else outcome


def _apply_to_model(edit: Edit, subject: Subject, options: Mapping[str, Any]) -> Outcome:
    before = _nodes(subject.model)
    result = edit(subject.model, **options)
    if result is not None and not isinstance(result, ir.Model):
        raise TypeError(f"expected it to return an ir.Model or None, found {type(result).__name__}")
    if result is not None and result is not subject.model:
        result.meta.update({key: value for key, value in subject.model.meta.items() if key not in result.meta})
        subject.model = result
    return Changed(edits=_edits(before, _nodes(subject.model)))


def _apply_to_graph(edit: Edit, subject: Subject, options: Mapping[str, Any]) -> Outcome:
    import onnx_graphsurgeon as gs

    from kvsurgeon.interop.graph_bridge import GraphBridge

    bridge = GraphBridge(subject.model)
    result = edit(bridge.graph, **options)
    if result is not None and not isinstance(result, gs.Graph):
        raise TypeError(f"expected it to return a gs.Graph or None, found {type(result).__name__}")
    model = bridge.to_model(bridge.graph if result is None else result, subject.folder)
    if model is None:
        return Unchanged(reason="the function did not change the graph")
    model.meta.update(subject.model.meta)
    edits = _edits(_nodes(subject.model), _nodes(model))
    subject.model = model
    return Changed(edits=edits)


def _nodes(model: ir.Model) -> Counter[bytes]:
    return Counter(ir.to_proto(node).SerializeToString(deterministic=True) for node in model.graph)


def _edits(before: Counter[bytes], after: Counter[bytes]) -> int:
    """Return the number of nodes that were added, removed or changed; at least 1, for other changes."""
    return max(1, (before - after).total(), (after - before).total())
