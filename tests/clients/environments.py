"""A separate environment for each client, which is created once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client of a target.

    Attributes:
        target: Name of the target.
        requirements: Packages for pip or npm.
        script: The script that runs in its environment.
        arguments: Further arguments of the script.
        padded: Whether it supports left padding.
        batch: Whether it supports batches.
        chunked: Whether it supports a prefill in chunks.
        new: Number of tokens to generate with small models.
        node: Whether it runs in Node.
        home: Name of its environment; None for the name of the target.
        uncached: Argument of the script to run a model without a cache; None if it cannot.
        encoder: Whether its models have an encoder.
        embedding: Whether its decoders take embeddings, which another model looks up.
    """

    target: str
    requirements: tuple[str, ...]
    script: str
    arguments: tuple[str, ...] = ()
    padded: bool = True
    batch: bool = True
    chunked: bool = False
    new: int = 12
    node: bool = False
    home: str | None = None
    uncached: str | None = None
    encoder: bool = False
    embedding: bool = False

    def command(self, environments: Path, python: str) -> tuple[list[str], Path]:
        """Return the command and the working directory of the client; its environment is created if it is missing."""
        home = environments / (self.home or self.target)
        ready = home / "ready"
        if not ready.is_file() or ready.read_text() != repr(self.requirements):
            home.mkdir(parents=True, exist_ok=True)
            for step in self._steps(home, python):
                subprocess.run(step, check=True, cwd=home, stdout=subprocess.DEVNULL)
            ready.write_text(repr(self.requirements))
        program = "node" if self.node else str(home / "bin" / "python")
        return [program, str(HERE / self.script)], home

    def _steps(self, home: Path, python: str) -> list[list[str]]:
        if self.node:
            return [["npm", "init", "-y"], ["npm", "install", "--ignore-scripts", "--silent", *self.requirements]]
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *self.requirements]
        return [[python, "-m", "venv", str(home)], pip]


# Its requirements have no upper bounds, and newer versions are incompatible: Python 3.11 or older, and these.
_DEEPSPARSE = (
    "deepsparse[transformers]==1.8.0", "numpy<2", "onnx<1.17", "transformers<4.40", "pyarrow<17", "pandas<2.3",
)  # fmt: skip

CLIENTS = {
    "optimum": Client(
        target="optimum",
        requirements=("optimum-onnx[onnxruntime]==0.1.0",),
        script="optimum_client.py",
    ),
    "optimum-seq2seq": Client(
        target="optimum-seq2seq",
        requirements=("optimum-onnx[onnxruntime]==0.1.0",),
        script="optimum_seq2seq_client.py",
        home="optimum",
        new=32,
        encoder=True,
    ),
    "genai": Client(
        target="genai",
        requirements=("onnxruntime-genai==0.18.0", "numpy"),
        script="genai_client.py",
        padded=False,
        chunked=True,
    ),
    "genai-shared-buffer": Client(
        target="genai-shared-buffer",
        requirements=("onnxruntime-genai==0.18.0", "numpy"),
        script="genai_client.py",
        home="genai",
        padded=False,
        chunked=True,
    ),
    "genai-sliding-window": Client(
        target="genai-sliding-window",
        requirements=("onnxruntime-genai==0.18.0", "numpy"),
        script="genai_client.py",
        home="genai",
        padded=False,
        chunked=True,
        new=32,
    ),
    "genai-pipeline": Client(
        target="genai-pipeline",
        requirements=("onnxruntime-genai==0.18.0", "numpy"),
        script="genai_client.py",
        home="genai",
        padded=False,
        chunked=True,
        new=32,
        embedding=True,
    ),
    "genai-whisper": Client(
        target="genai-whisper",
        requirements=("onnxruntime-genai==0.18.0", "numpy"),
        script="genai_whisper_client.py",
        home="genai",
        new=32,
        encoder=True,
    ),
    "transformers-js": Client(
        target="transformers-js",
        requirements=("@huggingface/transformers@4.3.2",),
        script="transformers_js_client.mjs",
        node=True,
    ),
    "transformers-js-seq2seq": Client(
        target="transformers-js-seq2seq",
        requirements=("@huggingface/transformers@4.3.2",),
        script="transformers_js_seq2seq_client.mjs",
        home="transformers-js",
        node=True,
        new=32,
        encoder=True,
    ),
    "transformers-js-image-text": Client(
        target="transformers-js-image-text",
        requirements=("@huggingface/transformers@4.3.2",),
        script="transformers_js_client.mjs",
        arguments=("image-text",),
        home="transformers-js",
        node=True,
        new=32,
        embedding=True,
    ),
    "openvino": Client(
        target="openvino",
        requirements=("openvino==2026.4.1",),
        script="openvino_client.py",
        chunked=True,
    ),
    "openvino-stateful": Client(
        target="openvino",
        requirements=("openvino==2026.4.1",),
        script="openvino_client.py",
        arguments=("stateful",),
        chunked=True,
    ),
    "deepsparse": Client(
        target="deepsparse",
        requirements=_DEEPSPARSE,
        script="deepsparse_client.py",
        arguments=("deepsparse",),
        padded=False,
        chunked=True,
        uncached="uncached",
    ),
    "deepsparse-onnxruntime": Client(
        target="deepsparse",
        requirements=_DEEPSPARSE,
        script="deepsparse_client.py",
        arguments=("onnxruntime",),
        padded=False,
        chunked=True,
    ),
    "tensorrt": Client(
        target="tensorrt",
        requirements=("onnxruntime==1.31.1",),
        script="tensorrt_client.py",
        padded=False,
        batch=False,
        chunked=True,
        new=32,
    ),
    "qnn": Client(
        target="qnn",
        requirements=("onnxruntime==1.31.1",),
        script="qnn_client.py",
        padded=False,
        batch=False,
        chunked=True,
        new=32,
    ),
    "qaic": Client(
        target="qaic",
        requirements=("onnxruntime==1.31.1",),
        script="qaic_client.py",
        padded=False,
        batch=False,
        chunked=True,
        new=32,
    ),
}
DEFAULT_PYTHON = sys.executable
