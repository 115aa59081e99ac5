"""The help of the command line: a section for the commands, and one for the passes."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

PASSES = "Passes"  # section of the commands that run one pass
_COMMANDS = "Commands"
_WHOLE = 1000  # characters: a summary is wrapped, not shortened


class CommandGroup(TyperGroup):
    """Commands in sections; a section is the help panel of a command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each help panel, with whole summaries."""
        sections: dict[str, list[tuple[str, str]]] = {_COMMANDS: []}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            rows = sections.setdefault(command.rich_help_panel or _COMMANDS, [])
            rows.append((name, command.get_short_help_str(_WHOLE)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
