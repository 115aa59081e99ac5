"""What the tests of SparseML check of its injector, for exports of five of its families, under its import path.

SparseML compares results with samples of the original; here they are fed as DeepSparse does: one text, and a cache of
one length whose first rows are padding.
"""

import itertools
import shutil
import warnings

import numpy as np
import onnx
import pytest
from exports import export
from laws import dims_of, in_onnxruntime

from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.exporters.kv_cache_injector import KeyValueCacheInjector

FAMILIES = [
    "bloom_torchscript_eager",
    "llama_dynamo_sdpa",
    "sparseml/codegen_torchscript_eager",
    "sparseml/gptneo_torchscript_eager",
    "sparseml/opt_torchscript_eager",
]
WITHOUT_POSITIONS = {"bloom_torchscript_eager", "sparseml/opt_torchscript_eager"}  # biases or positions from the mask
PAST = {f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")}
LENGTH = 16  # rows of the buffer, of which the text fills 11
IDS = np.array([[5, 3, 40, 8, 21, 2, 17, 9, 33, 4, 12]])

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.filterwarnings("ignore:with its internal cache"),
    pytest.mark.filterwarnings("ignore:expected a file of the source that deepsparse requires"),
]


def write(folder, family, **options):
    """Write a folder as an exporter does, with a config and a tokenizer."""
    folder.mkdir()
    onnx.save(onnx.ModelProto.FromString(export(family).SerializeToString()), folder / "model.onnx", **options)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text('{"model_max_length": 64}')


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_padded_buffer(model, cuts):
    """Return the logits of a text in chunks, with a cache that DeepSparse keeps: padding, then the rows so far."""
    run, dims = in_onnxruntime(model), {value.name: dims_of(value) for value in model.graph.input}
    rows = {name: np.zeros((1, dims[name][1], 0, dims[name][3]), np.float32) for name in sorted(PAST)}
    logits = []
    for start, stop in itertools.pairwise((0, *cuts, IDS.shape[1])):
        given = stop - start
        mask = (np.arange(LENGTH) >= LENGTH - stop).astype(np.int64)[None]
        causal = mask[:, None, None] * np.tril(np.ones((given, LENGTH), np.int64), LENGTH - given)
        feeds = {
            "input_ids": IDS[:, start:stop], "attention_mask": mask, "positions": np.arange(start, stop)[None],
            "causal_mask": causal,
        }  # fmt: skip
        padding = ((0, 0), (0, 0), (LENGTH - stop, 0), (0, 0))
        feeds |= {name: np.pad(array, padding) for name, array in rows.items()}
        found = run({name: array for name, array in feeds.items() if name in dims})
        rows = {name: found[name.replace("past_key_values", "present")][:, :, -stop:] for name in rows}
        logits.append(found["logits"])
    return np.concatenate(logits, axis=1)


def has_cache(file):
    return {value.name for value in onnx.load(file, load_external_data=False).graph.input} >= PAST


def test_export_adds_the_cache_to_the_file_of_a_folder(family, tmp_path):
    """Happy path: the file is replaced, its weights stay inside, and a copy that was made before has no cache."""
    write(tmp_path / "model", family)
    file, copy = tmp_path / "model" / "model.onnx", tmp_path / "model" / "model-orig.onnx"
    shutil.copyfile(file, copy)
    before = contents(file.parent)

    KeyValueCacheInjector(str(file.parent)).export(onnx.load(file, load_external_data=False), str(file))

    assert has_cache(file)
    assert not has_cache(copy)
    assert {name for name, content in contents(file.parent).items() if before.get(name) != content} == {file.name}


def test_export_to_another_folder_writes_its_side_files(family, tmp_path):
    """A deployment folder has the config and the tokenizer; the folder of the model is unchanged."""
    write(tmp_path / "model", family)
    before = contents(tmp_path / "model")
    file = tmp_path / "deployment" / "model.onnx"

    assert KeyValueCacheInjector(tmp_path / "model").export(onnx.load(tmp_path / "model" / "model.onnx"), file) == file

    assert has_cache(file)
    assert contents(file.parent).keys() == before.keys()
    assert contents(tmp_path / "model") == before


