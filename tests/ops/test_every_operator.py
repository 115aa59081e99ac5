"""Every operator of ONNX and onnxruntime has an entry in the operator table, or a reason here why it has none.

Operators of a newer release than the one that was reviewed are an expected failure.
"""

from __future__ import annotations

from importlib.metadata import version

import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from written import read

from kvsurgeon.decompose.sequences import MAKERS
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.ops import Trait, find
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

REVIEWED = {"onnx": (1, 23), "onnxruntime": (1, 31)}  # releases whose operators were all looked at

NOTHING_KEEPS_TOKENS_APART = {
    "a state goes from token to token": (
        "AttnLSTM DynamicQuantizeLSTM GRU GatedDeltaNet LSTM RNN Scan VarlenCausalConvWithState"
    ),
    "it is there for a model that has a cache, or writes one": (
        "DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention PagedAttention SparseAttention "
        "SparsePagedAttention TensorScatter"
    ),
    "texts lie one behind the other, and which token is whose depends on the batch": (
        "PackedAttention PackedMultiHeadAttention PackedSparseAttentionIndexer RemovePadding RestorePadding "
        "VarlenNGramHashMapping"
    ),
    "it looks at blocks of a text, or at texts from both ends": (
        "DynamicSparseAttention LongformerAttention QOrderedLongformerAttention SparseAttentionIndexer "
        "GatedRelativePositionBias"
    ),
    "it looks at tokens before": "EngramGate NGramHashMapping NGramRepeatBlock",
    "it is a whole generator": "BeamSearch GreedySearch Sampling WhisperBeamSearch",
    "it draws numbers": (
        "Bernoulli BitmaskBiasDropout BitmaskDropout BiasDropout Multinomial RandomNormal RandomNormalLike "
        "RandomUniform RandomUniformLike"
    ),
    "how much comes out depends on what is in it": (
        "Compress MaxUnpool NonMaxSuppression Unique"
    ),
    "it contains a graph": "If Loop SequenceMap",
    "it holds sequences or what may be missing, of which only what is taken apart beforehand is followed": (
        "ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceEmpty SequenceErase "
        "SequenceInsert SequenceLength ReverseSequence"
    ),
    "it is for text": (
        "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer Tokenizer WordConvEmbedding"
    ),
    "it is for pictures": (
        "AffineGrid BiasAdd BiasSplitGelu CenterCropPad Col2Im ConvTranspose ConvTransposeWithDynamicPads "
        "CropAndResize DeformConv DepthToSpace GlobalLpPool GridSample GroupNorm ImageDecoder LRN MaxRoiPool "
        "MaxpoolWithMask NhwcConv NhwcFusedConv NhwcMaxPool QLinearGlobalAveragePool QLinearReduceMean Resize RoiAlign "
        "SkipGroupNorm SpaceToDepth UnfoldTensor MeanVarianceNormalization"
    ),
    "it is for signals, or for matrices": (
        "BlackmanWindow CDist ComplexMul ComplexMulConj DFT Det DynamicTimeWarping HammingWindow HannWindow Inverse "
        "Irfft MelWeightMatrix Rfft STFT"
    ),
    "it is for training": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "no runtime at hand computes it, so that no rule could be tried": (
        "BiasSoftmax DequantizeBFP DequantizeWithOrder EPContext FusedMatMulActivation GemmFastGelu GemmFloat8 "
        "GemmaRotaryEmbedding IsAllFinite MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulFpQ4 "
        "MatMulNBitsMlp MatMulNBitsQkv MulInteger QOrderedAttention QOrderedGelu QOrderedLayerNormalization "
        "QOrderedMatMul QuantizeBFP QuantizeWithOrder ReduceSumInteger RelativePositionBias Snpe TorchEmbedding"
    ),
    "no decoder is known that has it": (
        "BifurcationDetector BitCast ExpandDims HyperConnectionPostMix HyperConnectionPreMix "
        "LinearAttentionGate MatMulInteger16 MurmurHash3 SampleOp SparseToDenseMatMul"
    ),
}  # fmt: skip
REFUSED = {name: reason for reason, names in NOTHING_KEEPS_TOKENS_APART.items() for name in names.split()}

HANDLED_ELSEWHERE = MAKERS | {"Constant"}


def standard_operators() -> frozenset[str]:
    return frozenset(s.name for s in onnx.defs.get_all_schemas() if s.domain in ("", "ai.onnx") and not s.deprecated)


def contrib_operators() -> frozenset[str]:
    return frozenset(schema.name for schema in get_all_operator_schema() if schema.domain == "com.microsoft")


OPERATORS = {"onnx": ("ai.onnx", standard_operators), "onnxruntime": ("com.microsoft", contrib_operators)}


def has_entry(domain: str, name: str) -> bool:
    """An entry with axes, with a decomposition, or of context; or it is gone before operators are looked up."""
    found = find(domain, name)
    if found is None:
        return name in HANDLED_ELSEWHERE
    makes_context = {Trait.SHAPE_ONLY, Trait.ROUTING} & found.traits or name == "Range"
    return bool(found.axes or found.decomposition or makes_context)


@pytest.mark.parametrize("package", OPERATORS)
def test_every_operator_has_an_entry_or_a_reason(package):
    domain, operators = OPERATORS[package]
    missing = sorted(name for name in operators() if not has_entry(domain, name) and name not in REFUSED)
    message = f"{package} {version(package)} has operators without an entry or a reason: {', '.join(missing)}"
    if missing and tuple(int(part) for part in version(package).split(".")[:2]) > REVIEWED[package]:
        pytest.xfail(message)
    assert not missing, f"{message}; give each an entry in ops/, or a reason here"


def test_what_is_refused_has_no_entry():
    assert not sorted(name for name in REFUSED if has_entry("ai.onnx", name) or has_entry("com.microsoft", name))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_refused_by_name(name):
    domain = "com.microsoft." if name in contrib_operators() - standard_operators() else ""
    text = f"""case (int64[b, n] x) => (float[b, n, 8] logits) <float[16, 8] table>
{{ h = Gather(table, x)
  logits = {domain}{name}(h) }}"""
    with pytest.raises(UnsupportedError, match=name):
        Inject().apply(Subject.of(read(text)))
