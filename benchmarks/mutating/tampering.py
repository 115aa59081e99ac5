"""Changes of a certified model, of its original and of its certificate, none of which may be confirmed.

`STATEMENTS` change what a certificate states, `FORMS` make it none, and `FILES` change the files; those of them that
write the new digests into the certificate stand for somebody who changes everything consistently.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import onnx
from onnx import external_data_helper, numpy_helper

from kvsurgeon import io
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.workflow.digests import FileDigests, different_part
from mutating import attention_insertions, insertions, mutants
from mutating.mutable_graph import Graph

Statement = dict[str, Any]
MUTATIONS = [mutation for module in (mutants, insertions, attention_insertions) for _, mutation, _ in module.every()]
TRIES = 40


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A copy of an original, its result and the certificate, which can be changed."""

    original: Path
    result: Path
    certificate: Path
    random: Random

    def edit(self, change: Callable[[Statement], object]) -> None:
        statement = json.loads(self.certificate.read_text("utf-8"))
        change(statement)
        self.certificate.write_text(json.dumps(statement), "utf-8")

    def state_digests(self) -> None:
        """Write the digests of all files into the certificate; the result may have fewer or other data files."""

        def change(statement: Statement) -> None:
            for path, files in ((self.result, subject(statement)), (self.original, original(statement)["files"])):
                names = [path.name, *(file.location for file in io.weight_files(io.load(path)))]
                names += [file["name"] for file in files if (path.parent / file["name"]).exists()]
                files[:] = [_described(path.parent, name) for name in dict.fromkeys(names)]

        self.edit(change)


def _described(folder: Path, name: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}}


# Parts of a certificate


def subject(statement: Statement) -> list[Any]:
    return statement["subject"]  # type: ignore[no-any-return]


def original(statement: Statement) -> Statement:
    return statement["predicate"]["original"]  # type: ignore[no-any-return]


def proof(statement: Statement) -> Statement:
    return statement["predicate"]["proofs"][0]  # type: ignore[no-any-return]


def inject_pass(statement: Statement) -> Statement:
    return statement["predicate"]["passes"][0]  # type: ignore[no-any-return]


def measurements(statement: Statement) -> Statement:
    return statement["predicate"]["measurements"]  # type: ignore[no-any-return]


def text(statement: Statement) -> Statement:
    return measurements(statement)["texts"][1]  # type: ignore[no-any-return]


def _first(statement: Statement, status: str) -> Statement:
    return next(
        (one for one in proof(statement)["obligations"] if one["status"] == status), proof(statement)["obligations"][0]
    )


def _upgrade(statement: Statement) -> None:
    _first(statement, "measured").update(status="proved", at=None, lengths=[], rows=[])


def _downgrade(statement: Statement) -> None:
    _first(statement, "proved").update(status="assumed", at="x")


def _other_effort(statement: Statement) -> str:
    return "normal" if measurements(statement)["effort"] == "quick" else "quick"


def _unread_file(statement: Statement) -> None:
    original(statement)["files"].append({**original(statement)["files"][0], "name": "unread"})


def _capitals(statement: Statement) -> None:
    digest = subject(statement)[0]["digest"]
    digest.update(sha256=digest["sha256"].upper())


