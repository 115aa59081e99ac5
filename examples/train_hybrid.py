"""Train a small hybrid of Mamba-2 and attention to a window on real text, and export it without a cache.

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    pip install torch transformers onnxscript onnxruntime tokenizers
    python examples/train_hybrid.py austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb OUT [--steps N]

Text, tokenizer and training are those of `train_demo_model.py`. OUT then holds `model.onnx`, whose batch and length are
symbols, `config.json`, `generation_config.json`, the tokenizer, and `sample.txt`, which was kept out of the training.
One core needs some minutes.

The attention has a window, so a step takes as long, and its cache is as large, after any text:

    kvsurgeon inject OUT -o WITH_CACHE
    kvsurgeon run -p window-cache WITH_CACHE -o WITH_LAST_ROWS
    python benchmarks/state_steps.py WITH_LAST_ROWS
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from decoder_exports import Logits
from state_types import by_symbols
from train_demo_model import (
    HELD_OUT,
    SHORT,
    chapters,
    check,
    read_novels,
    tokenize,
    train,
    train_tokenizer,
    write_side_files,
)
from transformers import BambaConfig, BambaForCausalLM
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.bamba import modeling_bamba

CONFIG = BambaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_layer_indices=[2],
    mamba_expand=2,
    mamba_n_heads=4,
    mamba_d_head=64,
    mamba_n_groups=1,
    mamba_d_state=16,
    mamba_d_conv=4,
    mamba_chunk_size=16,
    max_position_embeddings=16384,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    use_cache=False,
    sliding_window=SHORT,  # read by the mask below
)
modeling_bamba.create_causal_mask = create_sliding_window_causal_mask  # Bamba itself has no window
RATE = 1.5e-2


def main() -> None:
    """Text, tokenizer, training, export, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="data/Rdata.rdb of the R package janeaustenr")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--steps", type=int, default=200, help="training steps of 4,096 tokens")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    text = [chapter for novel in read_novels(options.text) for chapter in chapters(novel)]
    text, held_out = text[:-HELD_OUT], text[-HELD_OUT:]
    tokenizer = train_tokenizer(text)
    tokens, held_out_tokens = tokenize(tokenizer, text), tokenize(tokenizer, held_out)
    model = BambaForCausalLM._from_config(CONFIG, attn_implementation="eager")
    train(model, tokens, held_out_tokens, rate=RATE, lengths=[SHORT] * options.steps)

    options.out.mkdir(parents=True, exist_ok=True)
    by_symbols(Logits(model.eval(), masked=True), options.out / "model.onnx", "torchscript")
    check(model, options.out / "model.onnx", held_out_tokens)
    write_side_files(model, tokenizer, held_out[0], options.out)


if __name__ == "__main__":
    main()
