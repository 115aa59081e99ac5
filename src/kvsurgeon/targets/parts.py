"""Names and checks of the targets that write further models next to the decoder: encoders and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Set

from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import EMBEDDING, EMBEDDINGS, ENCODER, Incompatibility

HIDDEN = "encoder_hidden_states"
MASK = "encoder_attention_mask"
OUTPUT = "last_hidden_state"
USUAL_NAMES = RenameIo(names=("decoder_input_ids:input_ids", "decoder_attention_mask:attention_mask"))


def check_layers(model: ModelInfo) -> Iterator[Incompatibility]:
    """Yield an incompatibility unless each layer has self-attention and cross-attention, which clients count by one."""
    cross = len(model.cross_attention)
    if cross != len(model.cache) or len({pair.kind for pair in model.cache}) != 2:
        yield Incompatibility(
            "expected keys and values of self-attention and of cross-attention in each layer, "
            f"found {len(model.cache)} and {cross}"
        )


def check_shapes(model: ModelInfo) -> Iterator[Incompatibility]:
    """Yield an incompatibility unless keys and values of both kinds of attention have the same heads and head_dim."""
    for tensor in model.cross_attention:
        if ((tensor.dims[1],), (tensor.dims[3],)) != (model.kv_heads, model.head_dims):
            yield Incompatibility(
                f"expected keys and values of cross-attention of {list(model.kv_heads)} heads and head_dim "
                f"{list(model.head_dims)}, as of self-attention, found {list(tensor.dims)}",
                at=tensor.name,
            )
            return


def check_output(part: str, model: ModelInfo, name: str) -> Iterator[Incompatibility]:
    """Yield an incompatibility unless a further model has an output of that name."""
    if model.output(name) is None:
        found = ", ".join(f"`{one.name}`" for one in model.outputs)
        yield Incompatibility(f"{part}: expected an output `{name}`, found {found}")


def check_encoder(model: ModelInfo, inputs: frozenset[str]) -> Iterator[Incompatibility]:
    """Yield what the client cannot feed or read of the encoder."""
    encoder = model.parts.get(ENCODER)
    if encoder is None:
        return
    for name in sorted(set(encoder.input_names) - inputs):
        known = ", ".join(f"`{one}`" for one in sorted(inputs))
        yield Incompatibility(f"encoder: expected no inputs but {known}, found another", at=name)
    yield from check_output("encoder", encoder, OUTPUT)


def check_embedding(model: ModelInfo, ids: Set[str]) -> Iterator[Incompatibility]:
    """Yield what the client cannot feed or read of the embedding of token ids, whose ids have one of these types."""
    embedding, given = model.parts.get(EMBEDDING), model.input(EMBEDDINGS)
    if embedding is None or given is None:
        return
    (name, *others) = embedding.input_names
    if name != "input_ids" or others:
        found = ", ".join(f"`{one}`" for one in embedding.input_names)
        yield Incompatibility(f"embedding: expected the input `input_ids`, found {found}")
    elif embedding.inputs[0].dtype not in ids:
        expected = " or ".join(sorted(ids))
        yield Incompatibility(f"embedding: expected {expected}, found {embedding.inputs[0].dtype}", at=name)
    yield from check_output("embedding", embedding, EMBEDDINGS)
    output = embedding.output(EMBEDDINGS)
    if output is not None and (output.dtype, output.dims[-1]) != (given.dtype, given.dims[-1]):
        yield Incompatibility(
            f"embedding: expected {given.dtype} of width {given.dims[-1]}, as the decoder takes, "
            f"found {output.dtype} of width {output.dims[-1]}",
            at=EMBEDDINGS,
        )
