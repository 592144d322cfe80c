"""The whole pipeline in this process: for a debugger, and for machines that have neither Ray nor MLflow.

    python -m threestage.local PRESET_OR_YAML --out FOLDER [--seed N] [--set a.b=c …]

needs torch, timm, pyarrow and pydantic only, and segmentation-models-pytorch for network.head=deeplabv3plus.
"""

import argparse
import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NoReturn

import torch

from threestage import pipeline
from threestage.allocator import keep_freed_memory
from threestage.config import Config, load
from threestage.data.pool import PoolFile
from threestage.data.store_errors import explain
from threestage.errors import InputError, StageFailure
from threestage.models.export import load_model
from threestage.plain_text import one_line, visible
from threestage.pool_prediction import predict_files
from threestage.pseudo_masks import FileReport, PoolTask
from threestage.redaction import redact
from threestage.stages import StageTask, local_unlabelled, train_stage
from threestage.training.worker import LocalWorker, default_device
from threestage.verdict import text

EXAMPLE = "Example: python -m threestage.local demo --set data.root=runs/demo-0/data --out runs/demo"
Show = Callable[[str, Mapping[str, float]], None]  # (stage, row of metrics)


def run_local(
    config: Config,
    out: str,
    show: Show,
    warn: pipeline.Warn = print,
    record: pipeline.Record = lambda outcome: None,
    watch: pipeline.Watch = lambda what, done, total: None,
    reuse: str | None = None,
) -> dict[str, Any]:
    """Run the three stages here; returns what results.json holds. `reuse`: see pipeline.run."""
    keep_freed_memory()

    def run_stage(task: StageTask) -> None:
        keep = config.training.checkpoints_kept
        worker = LocalWorker(task.folder, keep, local_unlabelled(task), lambda row: show(task.stage, row), warn)
        with worker.listening():
            train_stage(task, worker)

    return pipeline.run(config, out, run_stage, predict_pool, record, warn, watch=watch, reuse=reuse)


def predict_pool(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
    """Predict every file of the pool, one after the other; their reports as they are done."""
    device = default_device()
    yield from predict_files(load_model(model)[0].to(device), task, files, device)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_failed(InputError(f"{message} (see {self.prog} --help)", "config/usage"), 2))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m threestage.local", description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("config", help="a preset or a YAML file")
    parser.add_argument("--out", required=True, help="folder of the run; the same folder continues it")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one setting; repeatable")
    options = parser.parse_args(arguments)
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    from threestage import runs  # which imports this module

    try:
        config = load(options.config, [*options.set, *seed])
        results = runs.run(config, options.out, True, _print_row, _print, _print_count)
    except (InputError, StageFailure) as error:
        return _failed(error, 1 if isinstance(error, StageFailure) else 2)
    except OSError as error:
        return _failed(explain(None, error), 2)
    if (verdict := text(results)) is not None:
        _print(verdict)
    print(json.dumps(results["stages"], indent=1))
    return 0


def _failed(error: Exception | str, code: int) -> int:
    print(f"error: {one_line(redact(str(error)))}", file=sys.stderr)
    return code


def _print(text: str) -> None:
    print(visible(text), flush=True)


def _print_row(stage: str, row: Mapping[str, float]) -> None:
    values = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
    _print(f"{stage} step {int(row['step'])}  {values}")


def _print_count(what: str, done: int, total: int) -> None:
    _print(f"{what}: {done} of {total} images")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
