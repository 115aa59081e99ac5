"""Train the small model that `kvsurgeon demo` works on, and export it without a KV cache.

The text is the six novels of Jane Austen (died 1817), which are in the public domain everywhere. They are read from the
data file of `janeaustenr`, an R package in Debian; R itself is not needed:

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    pip install torch transformers onnxscript onnxruntime tokenizers
    python examples/train_demo_model.py austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb OUT

OUT then holds what `src/kvsurgeon/demo/model/` holds: `model.onnx`, `config.json`, `generation_config.json`,
`tokenizer.json`, `tokenizer_config.json` and, from chapters that were kept out of the training, `sample.txt`.
One core needs about half an hour. Another machine or version gives other weights, and as good ones.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import zlib
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

END = "<|endoftext|>"  # separates chapters; token 0
FURNITURE = re.compile(  # paragraphs that are the editors' and not the author's
    r"VOLUME [IV]+|FINIS|Finis|THE END|\(End of volume.*|\[End volume.*|\*Vide .*"
    r"|A NOTE ON THE TEXT|Northanger Abbey was written .*"
)
HELD_OUT = 3  # chapters at the end of the last novel
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
TOKENS_PER_STEP = 4096
SHORT, LONG = 256, 1024  # tokens that are read at once: short stretches cost less, long ones teach to look far back
ROUNDS = (  # a learning rate, and the length of the stretches of each step
    (1.5e-2, [SHORT] * 1190 + [LONG] * 210),
    (6e-3, [SHORT, LONG] * 80),  # the first round's rate has fallen too low for what long stretches have to teach
)


# --- text --------------------------------------------------------------------------------------------------------


def read_novels(database: Path) -> list[str]:
    """Return the novels in R's lazy-load database: deflated one after the other, each a vector of lines."""
    data, novels = database.read_bytes(), []
    while data:
        stream = zlib.decompressobj()
        book = stream.decompress(data[4:])  # four bytes of length come first
        novels.append("\n".join(read_lines(book)))
        data = stream.unused_data
    return novels


