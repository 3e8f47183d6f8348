"""Whether `sdn` would take a command line, without doing what it says."""

from __future__ import annotations

import typer.main
from typer.exceptions import Exit, TyperException

from pipelines.cli import app


def refusal(arguments: list[str]) -> str | None:
    """Why the command line is none of `sdn`; None where it is one."""
    command, rest, name, parent = typer.main.get_command(app), list(arguments), "sdn", None
    try:
        while hasattr(command, "resolve_command"):
            if not rest:
                return f"{name} needs a command"
            context = typer.Context(command, parent=parent, info_name=name)
            name, command, rest = command.resolve_command(context, rest)
            parent = context
        command.make_context(name, rest, parent=parent).close()
    except Exit:
        return "it only shows help"
    except TyperException as error:
        return error.format_message()
    return None
