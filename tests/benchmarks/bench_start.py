"""How long it takes from the command to the first step, of each stage: `threestage run` on a Ray that it starts itself, and
`python -m threestage.local`.

    python -m tests.benchmarks.bench_start [--rounds 1] [--set a.b=c …] [--json FILE]

The preset camvid with random weights and two steps a stage. Seconds that passed: of stage 1 from the start of the process, of the
others from the completion of the pseudo-masks before it, each until the checkpoint of the first step is on disk.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.benchmarks.bench_step import make_data
from tests.benchmarks.measure import report
from threestage.config import STAGES

SETTINGS = (
    "network.batch_norm=live", "pseudo_mask.on_collapse=ignore", "pseudo_mask.final_stage=false", "training.checkpoint_every=1",
    *(f"{stage}.steps=2" for stage in STAGES),
)  # fmt: skip
COMMANDS = {
    "threestage run": [sys.executable, "-m", "threestage", "run"],
    "--local": [sys.executable, "-m", "threestage.local"],
}


def seconds_of(command: Sequence[str], data: str, settings: Sequence[str]) -> dict[str, float]:
    """To the first step of each stage, and of the whole process."""
    with tempfile.TemporaryDirectory() as out:
        places = [f"data.root={data}", f"registry.tracking_uri=sqlite:///{out}/mlflow.db"]
        changes = [part for change in (*SETTINGS, *places, *settings) for part in ("--set", change)]
        began = time.time()
        subprocess.run(
            [*command, "camvid", "--out", f"{out}/run", *changes], check=True, stdout=subprocess.DEVNULL, cwd=out
        )
        whole, run = time.time() - began, Path(out, "run")
        starts = [began, *(_written(run / f"pseudo_masks{number}" / "done.json") for number in (1, 2))]
        firsts = [_written(run / stage / "checkpoints" / "step-000000001.pt") for stage in STAGES]
    return {
        **{f"{stage}, s": first - start for stage, start, first in zip(STAGES, starts, firsts, strict=True)},
        "whole, s": whole,
    }


def _written(file: Path) -> float:
    return file.stat().st_mtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--json")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for _ in range(options.rounds):
            for name, command in COMMANDS.items():
                found[name].append(seconds_of(command, data, options.set))
    rows = [{"": name, **{key: median(run[key] for run in runs) for key in runs[0]}} for name, runs in found.items()]
    report("from the command to the first step", rows, options.json)


if __name__ == "__main__":
    main()
