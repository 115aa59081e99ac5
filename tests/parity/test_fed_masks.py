"""Masks are fed in the form in which they hide tokens, and inputs without tokens alike in every call."""

import pytest
from attentions import attention
from exports import injected
from written import read

from kvsurgeon.parity import measure_loss, verify

NUMBER = "z3 = Unsqueeze(z, both)\n p = Less(row, z3)\n causal = LessOrEqual(row, column)\n allowed = And(causal, p)"
CROSS = (
    "ek = MatMul(encoder, wk)\n ekt = Transpose<perm = [0, 2, 1]>(ek)\n cq = MatMul(c, wq)\n cs = MatMul(cq, ekt)\n"
    "cw = Softmax<axis = -1>(cs)\n ev = MatMul(encoder, wv)\n logits = MatMul(cw, ev)"
)
MODELS = {
    "floats of 0 and 1": {"inputs": "float[b, n, n] m", "allowed": "allowed = Greater(m, half)"},
    "true for hidden keys": {"inputs": "bool[b, n, n] m", "allowed": "allowed = Not(m)"},
    "a number of tokens": {"inputs": "int64[b] z", "allowed": NUMBER, "constants": "int64[2] both = {1, 2}"},
    "an encoder": {"inputs": "float[b, e, 8] encoder", "after": CROSS},
}


@pytest.mark.parametrize("parts", MODELS.values(), ids=MODELS)
def test_a_right_model_is_verified(parts):
    model = read(attention(**parts))
    report = verify(model, injected(model), effort="quick", seed=1)
    assert report.verdict == "same", report.problems
    assert not any("batch size 1 only" in note for note in report.notes)


@pytest.mark.parametrize("parts", MODELS.values(), ids=MODELS)
def test_loss_is_measured_with_what_the_verifier_feeds(parts):
    text = attention(**parts).replace("float[b, n, 8] x", "int64[b, n] ids")
    text = text.replace("<float[8, 8] wq", "<float[20, 8] table, float[8, 8] wq")
    model = read(text.replace("  sizes", "  x = Gather(table, ids)\n  sizes"))
    found = measure_loss(model, injected(model))  # runs a text in two calls too
    assert found.kl_divergence < 1e-6


@pytest.mark.parametrize("batch", ["1", "b"])
def test_masks_are_fed_to_models_whose_outputs_have_tokens_first(batch):
    turned = "Transpose<perm = [1, 0, 2]>"
    text = attention(
        inputs=f"bool[{batch}, n, n] m",
        allowed="allowed = Not(m)",
        hidden=f"h = {turned}(x)",
        after=f"logits = {turned}(c)",
    )
    text = text.replace("float[b, n, 8]", f"float[n, {batch}, 8]").replace(
        "Gather(sizes, one)", "Gather(sizes, nought)"
    )
    model = read(text)
    report = verify(model, injected(model), effort="quick", seed=1)
    assert report.verdict == "same", report.problems