def read_lines(book: bytes) -> list[str]:
    """Return the strings of one serialized character vector (R's XDR format, version 3, UTF-8)."""
    count, at = int.from_bytes(book[27:31], "big"), 31  # magic, versions, encoding and the vector's type come first
    lines = []
    for _ in range(count):
        size = int.from_bytes(book[at + 4 : at + 8], "big")  # after four bytes of type
        lines.append(book[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return lines


def chapters(novel: str) -> list[str]:
    """Return the chapters without headings, one paragraph a line, an empty line between paragraphs."""
    found = []
    for chapter in re.split(r"\n *chapter +[ivxlc\d]+\.?\n", novel, flags=re.IGNORECASE)[1:]:
        paragraphs = (" ".join(block.split()).replace("_", "") for block in re.split(r"\n\s*\n", chapter))
        found.append("\n\n".join(p for p in paragraphs if p and not FURNITURE.fullmatch(p)))
    return found


def train_tokenizer(text: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer: whatever is written to it, it reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: list[str]) -> Tensor:
    """Return all chapters as one row of tokens, an end of text after each."""
    return torch.tensor([token for encoded in tokenizer.encode_batch(text) for token in (*encoded.ids, 0)])


# --- training ----------------------------------------------------------------------------------------------------


def loss_on(model: PreTrainedModel, stretches: Tensor) -> Tensor:
    """Return the mean loss, in nats a token, of predicting each token of each stretch from those before it."""
    logits = model(stretches[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())


def held_out_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the mean loss on long stretches of text that the model was not trained on."""
    rows = tokens[: len(tokens) // LONG * LONG].view(-1, LONG)
    with torch.no_grad():
        return loss_on(model, rows).item()


def optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def train(model: PreTrainedModel, tokens: Tensor, held_out: Tensor, *, rate: float, lengths: list[int]) -> None:
    """Train the model, a step for each length; the rate warms up and then falls as a cosine does."""
    start, both = time.perf_counter(), optimizers(model, rate)
    share = [
        min((step + 1) / 30, 0.51 + 0.49 * math.cos(math.pi * step / len(lengths))) for step in range(len(lengths))
    ]
    for step, length in enumerate(lengths):
        for group in (group for each in both for group in each.param_groups):
            group["lr"] = rate * share[step]
        starts = torch.randint(len(tokens) - length - 1, (TOKENS_PER_STEP // length, 1))
        loss = loss_on(model, tokens[starts + torch.arange(length + 1)])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in both:
            each.step()
        if step % 50 == 0 or step == len(lengths) - 1:
            seconds, unseen = time.perf_counter() - start, held_out_loss(model, held_out)
            print(f"{step:5} {seconds:6.0f} s  loss {loss.item():.3f}  held out {unseen:.3f}", flush=True)


# --- export ------------------------------------------------------------------------------------------------------


def export(model: LlamaForCausalLM, target: Path) -> None:
    """Write the model, weights and all, into one file that does not tell where it was made."""
    names = ["input_ids", "attention_mask"]
    example = (torch.randint(CONFIG.vocab_size, (2, 5)), torch.ones(2, 5, dtype=torch.int64))
    model.config.use_cache = False  # said here, as the exporter would take an argument that says it for an input
    program = torch.onnx.export(
        model.eval(),
        kwargs=dict(zip(names, example, strict=True)),
        dynamo=True,
        opset_version=18,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes={name: {0: "batch_size", 1: "sequence_length"} for name in names},
    )
    model.config.use_cache = True
    # Of what the exporter notes down, keep in which module a node was: other notes name files, or are long.
    program.model.graph.metadata_props.clear()
    for node in program.model.graph.all_nodes():
        for note in set(node.metadata_props) - {"namespace"}:
            del node.metadata_props[note]
    program.save(target, external_data=False)
    if b".py" in target.read_bytes():
        raise SystemExit(f"{target} names a Python file: expected no trace of the machine that it was made on")


def check(model: PreTrainedModel, target: Path, tokens: Tensor) -> None:
    """End the program unless onnxruntime computes what torch computes, padding on the left included."""
    tokens = tokens[: 2 * LONG].view(2, LONG)
    mask = torch.ones_like(tokens)
    mask[0, : LONG // 3] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()].numpy()
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
    error = np.abs(found[mask.bool().numpy()] - expected).max() / np.ptp(expected)
    print(f"largest difference between onnxruntime and torch: {error:.1e} of the spread of the logits")
    if error > 1e-4:
        raise SystemExit("expected at most 1e-4: the export is not the model that was trained")


def write_side_files(model: PreTrainedModel, tokenizer: Tokenizer, chapter: str, out: Path) -> None:
    """Write the configurations, the tokenizer, and the first paragraphs of a chapter."""
    model.config.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END}
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (out / "sample.txt").write_text(chapter[: chapter.index("\n\n", 3000)] + "\n", encoding="utf-8")


def main() -> None:
    """Text, tokenizer, training, export, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="data/Rdata.rdb of the R package janeaustenr")
    parser.add_argument("out", type=Path, help="folder to write to")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    text = [chapter for novel in read_novels(options.text) for chapter in chapters(novel)]
    text, held_out = text[:-HELD_OUT], text[-HELD_OUT:]
    tokenizer = train_tokenizer(text)
    tokens, held_out_tokens = tokenize(tokenizer, text), tokenize(tokenizer, held_out)
    model = LlamaForCausalLM(CONFIG)
    for rate, lengths in ROUNDS:
        train(model, tokens, held_out_tokens, rate=rate, lengths=lengths)

    options.out.mkdir(parents=True, exist_ok=True)
    export(model, options.out / "model.onnx")
    check(model, options.out / "model.onnx", held_out_tokens)
    write_side_files(model, tokenizer, held_out[0], options.out)


if __name__ == "__main__":
    main()