STATEMENTS: dict[str, Callable[[Statement], object]] = {
    "measured is called proved": _upgrade,
    "proved is called assumed": _downgrade,
    "more lengths": lambda s: proof(s)["obligations"][0]["lengths"].append(1 << 20),
    "more rows": lambda s: proof(s)["obligations"][0]["rows"].append(1 << 20),
    "another place": lambda s: proof(s)["obligations"][1].update(at="elsewhere"),
    "an obligation is missing": lambda s: proof(s)["obligations"].pop(),
    "obligations in another order": lambda s: proof(s)["obligations"].reverse(),
    "no proof": lambda s: s["predicate"]["proofs"].clear(),
    "a proof twice": lambda s: s["predicate"]["proofs"].append(proof(s)),
    "a larger limit": lambda s: proof(s)["limits"].update(max_length=1 << 30),
    "a limit": lambda s: proof(s)["limits"].update(limit=77),
    "other bounds": lambda s: proof(s)["limits"]["bounds"].append(1 << 30),
    "an assumption": lambda s: proof(s)["assumptions"].append({"statement": "x", "at": "y"}),
    "one more note, which is null": lambda s: inject_pass(s)["notes"].append(None),
    "another option": lambda s: inject_pass(s)["options"].update(cache="new-tokens"),
    "another name template": lambda s: inject_pass(s)["options"].update(past="cache.{layer}.{kind}"),
    "an option is missing": lambda s: inject_pass(s)["options"].pop("cache"),
    "a note": lambda s: inject_pass(s)["notes"].append("right at any length"),
    "one more pass": lambda s: s["predicate"]["passes"].append({"name": "int32-inputs", "options": {}, "notes": []}),
    "another seed": lambda s: measurements(s).update(seed=measurements(s)["seed"] + 1),
    "other effort": lambda s: measurements(s).update(effort=_other_effort(s)),
    "a wide bound": lambda s: measurements(s).update(bound=100.0),
    "a narrow bound": lambda s: measurements(s).update(bound=1e-30),
    "no bound": lambda s: measurements(s).update(bound=None),
    "an infinite bound": lambda s: measurements(s).update(bound=float("inf")),
    "a bound that is no number": lambda s: measurements(s).update(bound=float("nan")),
    "an error beyond the bound": lambda s: text(s).update(error=100.0),
    "an error that is text": lambda s: text(s).update(error="0"),
    "a negative error": lambda s: text(s).update(error=-1.0),
    "an agreement": lambda s: text(s).update(agreement=0.0),
    "another text": lambda s: text(s).update(digest="0" * 64),
    "a text is missing": lambda s: measurements(s)["texts"].pop(),
    "no text": lambda s: measurements(s)["texts"].clear(),
    "a text twice": lambda s: measurements(s)["texts"].append(text(s)),
    "a longer text": lambda s: text(s).update(length=1 << 20),
    "a larger batch": lambda s: text(s).update(batch=77),
    "other chunks": lambda s: text(s)["chunks"].append(1),
    "a verdict": lambda s: text(s).update(verdict="unknown"),
    "a truth value as a number": lambda s: text(s).update(batch=True),
    "another arithmetic": lambda s: measurements(s).update(arithmetic="none"),
    "less agreement is required": lambda s: measurements(s).update(required_agreement=0.01),
    "another runtime": lambda s: measurements(s)["runtime"].update(name="tensorrt"),
    "a note of the verifier": lambda s: measurements(s)["notes"].append("also on a GPU"),
    "no measurement of a text": lambda s: measurements(s)["texts"].__setitem__(0, []),
    "another tool": lambda s: s["predicate"]["tool"].update(name="other"),
    "another version": lambda s: s["predicate"]["tool"]["versions"].update(onnxruntime="1.0"),
    "a version is missing": lambda s: s["predicate"]["tool"]["versions"].pop("numpy"),
    "no tool": lambda s: s["predicate"].pop("tool"),
    "an unknown field": lambda s: s["predicate"].update(safe=True),
    "an unknown field of a proof": lambda s: proof(s).update(safe=True),
    "an unknown field of a text": lambda s: text(s).update(safe=True),
    "an unknown field of the original": lambda s: original(s).update(safe=True),
    "a file that the original does not read": _unread_file,
    "a file that is not there": lambda s: subject(s).append({**subject(s)[0], "name": "new"}),
    "a file outside": lambda s: subject(s).append({**subject(s)[0], "name": "../x"}),
    "another digest": lambda s: subject(s)[0]["digest"].update(sha256="0" * 64),
    "the digest in capitals": _capitals,
    "the digest of the original": lambda s: subject(s)[0].update(digest=original(s)["files"][0]["digest"]),
    "another original": lambda s: original(s)["files"][0].update(digest=subject(s)[0]["digest"]),
}  # fmt: skip

FORMS: dict[str, Callable[[Statement], object]] = {
    "another predicate": lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
    "another version": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
    "a field of the statement": lambda s: s.update(signed=True),
    "no predicate": lambda s: s.pop("predicate"),
    "no pass": lambda s: s["predicate"]["passes"].clear(),
    "an unknown pass": lambda s: inject_pass(s).update(name="injct"),
    "an unknown option": lambda s: inject_pass(s)["options"].update(quick="true"),
    "an option that is no text": lambda s: inject_pass(s)["options"].update(cache=["static"]),
    "a field of a pass": lambda s: inject_pass(s).update(exact=True),
    "no file": lambda s: subject(s).clear(),
    "a file twice": lambda s: subject(s).append(subject(s)[0]),
    "another digest function": lambda s: subject(s)[0].update(digest={"md5": "0"}),
    "a second digest": lambda s: subject(s)[0]["digest"].update(md5="0"),
    "a name that is no text": lambda s: subject(s)[0].update(name=["model.onnx"]),
    "a digest that is no text": lambda s: subject(s)[0]["digest"].update(sha256=7),
    "a seed that is no number": lambda s: measurements(s).update(seed="5"),
    "a negative seed": lambda s: measurements(s).update(seed=-1),
    "an unknown effort": lambda s: measurements(s).update(effort="enough"),
    "effort that is no text": lambda s: measurements(s).update(effort=["quick"]),
    "a location that is no text": lambda s: original(s).update(location=7),
    "no measurements": lambda s: s["predicate"].update(measurements=None),
    "a list": lambda s: s.update(predicate=[s["predicate"]]),
}


# Files


def cut_certificate(given: Certified) -> str:
    content = given.certificate.read_bytes()
    given.certificate.write_bytes(content[: given.random.randrange(len(content) - 2)])
    return "the certificate is cut"


def double_key(given: Certified) -> str:
    content = given.certificate.read_text("utf-8")
    given.certificate.write_text(content.replace('"seed":', '"seed": 1, "seed":'), "utf-8")
    return "the seed is stated twice"


def flip_model(given: Certified) -> str:
    return _flip(given, given.result, 1 << given.random.randrange(8))


