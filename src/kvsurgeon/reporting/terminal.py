"""Output that fits a terminal: tables that become lists where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 10_000  # characters in a line outside a terminal: lines are whole
_TEXT_WIDTH = 16  # characters in a line of a text, at least
_GAP = 3  # characters between two columns, one of them of the box
_NUMBERS = ("layer", "query heads", "kv heads", "head dim", "scale", "rotary", "B/token", "batch", "tokens", "error")
_TEXTS = ("effect", "options", "client", "help")


def console(*, stderr: bool = False) -> Console:
    """Return a console that wraps lines in a terminal and keeps them whole in a pipe."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=PIPE_WIDTH)


class TextTable:
    """Rows of named cells: a table, or a list of each row's cells if the words of the table do not fit the width.

    Args:
        columns: The names of the columns.
    """

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: object) -> None:
        """Add a row."""
        self.rows.append(tuple(map(str, cells)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table or the list."""
        widths = self._widths(options.max_width - _GAP * (len(self.columns) - 1))
        yield from self._lists() if widths is None else [self._table(widths)]

    def _widths(self, available: int) -> list[int] | None:
        """Return the width of each column, none below that of its longest word; None if these do not fit."""
        texts = list(zip(self.columns, *self.rows, strict=True))
        least = [max(cell_len(word) for text in column for word in text.split()) for column in texts]
        least = [max(width, _TEXT_WIDTH * (name in _TEXTS)) for name, width in zip(self.columns, least, strict=True)]
        widths = [max(low, *map(cell_len, column)) for low, column in zip(least, texts, strict=True)]
        if sum(least) > available:
            return None
        while sum(widths) > available:
            widest = max(range(len(widths)), key=lambda index: (widths[index] > least[index], widths[index]))
            widths[widest] -= 1
        return widths

    def _table(self, widths: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
        for column, width in zip(self.columns, widths, strict=True):
            table.add_column(column, justify="right" if column in _NUMBERS else "left", width=width)
        for cells in self.rows:
            table.add_row(*map(Text, cells))  # as Text, because a name may look like markup
        return table

    def _lists(self) -> Iterator[Text | Table]:
        for first, *others in self.rows:
            yield Text(f"{self.columns[0]} {first}", style="bold")
            table = Table.grid("name", "cell", padding=(0, 2, 0, 0))
            for column, cell in zip(self.columns[1:], others, strict=False):
                table.add_row(f"  {column}", Text(cell, overflow="fold"))
            yield table
