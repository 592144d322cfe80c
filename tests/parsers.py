"""The parsers of the commands, by name."""

from typing import Any

import typer

from threestage.cli.app import app

PARSERS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
