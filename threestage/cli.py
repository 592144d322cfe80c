"""The command line: the list of commands (threestage/commands/), and how each ends.

Exit codes: 0 done; 1 a stage, a sweep or an ingest failed; 2 the user's mistake, or a place that does not answer; 130 Ctrl-C.
`submit` has more, see its help.
"""

import sys
from typing import Any

import typer
from pydantic import ValidationError

from threestage.commands import images, models, results, runs, submit
from threestage.errors import InputError, StageFailure
from threestage.redaction import redact
from threestage.terminal import Terminal, escape

app = typer.Typer(
    help="A few labelled images and many unlabelled ones into a good segmentation model, in three stages.",
    epilog="Start with: threestage demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (
    runs.demo,
    runs.init,
    runs.run,
    runs.sweep,
    runs.check,
    images.ingest,
    runs.config,
    images.evaluate,
    images.predict,
    results.report,
    results.sync,
    results.clean,
):
    app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(submit.app, name="submit")

UsageError: Any = typer.BadParameter.__base__  # typer does not export it


def main() -> None:
    """Entry point: what goes wrong is one line on standard error."""
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        _fail(_usage(error), 2)
    except typer.Abort:
        _fail("nothing was answered, nothing was done: give --yes to answer beforehand", 1)
    except InputError as error:
        _fail(error, 2)
    except StageFailure as error:
        _fail(error, 1)
    except OSError as error:  # a path that cannot be read or written, a store or a cluster that does not answer
        from threestage.data.store_errors import explain

        _fail(explain(None, error), 2)


def _usage(error: Any) -> str:
    """A command line that cannot be read: what is wrong, with its value, and where the right form is shown."""
    text = error.format_message()
    if not text:  # a group alone: its help was shown
        sys.exit(2)
    if isinstance(error.__cause__, ValidationError):
        first = error.__cause__.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ").removesuffix(".")
        text = f"{error.param.opts[0]} {first['input']}: {reason}"
    return f"{text} (see {error.ctx.command_path} --help)"


def _fail(error: Exception | str, code: int) -> None:
    Terminal(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(redact(str(error)))}", highlight=False)
    sys.exit(code)
