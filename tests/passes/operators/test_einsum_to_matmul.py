"""einsum-to-matmul computes products of two tensors by MatMul, and leaves other equations."""

import numpy as np
import pytest
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.einsum_to_matmul import EinsumToMatmul

SIZES = {"b": 2, "h": 3, "m": 4, "n": 5, "k": 6, "l": 7, "p": 2}
PRODUCTS = [
    "mk,kn->mn", "km,nk->nm", "bmk,bkn->bmn", "bhmk,bhnk->bhmn", "bmhk,bnhk->bhmn", "mk,k->m", "k,kn->n",
    "m,n->mn", "bm,bn->nbm", "bzch,bzhpn->bchpn", "bclhn,bclhp->bchpn", "mkl,kln->mn", "mlk,kl->m",
    "bmnk,bkpl->bpmnl", "bclhn,bchpn->bclhp", "b...mk,b...kn->b...mn",
]  # fmt: skip
OTHERS = [
    "bhm,bhm->bhm",
    "bhk,khb->hb",
    "mm,mn->mn",
    "mk,kn->n",
    "mk,nl->mn",
    "bmk,bkn,bnl->bml",
    "mk->km",
    "mk,kn->mnn",
]


def model(equation, size=lambda label: str(SIZES.get(label, 3))):
    operands, result = equation.replace("...", "hl").split("->")
    terms = operands.split(",")
    inputs = ", ".join(f"float[{', '.join(map(size, term))}] x{place}" for place, term in enumerate(terms))
    names = ", ".join(f"x{place}" for place in range(len(terms)))
    sizes = ", ".join(map(size, result))
    return read(
        f"""case (int64[1, sequence_length] input_ids, {inputs}) => (float[{sizes}] y, int64[1, sequence_length] ids)
{{
 e = Einsum<equation = "{equation}">({names})
 y = Identity(e)
 ids = Identity(input_ids)
}}"""
    )


@pytest.mark.parametrize("equation", PRODUCTS)
def test_products_are_the_same(equation):
    original = model(equation)
    subject = Subject.of(original)
    assert isinstance(EinsumToMatmul().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert "Einsum" not in {node.op_type for node in result.graph.node}
    random = np.random.default_rng(0)
    feeds = {
        value.name: random.normal(size=[size.dim_value for size in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in original.graph.input[1:]
    }
    feeds["input_ids"] = np.zeros((1, 1), np.int64)
    assert np.allclose(in_onnxruntime(result)(feeds)["y"], in_onnxruntime(original)(feeds)["y"], rtol=1e-5, atol=1e-5)
    assert isinstance(EinsumToMatmul().apply(subject), Unchanged)


@pytest.mark.parametrize("equation", OTHERS)
def test_other_equations_stay(equation):
    assert isinstance(EinsumToMatmul().apply(Subject.of(model(equation))), Unchanged)


def test_axes_of_unknown_size_are_not_merged():
    names = {"b": "batch_size", "m": "sequence_length", "n": "5", "k": "6", "p": "2", "l": "past"}
    for equation, expected in (("bmk,bnk->bmn", Changed), ("bmk,bkpn->bmpn", Changed), ("bmlk,bkn->bmln", Unchanged)):
        assert isinstance(EinsumToMatmul().apply(Subject.of(model(equation, names.get))), expected)
