"""An input that says which row of the static cache each sequence of a call has, run as a server would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import ONE_OF_EACH, after, export
from laws import difference, in_onnxruntime

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.interface.add_batch_index import AddBatchIndex
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.passes.opset.raise_opset import RaiseOpset

PER_SEQUENCE = Inject(cache="static", past_length="per-sequence")
ROWS, CAPACITY, STALE = 4, 40, 7.0


class Server:
    """Buffers of four rows, and the tokens so far of the sequence in each row in use."""

    def __init__(self, original: onnx.ModelProto, model: onnx.ModelProto) -> None:
        self.run, self.alone = in_onnxruntime(model), in_onnxruntime(original)
        self.texts: dict[int, list[int]] = {}
        self.names, self.names_alone = ({value.name for value in one.graph.input} for one in (model, original))
        self.buffers = {}
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            if dims[0].dim_param == "full_batch_size":
                shape = [ROWS, dims[1].dim_value, CAPACITY, dims[3].dim_value]
                self.buffers[value.name] = np.full(shape, STALE, np.float32)

    def call(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Run as many tokens of each of these rows, in this order, and check logits and the rows of all others."""
        rows, new = list(tokens), len(next(iter(tokens.values())))
        pasts = np.array([len(self.texts.get(row, ())) for row in rows])
        feeds = {
            "input_ids": np.array(list(tokens.values()), np.int64),
            "batch_index": np.array(rows, np.int64)[:, None],
            "past_sequence_length": pasts,
            "position_ids": pasts[:, None] + np.arange(new),
            "attention_mask": np.ones((len(rows), CAPACITY), np.int64),
        }
        found = self.run({name: array for name, array in feeds.items() if name in self.names} | self.buffers)
        for name, before in self.buffers.items():
            after = found[name.replace("past_key_values", "present")]
            others = [row for row in range(ROWS) if row not in rows]
            np.testing.assert_array_equal(after[others], before[others])
            self.buffers[name] = after
        for place, row in enumerate(rows):
            text = self.texts.setdefault(row, [])
            text += tokens[row]
            one = np.array([text])
            given = {"input_ids": one, "attention_mask": np.ones_like(one), "position_ids": np.arange(len(text))[None]}
            expected = self.alone({name: array for name, array in given.items() if name in self.names_alone})
            assert difference(found["logits"][place], expected["logits"][0, -new:]) < 1e-5


def serve(original: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Let sequences join, decode in any order of rows, and leave."""
    server, random = Server(original, model), np.random.default_rng(0)

    def tokens(*rows: int, count: int = 1) -> dict[int, list[int]]:
        return {row: random.integers(3, 20, count).tolist() for row in rows}

    server.call(tokens(2, count=7))
    server.call(tokens(0, count=3))
    server.call(tokens(2, 0))
    server.call(tokens(3, 1, count=5))
    server.call(tokens(1, 3, 0, 2))
    del server.texts[0]  # it leaves, and another one joins
    server.call(tokens(0, count=9))
    server.call(tokens(3, 0))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_sequences_join_and_leave_in_any_rows(name):
    serve(export(name), after(export(name), PER_SEQUENCE, AddBatchIndex()))


def test_tensor_scatter_updates_the_selected_rows():
    original = export("llama_dynamo_sdpa")
    serve(original, after(original, RaiseOpset(opset=24), PER_SEQUENCE, AddBatchIndex()))


@pytest.mark.parametrize("fused", [False, True])
def test_the_verifier_and_continuous_batches_give_each_sequence_its_row(fused):
    original = Decoder(Config(layers=2, head_dim=16, max_length=256)).model()
    passes = [Inject(cache="static", past_length="mask"), FuseAttention(padding="lengths")] if fused else [PER_SEQUENCE]
    report = verify(original, after(original, *passes, AddBatchIndex()), threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    assert any("ragged" in one.scenario for one in report.comparisons)


def test_rows_that_an_input_chooses_are_not_taken_for_those_of_tokens():
    with pytest.raises(UnsupportedError, match="may not be written directly after those of the past"):
        after(export("llama_dynamo_sdpa"), PER_SEQUENCE, AddBatchIndex(), RemoveCache())


def test_a_layout_with_another_first_axis_is_refused():
    layout = ("sequence", "kv_heads", "batch", "head_dim")
    with pytest.raises(UnsupportedError, match=r"no row for each sequence.*expected a buffer"):
        after(
            export("llama_dynamo_sdpa"),
            Inject(cache="static", past_length="per-sequence", key_layout=layout),
            AddBatchIndex(),
        )
