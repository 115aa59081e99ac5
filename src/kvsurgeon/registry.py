"""Which passes there are: the built-in ones, and those that installed packages bring."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsurgeon.errors import PluginError
from kvsurgeon.plugins import Catalogue, Entry

BUILT_IN = {
    "inject": "kvsurgeon.passes.inject:Inject",
    "eject": "kvsurgeon.passes.eject:Eject",
    "retarget": "kvsurgeon.passes.retarget:Retarget",
    "without-mask": "kvsurgeon.passes.without_mask:WithoutMask",
    "causal-mask": "kvsurgeon.passes.causal_mask:CausalMask",
    "count-positions": "kvsurgeon.passes.count_positions:CountPositions",
    "last-logits": "kvsurgeon.passes.last_logits:LastLogits",
    "name-dims": "kvsurgeon.passes.name_dims:NameDims",
    "give-context": "kvsurgeon.passes.give_context:GiveContext",
    "narrow-ids": "kvsurgeon.passes.narrow_ids:NarrowIds",
    "widen-ids": "kvsurgeon.passes.narrow_ids:WidenIds",
    "without-nan-guards": "kvsurgeon.passes.nan_guards:WithoutNanGuards",
    "plain-gather": "kvsurgeon.passes.plain_gather:PlainGather",
    "raise-opset": "kvsurgeon.passes.raise_opset:RaiseOpset",
    "lower-opset": "kvsurgeon.passes.lower_opset:LowerOpset",
    "half-range-masks": "kvsurgeon.passes.half_range:half_range_masks",
    "fix-shapes": "kvsurgeon.passes.fix_shapes:FixShapes",
    "write-repeats": "kvsurgeon.passes.repeats:WriteRepeats",
    "write-divisions": "kvsurgeon.passes.write_divisions:WriteDivisions",
    "fuse-rotary": "kvsurgeon.passes.fuse_rotary:FuseRotary",
    "fuse-attention": "kvsurgeon.passes.fuse_attention:FuseAttention",
    "replicate-kv-heads": "kvsurgeon.passes.replicate_kv_heads:ReplicateKvHeads",
    "expand-gqa": "kvsurgeon.passes.expand_gqa:ExpandGqa",
    "merge-kv-heads": "kvsurgeon.passes.merge_kv_heads:MergeKvHeads",
    "share-kv-layers": "kvsurgeon.passes.share_kv_layers:ShareKvLayers",
    "position-ids": "kvsurgeon.passes.position_ids:PositionIds",
    "rename": "kvsurgeon.passes.rename:Rename",
}

COMMANDS = (
    "inspect",
    "run",
    "passes",
    "targets",
    "verify",
    "plot",
    "generate",
    "demo",
)  # names that a pass may not take


@dataclass(frozen=True, kw_only=True)
class PassEntry(Entry):
    """A pass that can be had by name."""

    def load(self) -> type[Any]:
        """Return the pass class.

        Raises:
            PluginError: It cannot be imported, or is no pass; the message names the pass and its package.
        """
        found = self.imported()
        if inspect.isclass(found):
            return self._checked(found)
        if inspect.isfunction(found):
            from kvsurgeon.interop.functions import as_pass_class

            return as_pass_class(found, self.name)
        raise PluginError(f"{self.spoken}: expected a pass class or a function, found {type(found).__name__}")

    def summary(self) -> str:
        """Return what is true after it, in a line, without importing it."""
        if not self.built_in:
            return f"From {self.package}."
        module, _, name = self.place.partition(":")
        path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        body = ast.parse(path.read_text("utf-8")).body
        defined = (node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef))
        docstrings = (ast.get_docstring(node) for node in defined if node.name == name)
        return (next(docstrings, None) or "").partition("\n")[0]

    def _checked(self, found: type[Any]) -> type[Any]:
        if not callable(getattr(found, "apply", None)):
            raise PluginError(f"{self.spoken}: expected a class with a method `apply`, found none")
        called = getattr(found, "name", self.name)
        if called != self.name:
            raise PluginError(f"{self.spoken}: the class says that it is called {called}; make the two names one")
        return found


PASSES = Catalogue(kind="pass", kinds="passes", entry=PassEntry, built_in=BUILT_IN, reserved=COMMANDS)
