"""Copies of models."""

from __future__ import annotations

import onnx_ir as ir


def copy_model(model: ir.Model) -> ir.Model:
    """Return a copy of a model that shares its weights and has its `meta`, which `ir.Model.clone` leaves out."""
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy
