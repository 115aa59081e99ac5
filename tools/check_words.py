"""List words that the project's vocabulary replaces by a standard term: ``path:line: found (use ...)``.

Checked are the identifiers, string literals, docstrings and comments of ``src/`` and the text of the Markdown pages.
Exit code 1 if any is found. Usage: ``python tools/check_words.py [--counts] [PATH...]``.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("src", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs")

# Regular expressions of words, and the term to use. They apply to prose and, word by word, to identifiers.
WORDS = {
    r"anew": "again, or nothing",
    r"borders?|bordering|bordered": "learned key/value rows",
    r"carry|carries|carried|carrying": "propagate, keep, contain",
    r"defendants?": "candidate model",
    r"eject(s|ed|ing|ion)?": "remove the cache, remove-cache",
    r"experiments?|laborator(y|ies)": "subgraph runner, measurement",
    r"frontiers?": "boundary",
    r"glanc(e|es|ed|ing)|peek(s|ed|ing)?": "attention pattern",
    r"handing": "host inputs, passing",
    r"hearings?": "verification",
    r"held": "kept, stored, contained",
    r"hosts?": "cache manager, application",
    r"idioms?": "cache mode",
    r"islands?": "routed region",
    r"judg(e|es|ed|ing|ement|ements|ment|ments)": "verify, verifier, verification",
    r"ladders?": "length sweep",
    r"lent|loan(s|ed)?|shelf|shelves": "graph bridge",
    r"likeness(es)?": "structural hash",
    r"meetings?": "head grouping",
    r"pens?": "node builder",
    r"recalls?|recalled": "sequence state",
    r"remember(s|ed|ing)?": "cached, stored",
    r"seen": "observed, known, read, visible",
    r"spelled|spelt|respelled|spellings?": "written, named",
    r"stems?": "fused projection",
    r"surgeons?": "kvsurgeon, the rewrite",
    r"telling|tells|told": "state, give, known",
    r"witness(es|ed)?": "reference model",
    r"wobbl(e|es|ed|ing)": "noise floor",
}

# British spellings.
SPELLINGS = {
    r"\w*(quanti|optimi|normali|recogni|initiali|seriali)s(e|ed|es|er|ers|ing|ation|ations)": "-iz-",
    r"analys(e|ed|ing)|labelled|neighbour\w*|behaviour\w*|colour\w*": "American spelling",
}

# Phrases of prose: docstrings, comments, messages, help and Markdown.
PHRASES = {
    r"(as|of|in|on) (its|their|a model's|the model's|one's) own\b(?! \w+ file)|\bof his own": "own, separate, nothing",
    r"as it was|as they were|as it lies|as they lie|lies as": "unchanged, in the cache layout",
    r"beside": "next to, in addition to",
    r"by (itself|themselves)": "alone, nothing",
    r"hand(s|ed)? (over|on|out|to)": "pass, return",
    r"held against": "compared with",
    r"looks? at whom|looks? ahead": "attends to",
    r"lies|lying": "is, is stored",
    r"somebody|nobody|whoever": "the caller, another package, unused",
    r"stand-ins?|stands? in for": "probe inputs, synthetic inputs",
    r"stands?(?! for)": "is, appears",
    r"take(s|n)? out|taking out": "remove",
    r"turned about|turned by|turns? (keys|queries)": "rotated, transposed",
    r"what is lost": "accuracy loss",
}

# Values of options, passes and files that were renamed.
RENAMED = {
    r"--idiom|idiom=": "--cache",
    r"new-only": "new-tokens",
    r"[`\"'=]in-place\b|^in-place$": "static",
    r"[`\"'=]grow[`\"',}]|^grow$": "dynamic",
    r"without-mask|without-nan-guards": "remove-mask, remove-nan-guards",
    r"count-positions": "past-length-from-positions",
    r"(?<!re)name-dims": "rename-dims",
    r"give-context": "host-inputs",
    r"narrow-ids|widen-ids": "int32-inputs, int64-inputs",
    r"plain-gather": "gather-nd-to-gather",
    r"half-range-masks": "float16-mask-range",
    r"write-repeats|write-divisions": "concat-to-tile, reciprocal-to-div",
}

# Words that are fine in prose and not as a name.
NAMES = {
    r"beside|stand|stands|standing|lie|lies|lying": "what it is or does",
    r"grow|inplace": "dynamic, static",
    r"memory|memories": "cache, cached tensor",
    r"nought": "zero",
    r"room": "capacity",
    r"turn|turns|turned": "rotary embedding, rotation",
    r"way|ways": "layout, path",
}

# First words of a docstring that is no verb and no noun phrase.
OPENINGS = {r"(It|Let|What|Where|Which|Who|How)\b": "a verb or a noun phrase to open a docstring"}


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """An allowed use.

    Attributes:
        path: Glob of the files, relative to the repository.
        text: Regular expression; a word inside a match of it is not reported.
        reason: Why it is the standard term here.
    """

    path: str
    text: str
    reason: str


ALLOWED = (
    Allowance(path="*", text=r"host program", reason="the vendor's program on the host, as opposed to the device"),
    Allowance(path="docs/vendors.md", text=r"`seen\[distance\]`", reason="key of context.json, a file format"),
    Allowance(path="*/host_inputs/describe.py", text="seen", reason="key of context.json"),
    Allowance(path="*/workflow/verification.py", text="seen", reason="key of context.json"),
    Allowance(path="*/fusion/bias.py", text="seen", reason="name of a value in written models"),
    Allowance(path="*/reporting/json_output.py", text="beside", reason="key of the JSON output"),
    Allowance(path="*/reporting/table.py", text="beside", reason="key of the JSON output"),
    Allowance(path="*/targets/qnn.py", text="host", reason="the vendor's term for its CPU side"),
    Allowance(path="*injector.py", text="inplace", reason="parameter of SparseML's injector, whose interface this is"),
    Allowance(path="*", text=r"held[-_ ]out|HELD_OUT", reason="data that is not used in training"),
    Allowance(path="*", text=r"host[-_ ]inputs?", reason="inputs that the application computes: a pass"),
)


@dataclass(frozen=True, kw_only=True, order=True)
class Finding:
    """A replaced word.

    Attributes:
        path: The file, relative to the repository.
        line: Line number, from 1.
        word: The text that matched.
        use: The terms to use.
    """

    path: str
    line: int
    word: str
    use: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word} (use: {self.use})"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Patterns compiled into one expression.

    Attributes:
        pattern: Alternatives, each a group.
        uses: The terms to use, in the order of the groups.
    """

    pattern: re.Pattern[str]
    uses: tuple[str, ...]

    @classmethod
    def of(cls, *tables: dict[str, str], before: str = "", after: str = "") -> Rules:
        """Compile tables of patterns."""
        merged = {pattern: use for table in tables for pattern, use in table.items()}
        groups = (f"(?P<_{number}>{pattern})" for number, pattern in enumerate(merged))
        pattern = re.compile(f"{before}(?:{'|'.join(groups)}){after}", re.IGNORECASE)
        return cls(pattern=pattern, uses=tuple(merged.values()))

    def matches(self, text: str) -> Iterator[tuple[re.Match[str], str]]:
        """Yield each match with the terms to use."""
        for match in self.pattern.finditer(text):
            number = next(int(name[1:]) for name, found in match.groupdict().items() if found is not None)
            yield match, self.uses[number]


