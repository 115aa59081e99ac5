"""Decoders whose score products feed several value products, as differential attention does.

Each product reads a block of the value heads, repeated until there is one for each key head, or all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from decoders import Config, Decoder

SPLITS = ("Split", "Slice", "Gather")
TILES = ("Tile", "Concat", "Expand")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the values of the products are written.

    Attributes:
        products: Number of value products of each score product.
        blocks: Whether each product reads a block of its own of the value heads, or all reads all.
        split: Operator that takes the block.
        tile: Operator that repeats it.
        kv_heads: Number of key heads and value heads.
        groups: Number of query heads for each.
    """

    products: int
    blocks: bool
    split: str
    tile: str
    kv_heads: int
    groups: int


class SeveralProducts(Decoder):
    """The decoder with several value products for each score product."""

    def __init__(self, form: Form, seed: int = 0) -> None:
        heads = form.kv_heads * form.groups
        super().__init__(Config(layers=2, windowed=(), heads=heads, kv_heads=form.kv_heads, head_dim=4, seed=seed))
        self.form = form

    def attention(self, layer: int, hidden: str) -> str:
        config, graph = self.config, self.graph
        query = self.rotate(layer, self.heads(hidden, "query", config.heads))
        key = self.repeat(layer, self.rotate(layer, self.heads(hidden, "key", config.kv_heads, gain=2.0)))
        value = self.heads(hidden, "value", config.kv_heads)
        scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
        bias = graph.op("Where", self.visible(layer), self.number(0.0), self.number(-1e4))
        weights = graph.op("Softmax", graph.op("Add", graph.op("Mul", scores, self.scale(layer)), bias), axis=-1)
        result = ""
        for number, read in enumerate(self.values_of_products(value)):
            product = graph.op("MatMul", weights, self.repeat(layer, read))
            scaled = graph.op("Mul", product, self.number(1.0 - 0.7 * number))
            result = graph.op("Add", result, scaled) if result else scaled
        merged = graph.op("Transpose", result, perm=[0, 2, 1, 3])
        flat = graph.op("Reshape", merged, graph.constant([0, 0, config.heads * config.head_dim]))
        return graph.op("MatMul", flat, self.weight("out", config.heads * config.head_dim, config.hidden))

    def values_of_products(self, value: str) -> Iterator[str]:
        """Yield the values of each product, `[B, kv_heads, S, head_dim]`."""
        form, graph = self.form, self.graph
        if not form.blocks:
            yield from [value] * form.products
            return
        size = form.kv_heads // form.products
        parts = graph.split(value, form.products, axis=1) if form.split == "Split" else []
        for number in range(form.products):
            start, end = number * size, (number + 1) * size
            if parts:
                part = parts[number]
            elif form.split == "Slice":
                part = graph.op("Slice", value, graph.constant([start]), graph.constant([end]), graph.constant([1]))
            else:
                part = graph.op("Gather", value, graph.constant(list(range(start, end))), axis=1)
            yield self.tiled(part)

    def tiled(self, part: str) -> str:
        form, graph = self.form, self.graph
        if form.tile == "Tile":
            return graph.op("Tile", part, graph.constant([1, form.products, 1, 1]))
        if form.tile == "Concat":
            return graph.op("Concat", *[part] * form.products, axis=1)
        wide = graph.op("Unsqueeze", part, graph.constant([1]))
        times = graph.op("Expand", wide, graph.constant([1, form.products, 1, 1, 1]))
        return graph.op("Reshape", times, graph.constant([0, form.kv_heads, -1, self.config.head_dim]))


def forms(count: int, seed: int = 0) -> list[Form]:
    """Return different forms, drawn at random."""
    random = np.random.default_rng(seed)
    found: dict[Form, None] = {}
    while len(found) < count:
        products, blocks = int(random.choice([2, 3])), bool(random.random() < 0.8)
        kv_heads = products * int(random.choice([1, 2]))
        form = Form(
            products=products, blocks=blocks, split=str(random.choice(SPLITS)), tile=str(random.choice(TILES)),
            kv_heads=kv_heads, groups=int(random.choice([1, 2, 4])),
        )  # fmt: skip
        found[form] = None
    return list(found)


def decoder(form: Form, seed: int = 0) -> onnx.ModelProto:
    """Return the decoder of a form."""
    return SeveralProducts(form, seed).model()
