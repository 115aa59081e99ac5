"""NVIDIA TensorRT, which updates a cache in place if a `TensorScatter` computes the present."""

from __future__ import annotations

from collections.abc import Iterator

from kvsurgeon.interop.functions import as_pass_class
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.interface.rename_dims import RenameDims
from kvsurgeon.passes.operators.float16_mask_range import float16_mask_range
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target, warning

OPSET = 24  # the first with TensorScatter, and the newest that TensorRT reads

# Source: the support matrix of onnx-tensorrt for TensorRT 10.15, which reads opsets 9 to 24, without those that
# it lists as unsupported.
OPERATORS = frozenset((
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention",
    "AveragePool", "BatchNormalization", "BlackmanWindow", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat",
    "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "DeformConv", "DepthToSpace",
    "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten",
    "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool",
    "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization", "GRU", "HammingWindow",
    "HannWindow", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "If", "ImageScaler", "InstanceNormalization",
    "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "LRN",
    "LSTM", "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean", "MeanVarianceNormalization", "Min",
    "Mish", "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or", "Pad", "ParametricSoftplus",
    "Pow", "PRelu", "QuantizeLinear", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence",
    "RMSNormalization", "RNN", "RoiAlign", "RotaryEmbedding", "Round", "ScaledTanh", "Scan", "Scatter",
    "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice",
    "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "STFT", "Sub", "Sum", "Tan", "Tanh",
    "TensorScatter", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
))  # fmt: skip


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    if ("", "TensorScatter") not in model.operators:
        yield Incompatibility("expected a cache that a TensorScatter updates, found none")
    if ("", "Attention") in model.operators:
        yield warning(
            "TensorRT supports Attention only with inputs of rank 4 and without softcap",
            at=model.operators["", "Attention"],
        )


TENSORRT = Target(
    name="tensorrt",
    summary="trtexec --onnx=model.onnx of TensorRT",
    tested_with="onnxruntime, with the operators of TensorRT 10.15",
    before=(RaiseOpset(opset=OPSET),),
    cache=Inject(cache="static"),
    max_length=2048,
    after=(as_pass_class(float16_mask_range)(),),
    finish=(RenameDims(dims=("batch_size=1",)),),
    cache_dtypes={"float32", "float16", "bfloat16"},
    max_opset=OPSET,
    operators=frozenset(("", name) for name in OPERATORS),
    static_axes=(0, 1, 2, 3),
    checks=(_check,),
)