PROSE = Rules.of(WORDS, SPELLINGS, PHRASES, before=r"(?<![\w-])", after=r"(?![\w])")
OLD_NAMES = Rules.of(RENAMED)
NAME = Rules.of(WORDS, SPELLINGS, NAMES, before="(?<![a-zA-Z])", after="(?![a-zA-Z])")
OPENING = Rules.of(OPENINGS, before="^")


def main() -> int:
    """Print the findings; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; the whole repository if none is given")
    parser.add_argument("--counts", action="store_true", help="print counts per folder and per word only")
    options = parser.parse_args()
    found = sorted({finding for path in files(options.paths or default_paths()) for finding in check(path)})
    print("\n".join(counts(found) if options.counts else map(str, found)))
    return bool(found)


def default_paths() -> list[Path]:
    """Return the files and folders of the repository that are checked."""
    return [ROOT / path for path in PATHS if (ROOT / path).exists()]


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files and Markdown pages below some paths."""
    for path in paths:
        yield from (one for one in path.rglob("*") if one.suffix in (".py", ".md")) if path.is_dir() else (path,)


def check(path: Path) -> Iterator[Finding]:
    """Yield the findings in a file that are not allowed."""
    path = path.resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
    allowed = re.compile("|".join(f"(?:{one.text})" for one in ALLOWED if fnmatch(name, one.path)) or "(?!)", re.I)
    texts = in_python(path) if path.suffix == ".py" else [(path.read_text("utf-8"), 1, (PROSE, OLD_NAMES))]
    for text, line, rules in texts:
        text = allowed.sub(lambda match: re.sub(r"\S", " ", match[0]), text)
        for match, use in (pair for one in rules for pair in one.matches(text)):
            word = match[0].strip("`\"'=")
            yield Finding(path=name, line=line + text.count("\n", 0, match.start()), word=word, use=use)


def in_python(path: Path) -> Iterator[tuple[str, int, tuple[Rules, ...]]]:
    """Yield the identifiers, strings and comments of a module, each with its first line and its rules."""
    text = path.read_text("utf-8")
    yield path.stem, 1, (NAME,)
    for node in ast.walk(ast.parse(text)):
        for name in identifiers(node):
            yield re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name), getattr(node, "lineno", 1), (NAME,)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno, (PROSE, OLD_NAMES)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            yield ast.get_docstring(node) or "", node.body[0].lineno, (OPENING,)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, token.start[0], (PROSE, OLD_NAMES)


def identifiers(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.id if isinstance(node, ast.Name) else node.attr


def counts(found: list[Finding]) -> Iterator[str]:
    """Yield lines with the number of findings per folder, then per word."""
    folders = Counter("/".join(one.path.split("/")[:3]) for one in found)
    words = Counter(one.word.lower() for one in found)
    yield from (f"{number:5} {name}" for name, number in folders.most_common())
    yield f"{len(found):5} in all; most frequent:"
    yield from (f"{number:5} {name}" for name, number in words.most_common(40))


if __name__ == "__main__":
    sys.exit(main())
