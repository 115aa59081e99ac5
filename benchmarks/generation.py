"""Times text generation in onnxruntime-genai, model folders in turns, and in llama.cpp if it is there.

    python benchmarks/generation.py built folder... [--llama-cpp GGUF] [--tokens 64] [--rounds 3] [--threads 2]

Prints tokens per second after the first token (median over rounds), the time to the first token, and how many tokens
are those of the first folder. The folders are what benchmarks/shared_buffer.py describes. llama.cpp runs through
node-llama-cpp (benchmarks/llama_cpp.mjs; `npm install node-llama-cpp@3.22.1` beside it or above); it waits actively,
so that on a busy machine its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime_genai as og

PROMPT = "Once upon a time, a small robot lived at the edge of the sea. Every morning"
CAPACITY = 2048


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What one run gave: time to the first token and of each later one, in seconds, and the tokens."""

    first: float
    later: float
    tokens: tuple[int, ...]


def run_genai(model: og.Model, tokenizer: og.Tokenizer, prompt: str, count: int) -> Generated:
    """Return `count` greedy tokens after `prompt`."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=CAPACITY, do_sample=False)
    generator = og.Generator(model, parameters)
    given = tokenizer.encode(prompt)
    start = time.perf_counter()
    generator.append_tokens(given)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(count - 1):
        generator.generate_next_token()
    end = time.perf_counter()
    tokens = tuple(int(token) for token in generator.get_sequence(0)[len(given) :])
    return Generated(first=first - start, later=(end - first) / (count - 1), tokens=tokens)


def run_llama_cpp(gguf: Path, prompt: str, count: int, threads: int) -> Generated:
    """Return `count` greedy tokens after `prompt`."""
    command = ["node", str(Path(__file__).with_name("llama_cpp.mjs")), str(gguf), prompt]
    done = subprocess.run([*command, str(count), str(threads)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Generated(first=found["first"], later=found["later"], tokens=tuple(found["tokens"]))


def _set_threads(folder: Path, threads: int) -> og.Model:
    config = og.Config(str(folder))
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--llama-cpp", type=Path, metavar="GGUF")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    loaded = {str(folder): _set_threads(folder, options.threads) for folder in options.folders}
    runs: dict[str, list[Generated]] = {}
    for _ in range(options.rounds):
        for name, model in loaded.items():
            run = run_genai(model, og.Tokenizer(model), options.prompt, options.tokens)
            runs.setdefault(name, []).append(run)
        if options.llama_cpp:
            run = run_llama_cpp(options.llama_cpp, options.prompt, options.tokens, options.threads)
            runs.setdefault("llama.cpp", []).append(run)
    reference = next(iter(runs.values()))[0].tokens
    for name, found in runs.items():
        later, first = (statistics.median(getattr(run, which) for run in found) for which in ("later", "first"))
        differing = (at for at, token in enumerate(found[0].tokens) if token != reference[at])
        equal = next(differing, len(reference))
        print(f"{1 / later:7.1f} tokens/s  first {first * 1e3:7.1f} ms  {equal:3} of {len(reference)} equal  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
