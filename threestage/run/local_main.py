"""Run the whole pipeline in this process: for a debugger, and for machines without Ray and MLflow.

    python -m threestage.local PRESET_OR_YAML --out FOLDER [--seed N] [--set a.b=c …]

This needs only torch, timm, pyarrow and pydantic, and segmentation-models-pytorch for network.head=deeplabv3plus.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from threestage.config import load
from threestage.data.storage_errors import explain
from threestage.errors import InputError, StageFailure, Stopped, UnwritablePlace
from threestage.plain_text import escape_control_chars, one_line
from threestage.redaction import redact
from threestage.run.backend import RunCallbacks
from threestage.run.run import run
from threestage.verdict import verdict_text

EXAMPLE = "Example: python -m threestage.local demo --set data.root=runs/demo-0/data --out runs/demo"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_failed(InputError(f"{message} (see {self.prog} --help)", "config/usage"), 2))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m threestage.local", description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("config", help="preset or YAML file")
    parser.add_argument("--out", required=True, help="folder of the run; the same folder resumes it")
    parser.add_argument("--seed", type=int, help="random seed")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one setting; repeatable")
    options = parser.parse_args(arguments)
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    try:
        config = load(options.config, [*options.set, *seed])
        results = run(config, options.out, True, RunCallbacks(_print_row, _print, _print_count))
    except (InputError, StageFailure) as error:
        kinds = {UnwritablePlace: 3, Stopped: 143, StageFailure: 1, InputError: 2}
        return _failed(error, next(code for kind, code in kinds.items() if isinstance(error, kind)))
    except OSError as error:
        return _failed(explain(None, error), 2)
    if (verdict := verdict_text(results)) is not None:
        _print(verdict)
    print(json.dumps(results["stages"], indent=1))
    return 0


def _failed(error: Exception | str, code: int) -> int:
    print(f"error: {one_line(redact(str(error)))}", file=sys.stderr)
    return code


def _print(text: str) -> None:
    print(escape_control_chars(text), flush=True)


def _print_row(stage: str, row: Mapping[str, float]) -> None:
    values = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
    _print(f"{stage} step {int(row['step'])}  {values}")


def _print_count(what: str, done: int, total: int) -> None:
    _print(f"{what}: {done} of {total} images")
