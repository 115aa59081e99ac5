"""Write the help topics of CPython as a text of a number of tokens: the same text wherever that CPython runs.

python benchmarks/help_topics.py MODEL/tokenizer.json -o topics.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer


def help_text(tokenizer: Tokenizer, tokens: int) -> str:
    """Return the first tokens of all help topics, in the order of their names."""
    found = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)
    if len(found.ids) < tokens:
        raise SystemExit(f"expected {tokens} tokens, found {len(found.ids)}")
    return tokenizer.decode(found.ids[:tokens])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--tokens", type=int, default=8194, help="by default, each half predicts 4,096")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.write_text(help_text(Tokenizer.from_file(str(given.tokenizer)), given.tokens), "utf-8")


if __name__ == "__main__":
    main()
