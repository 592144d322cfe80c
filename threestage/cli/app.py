"""The command line: its commands (the modules beside this one) and its exit codes.

Exit codes: 0 done; 1 a stage, a sweep or an ingest failed; 2 wrong input, or a place that does not answer; 3 the run's folder
takes no more writes; 130 Ctrl-C; 143 SIGTERM. `submit` has more, see its help.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn, TextIO

import typer
from pydantic import ValidationError

from threestage import __version__
from threestage.cli import images, labels, models, results, run_status, runs, selection, serve, submit, train_images
from threestage.cli.options import Terminal, escape, print_json, warn
from threestage.data.parallel import end_process
from threestage.errors import CodedError, InputError, RenamedSetting, StageFailure, Stopped, UnwritablePlace
from threestage.redaction import redact

app = typer.Typer(
    epilog="Start with: threestage demo, or threestage train --help",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (
    runs.demo,
    train_images.train,
    runs.init,
    runs.run,
    runs.sweep,
    runs.check,
    runs.doctor,
    images.ingest,
    runs.config,
    images.evaluate,
    images.predict,
    serve.serve,
    results.report,
    results.sync,
    results.clean,
):
    app.command()(command)
app.command("classes")(labels.list_classes)
app.command("next")(selection.choose_next)
app.command("suspects")(selection.list_suspects)
app.command("forecast")(selection.forecast_labels)
app.add_typer(labels.app, name="labels")
app.add_typer(models.app, name="models")
app.add_typer(run_status.app, name="runs")
app.add_typer(submit.app, name="submit")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"threestage {__version__}")
        raise typer.Exit


@app.callback()
def of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Train a semantic-segmentation model from a few labelled images and many unlabelled ones, in three stages."""
    del version  # its callback has printed it


UsageError: Any = typer.BadParameter.__base__  # typer does not export it


def main() -> None:
    """Entry point of `threestage`."""
    warnings.showwarning = _show_warning
    try:
        with reported():
            sys.exit(app(standalone_mode=False))
    except SystemExit as end:
        code = end.code
    end_process(code)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """End the process at an error: one line on standard error and, with --json, an object on standard output."""
    try:
        yield
    except UsageError as error:
        _fail(InputError(_usage(error), "config/usage"), 2)
    except typer.Abort:
        _fail(
            StageFailure("no answer given, nothing was changed; use --yes to skip the question", "clean/no-answer"), 1
        )
    except InputError as error:
        _fail(error, 2)
    except UnwritablePlace as error:
        _fail(error, 3)
    except Stopped as error:
        _fail(error, 143)
    except StageFailure as error:
        _fail(error, 1)
    except OSError as error:  # a path that cannot be read or written, a store or a cluster that does not answer
        from threestage.data.storage_errors import explain

        _fail(explain(None, error), 2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Of settings in one line, without where in the code; others as Python shows them."""
    if issubclass(category, RenamedSetting):
        warn(str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


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


def _fail(error: CodedError, code: int) -> NoReturn:
    shown = CodedError(redact(error.message), error.code)
    Terminal(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(shown))}", highlight=False)
    if "--json" in sys.argv:
        print_json({"error": shown.as_json()})
    sys.exit(code)