def flip_original(given: Certified) -> str:
    return _flip(given, given.original, 1 << given.random.randrange(8))


def extend_model(given: Certified) -> str:
    given.result.write_bytes(given.result.read_bytes() + b"\0")
    return "one more byte"


def change_side_file(given: Certified) -> str | None:
    file = given.result.parent / "config.json"
    if not file.exists():
        return None
    file.write_bytes(file.read_bytes() + b" ")
    given.state_digests()
    return "a space in config.json"


def replace_by_original(given: Certified) -> str:
    given.result.write_bytes(given.original.read_bytes())
    return "the model is the original"


def flip_weight(given: Certified) -> str | None:
    """Flip the lowest bit of one element: a difference that no measurement shows."""
    return _flip_weight(given, given.result)


def flip_weight_of_the_original(given: Certified) -> str | None:
    return _flip_weight(given, given.original)


def swap_weights(given: Certified) -> str | None:
    """Exchange two weights of one shape and type in the result."""
    model = onnx.load(given.result)
    by_kind: dict[tuple[Any, ...], onnx.TensorProto] = {}
    for tensor in model.graph.initializer:
        other = by_kind.setdefault((tensor.data_type, *tensor.dims), tensor)
        if (
            other is not tensor
            and len(tensor.dims) > 1
            and numpy_helper.to_array(other).tobytes() != numpy_helper.to_array(tensor).tobytes()
        ):
            other.name, tensor.name = tensor.name, other.name
            _replace(given.result, model)
            given.state_digests()
            return f"`{tensor.name}` and `{other.name}` swapped"
    return None


def mutate_result(given: Certified) -> str | None:
    """A fault in the graph of the result, with its digest."""
    model = onnx.load(given.result)
    done = _mutated(given.random, model)
    if done is None:
        return None
    _replace(given.result, done[0])
    given.state_digests()
    return done[1]


def inject_mutant(given: Certified) -> str | None:
    """The result of a model with a fault, in place of that of the original."""
    for _ in range(TRIES):
        done = _mutated(given.random, onnx.load(given.original))
        try:
            subject = None if done is None else Subject.of(done[0])
            if done is None or subject is None:
                return None
            Inject().apply(subject)
        except KvsurgeonError:
            continue
        if different_part(subject.model, io.load(given.result), FileDigests()) is None:
            continue  # the fault makes no difference, such as one in the shapes of a fixed length
        _replace(given.result, io.to_proto(subject.model))
        given.state_digests()
        return f"injected after: {done[1]}"
    return None


def inject_otherwise(given: Certified) -> str | None:
    """The result of other options, which is right."""
    subject = Subject.of(onnx.load(given.original))
    try:
        Inject(cache="static").apply(subject)
    except KvsurgeonError:
        return None
    _replace(given.result, io.to_proto(subject.model))
    given.state_digests()
    return "a static cache"


FILES: dict[str, tuple[Callable[[Certified], str | None], int]] = {  # with how often each is tried on a model
    one.__name__.replace("_", " "): (one, count)
    for one, count in (
        (cut_certificate, 3), (double_key, 1), (flip_model, 3), (flip_original, 2), (extend_model, 1),
        (change_side_file, 1), (replace_by_original, 1), (flip_weight, 2), (flip_weight_of_the_original, 1),
        (swap_weights, 1), (mutate_result, 5), (inject_mutant, 3), (inject_otherwise, 1),
    )
}  # fmt: skip


def _flip(given: Certified, path: Path, bits: int) -> str:
    files = [path, *(file.path for file in io.weight_files(io.load(path)))]
    file = given.random.choice(files)
    data = bytearray(file.read_bytes())
    place = given.random.randrange(len(data))
    data[place] ^= bits
    file.write_bytes(data)
    return f"bits {bits:#x} of byte {place} of {file.name}"


def _flip_weight(given: Certified, path: Path) -> str | None:
    model = onnx.load(path)
    tensors = [one for one in model.graph.initializer if len(one.raw_data) > 64]
    if not tensors:
        return None
    tensor = given.random.choice(tensors)
    data = bytearray(tensor.raw_data)
    data[len(data) // 2 // 8 * 8] ^= 1
    tensor.raw_data = bytes(data)
    _replace(path, model)
    given.state_digests()
    return f"a bit of `{tensor.name}`"


def _mutated(random: Random, model: onnx.ModelProto) -> tuple[onnx.ModelProto, str] | None:
    for _ in range(TRIES):
        graph = Graph(model=copy.deepcopy(model), random=random)
        done = random.choice(MUTATIONS)(graph)
        if done is not None and graph.damaged is None and graph.model != model:
            try:
                io.load(graph.model)
            except KvsurgeonError:
                continue
            return graph.model, done
    return None


def _replace(path: Path, model: onnx.ModelProto) -> None:
    """Write a model, with its weights inside."""
    for tensor in external_data_helper._get_all_tensors(model):
        if external_data_helper.uses_external_data(tensor):
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
    path.write_bytes(model.SerializeToString())
