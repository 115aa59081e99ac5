"""The catalogue of targets."""

from __future__ import annotations

from typing import Any

from kvsurgeon.errors import PluginError
from kvsurgeon.plugins import Catalogue, Plugin
from kvsurgeon.targets.target import Target

BUILT_IN = {
    "optimum": "kvsurgeon.targets.optimum:OPTIMUM",
    "optimum-seq2seq": "kvsurgeon.targets.optimum_seq2seq:OPTIMUM_SEQ2SEQ",
    "genai": "kvsurgeon.targets.genai:GENAI",
    "genai-shared-buffer": "kvsurgeon.targets.genai:GENAI_SHARED_BUFFER",
    "genai-sliding-window": "kvsurgeon.targets.genai:GENAI_SLIDING_WINDOW",
    "genai-pipeline": "kvsurgeon.targets.genai:GENAI_PIPELINE",
    "genai-whisper": "kvsurgeon.targets.genai_whisper:GENAI_WHISPER",
    "transformers-js": "kvsurgeon.targets.transformers_js:TRANSFORMERS_JS",
    "transformers-js-seq2seq": "kvsurgeon.targets.transformers_js_seq2seq:TRANSFORMERS_JS_SEQ2SEQ",
    "transformers-js-image-text": "kvsurgeon.targets.transformers_js_image_text:TRANSFORMERS_JS_IMAGE_TEXT",
    "deepsparse": "kvsurgeon.targets.deepsparse:DEEPSPARSE",
    "openvino": "kvsurgeon.targets.openvino:OPENVINO",
    "tensorrt": "kvsurgeon.targets.tensorrt:TENSORRT",
    "qaic": "kvsurgeon.targets.qaic:QAIC",
    "qnn": "kvsurgeon.targets.qnn:QNN",
}


def _check(plugin: Plugin[Target], found: Any) -> Target:
    if not isinstance(found, Target):
        raise PluginError(f"{plugin}: expected a kvsurgeon.targets.Target, found {type(found).__name__}")
    if found.name != plugin.name:
        raise PluginError(f"{plugin}: the target is called {found.name}; give both the same name")
    return found


TARGETS = Catalogue(kind="target", plural="targets", built_in=BUILT_IN, check=_check)