def test_it_runs_several_times(family, tmp_path):
    """A second export overwrites the first with the same bytes and gives the same warnings; a cache is added once."""
    write(tmp_path / "model", family)
    exporter, model = KeyValueCacheInjector(tmp_path / "model"), onnx.load(tmp_path / "model" / "model.onnx")
    found = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exporter.export(model, tmp_path / "deployment")
        found.append((contents(tmp_path / "deployment"), {str(one.message) for one in caught}))
    assert found[0] == found[1]
    with pytest.raises(UnsupportedError, match="already has a cache"):
        exporter.apply(onnx.load(tmp_path / "deployment" / "model.onnx"))


@pytest.mark.parametrize("saved_by", ["export", "onnx"])
def test_external_data_stays_external(saved_by, family, tmp_path):
    """No weight is read or moved by `export`, nor by `apply` and `onnx.save` over the file."""
    write(tmp_path / "model", family, save_as_external_data=True, location="model.data", size_threshold=256)
    file = tmp_path / "model" / "model.onnx"
    weights = (tmp_path / "model" / "model.data").read_bytes()
    exporter, model = KeyValueCacheInjector(file.parent), onnx.load(file, load_external_data=False)
    if saved_by == "onnx":
        onnx.save(exporter.apply(model), file)
    else:
        file = exporter.export(model, tmp_path / "deployment" / "model.onnx")
    assert (file.parent / "model.data").read_bytes() == weights
    in_memory = KeyValueCacheInjector(inplace=False).apply(export(family))
    assert np.array_equal(in_padded_buffer(onnx.load(file), (4,)), in_padded_buffer(in_memory, (4,)))


def test_the_original_stays_without_a_cache(family):
    """A model that is kept, as SparseML does for an export without optimizations, has no cache."""
    original = export(family)
    before = original.SerializeToString()
    KeyValueCacheInjector(inplace=False).apply(original)
    assert original.SerializeToString() == before


def test_inputs_and_outputs_have_the_names_of_deepsparse(family):
    """Inputs are those of SparseML that the model needs, ids and mask first; outputs are logits and the new cache."""
    graph = KeyValueCacheInjector(inplace=False).apply(export(family)).graph
    positions = [] if family in WITHOUT_POSITIONS else ["positions"]
    names = [value.name for value in graph.input]
    assert set(names) == {"input_ids", "attention_mask", "causal_mask", *positions} | PAST
    assert names[:2] == ["input_ids", "attention_mask"]
    assert graph.output[0].name == "logits"
    assert {value.name for value in graph.output[1:]} == {one.replace("past_key_values", "present") for one in PAST}


@pytest.mark.parametrize("cuts", [(4, 8), range(1, 11), (1, 9)], ids=["chunks", "single tokens", "ragged"])
def test_a_padded_buffer_gives_the_logits_of_the_original(family, cuts):
    """Results are correct for a prompt in chunks and for single tokens."""
    original = export(family)
    expected = in_onnxruntime(original)({"input_ids": IDS, "attention_mask": np.ones_like(IDS)})["logits"]
    found = in_padded_buffer(KeyValueCacheInjector(inplace=False).apply(original), tuple(cuts))
    assert np.abs(found - expected).max() < 1e-4 * np.ptp(expected)


def test_another_runtime_is_a_choice(family, tmp_path):
    """Without a target, inputs are those of the model, and a warning says that DeepSparse gives other tokens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = KeyValueCacheInjector(inplace=False, target=None).apply(export(family))
    loaded = plain.opset_import[0].version <= 17  # DeepSparse rejects later versions, with an error
    assert ["gives other tokens" in str(one.message) for one in caught] == [True] * loaded
    assert {value.name for value in plain.graph.input} == {"input_ids", "attention_mask"} | PAST
    with pytest.raises(UsageError, match=r"or `model\.onnx` in one, found the file"):
        KeyValueCacheInjector().export(export(family), tmp_path / "cached.onnx")
