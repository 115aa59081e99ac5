"""All kinds of adversarial decoders, and the decoder of a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from adversarial_models import (
    content_kinds,
    input_kinds,
    length_functions,
    mask_kinds,
    mixing_kinds,
    output_kinds,
    padding_kinds,
    table_kinds,
)
from adversarial_models.decoder import Design, build, draw_design
from adversarial_models.draft import Draft
from adversarial_models.length_kinds import draw_length_kind

Draw = Callable[..., Draft]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One decoder on disk."""

    number: int
    benign: bool  # like an adversarial one, but causal and independent of the total length
    kind: str
    place: str
    threshold: int | None
    heads: int
    variant: str
    base: str  # how the rest of the decoder is written
    padded: bool  # whether it is compared with padding too; scores of padding, as outputs, are those of a call
    path: Path


def _draws() -> Mapping[str, tuple[Draw, bool]]:
    """Return how each kind is drawn, and whether it has a benign counterpart."""
    draws: dict[str, tuple[Draw, bool]] = {}
    for name, function in length_functions.FUNCTIONS.items():
        draws[f"length/{name}"] = (partial(_length, function), True)
    for name, mask in mask_kinds.KINDS.items():
        draws[f"mask/{name}"] = (partial(_mask, mask), True)
    for name, table in table_kinds.KINDS.items():
        draws[f"table/{name}"] = (partial(_table, table), True)
    for name, mixing in mixing_kinds.KINDS.items():
        draws[f"mixing/{name}"] = (partial(_mixing, mixing), True)
    for name, given in input_kinds.KINDS.items():
        draws[f"input/{name}"] = (partial(_input, given), True)
    for name, padding in padding_kinds.KINDS.items():
        draws[f"padding/{name}"] = (partial(_padding, padding), True)
    for name, content in content_kinds.KINDS.items():
        draws[f"content/{name}"] = (partial(_content, content), True)
    for name, output in output_kinds.KINDS.items():
        draws[f"output/{name}"] = (partial(_output, output), False)
    return draws


def _length(function: length_functions.LengthFunction, random: Random, design: Design, benign: bool) -> Draft:
    return draw_length_kind(random, function, design, benign=benign)


def _mask(kind: mask_kinds.MaskKind, random: Random, design: Design, benign: bool) -> Draft:
    return mask_kinds.draw_mask_kind(random, kind, design, benign=benign)


def _table(kind: table_kinds.TableKind, random: Random, design: Design, benign: bool) -> Draft:
    return table_kinds.draw_table_kind(random, kind, design, benign=benign)


def _mixing(kind: mixing_kinds.MixingKind, random: Random, design: Design, benign: bool) -> Draft:
    return mixing_kinds.draw_mixing_kind(random, kind, design, benign=benign)


def _input(kind: input_kinds.InputKind, random: Random, design: Design, benign: bool) -> Draft:
    return input_kinds.draw_input_kind(random, kind, design, benign=benign)


def _padding(kind: padding_kinds.PaddingKind, random: Random, design: Design, benign: bool) -> Draft:
    return padding_kinds.draw_padding_kind(random, kind, design, benign=benign)


def _content(kind: content_kinds.ContentKind, random: Random, design: Design, benign: bool) -> Draft:
    return content_kinds.draw_content_kind(random, kind, design, benign=benign)


def _output(kind: output_kinds.OutputKind, random: Random, design: Design, benign: bool) -> Draft:
    return output_kinds.draw_output_kind(random, kind, design)


KINDS = _draws()


def kind_of(seed: int, number: int) -> str:
    """Return the kind of a number: all kinds in turn, in an order drawn from the seed."""
    names = list(KINDS)
    Random(seed).shuffle(names)
    return names[number % len(names)]


def write_sample(seed: int, number: int, folder: Path, *, benign: bool, kind: str | None = None) -> Sample | None:
    """Write the decoder of a number, or its benign counterpart; None if the kind has none."""
    kind = kind or kind_of(seed, number)
    draw, has_benign = KINDS[kind]
    if benign and not has_benign:
        return None
    random = Random(f"{seed} {number} {kind}")
    design = draw_design(random, heads=random.choice([1, 2, 2, 4, 4, 8, 32]))
    draft = draw(random, design, benign)
    write, model = build(draft.design, random)
    design = draft.design
    base = (
        f"{design.positions} {design.norm} {design.causal} {design.masking} total:{design.total} opset:{design.opset}"
    )
    base += f" kv:{design.kv_heads}" + (" mask" if design.has_mask else "")
    return Sample(
        number=number,
        benign=benign,
        kind=kind,
        place=draft.place,
        threshold=draft.threshold,
        heads=design.heads,
        variant=draft.variant,
        base=base,
        padded=design.has_mask and not kind.startswith("output/"),
        path=write.save(model, folder),
    )
