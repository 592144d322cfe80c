"""Bad inputs, each with the outcome that docs/reliability.md promises.

Each file here is one area and holds `BAD_INPUTS`. `test_bad_inputs.py` runs them all;
`python -m tests.bad_inputs` runs them and writes the table of docs/reliability.md.

To add one: write a function `(folder) -> str` that makes the input in the empty `folder`, runs the command and returns
what happened in a few words, then add `BadInput(what it is, what must happen, the function)` to the area's list.
"""

import contextlib
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock


class BadInput(NamedTuple):
    """One kind of bad input: a row of the table."""

    what: str
    expected: str
    try_it: Callable[[Path], str]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def error_code(self) -> str:
        """`data/foreign-folder` from an error line that ends with `[data/foreign-folder]`; empty without one."""
        line = self.err.strip().rsplit("\n", 1)[-1]
        return line.rsplit("[", 1)[-1].removesuffix("]") if line.endswith("]") else ""


def threestage(*arguments: object) -> Ended:
    """Run the command line in this process."""
    from threestage.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    command, wide = ["threestage", *map(str, arguments)], {"COLUMNS": "400"}
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, wide),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            return Ended(int(ended.code or 0), out.getvalue(), err.getvalue())
    return Ended(0, out.getvalue(), err.getvalue())


def refused(ended: Ended) -> str:
    """`refused [code]` for one line and exit code 2, else what happened."""
    if ended.code == 2 and "Traceback" not in ended.text and ended.error_code:
        return f"refused [{ended.error_code}]"
    return f"exit code {ended.code}: {ended.text.strip()[-300:]}"


def all_bad_inputs() -> dict[str, list[BadInput]]:
    """By area, in the order of their names."""
    areas = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {
        name: importlib.import_module(f"{__name__}.{name}") for name in areas if not name.startswith(("test_", "_"))
    }
    return {name: module.BAD_INPUTS for name, module in modules.items()}
