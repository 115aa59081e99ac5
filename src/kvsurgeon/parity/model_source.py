"""Models to verify: where they come from, and sessions on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from kvsurgeon.io.local_functions import check_functions, nested_nodes
from kvsurgeon.io.locate import find_model, read_proto
from kvsurgeon.parity.arithmetic.float_model import float_model
from kvsurgeon.parity.arithmetic.wide_model import wide_model
from kvsurgeon.runtime import Optimization, Session, Source, open_session
from kvsurgeon.runtime.providers import CPU, find_provider
from kvsurgeon.runtime.session import folder_of


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model to verify.

    Attributes:
        name: Name in messages.
        source: The model as onnxruntime opens it.
        graph: The model without external weights.
        folder: Folder of the external weights.
        threads: Number of threads per operator.
        provider: Execution provider.
    """

    name: str
    source: Source
    graph: onnx.ModelProto
    folder: Path | None
    threads: int | None
    provider: str

    @classmethod
    def of(
        cls, source: Source, name: str, folder: str | Path | None, threads: int | None, provider: str = CPU
    ) -> ModelSource:
        """Read a model.

        Raises:
            UsageError: The installed onnxruntime has no such provider.
            InputError: The file does not exist.
            InvalidModelError: The file is not ONNX.
        """
        find_provider(provider)
        graph = load_graph(source)
        where = folder_of(source, folder)
        return cls(name=name, source=source, graph=graph, folder=where, threads=threads, provider=provider)

    @property
    def inner_values(self) -> tuple[str, ...]:
        """Names of the values that nodes compute, without the outputs, in order."""
        outputs = {value.name for value in self.graph.graph.output}
        names = (name for node in self.graph.graph.node for name in node.output if name)
        return tuple(name for name in names if name not in outputs)

    def in_floats(self) -> ModelSource | None:
        """Return the model in float32, or float64, without rounding to 8 bits; None if that is not possible."""
        wide = wide_model(self.graph)
        graph = None if wide is None else float_model(wide)
        return None if graph is None else replace(self, source=graph, graph=graph)

    def in_float32(self) -> ModelSource | None:
        """Return a model of 16 bits in float32; None if that is not possible."""
        graph = wide_model(self.graph)
        return None if graph is None else replace(self, source=graph, graph=graph)

    def open(self, optimization: Optimization, outputs: Sequence[str] = ()) -> Session:
        """Open the model, with some inner values as further outputs.

        Raises:
            KvsurgeonError: onnxruntime does not accept it.
        """
        source = with_outputs(self.graph, outputs) if outputs else self.source
        return open_session(
            source,
            folder=self.folder,
            threads=self.threads,
            optimization=optimization,
            arena=False,
            provider=self.provider,
            name=self.name,
        )  # two models of which each kept the memory of its largest call would need twice that


def load_graph(source: Source) -> onnx.ModelProto:
    """Return the model without its external weights.

    Raises:
        InputError: The file does not exist.
        InvalidModelError: The file is not ONNX.
    """
    graph = source if isinstance(source, onnx.ModelProto) else read_proto(find_model(source))
    check_functions(graph)
    return graph


def all_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes of a model, those of subgraphs and of local functions too."""
    return [node for graph in (model.graph, *model.functions) for node in nested_nodes(graph.node)]


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a model with some of its values as further outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    have = {output.name for output in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in have)
    return copy
