"""Is anything slower than it was? Ratios from one run against those that were recorded: a part of `make test`.

    python -m tests.benchmarks.guard [--record]

Synthetic scenes, one torch thread, CPU seconds of this process. A ratio fails that is below its record by more than its slack in
each of TRIES measurements (a second and a third are made only then): noise passes, a change for the worse does not. What a
ratio means is told in the benchmark that it comes from. --record writes a new record: after a change that is meant to have
an effect, on a machine that has nothing else to do.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import bench_augment, bench_ema
from tests.benchmarks.bench_step import make_scenes, measure_stages, quick_config
from tests.benchmarks.measure import report

RECORD = Path(__file__).with_name("recorded.json")
TRIES = 3
SLACK = 0.2
# A ratio between libraries is the processor's too: 0.84 to 1.57 was seen.
OTHER_SLACK = {"strong views: of plain PIL": 0.4}
SMALL = (
    "stages=2", "network.head=deeplabv2", "augment.crop_size=[80, 112]", "stage1.labelled_batch=2",
    *(f"stage{n}.{kind}_batch=2" for n in (2, 3) for kind in ("labelled", "unlabelled")),
)  # fmt: skip


def ratios(data: str) -> dict[str, float]:
    """What is compared; more is better."""
    found = {}
    for row in measure_stages(quick_config("camvid", data, SMALL), steps=30):
        found[f"{row['stage']}: bare / step"] = row["bare / step"]
        found[f"{row['stage']}: bare memory / memory"] = 1 / row["memory / bare"]
    found["EMA: loop / ours"] = bench_ema.measure("mobilenetv2_100", rounds=20)["loop / ours"]
    ways = bench_augment.strong_ways((160, 224), number=8)
    pair = {name: ways[name] for name in ("ours", "plain PIL")}
    views = bench_augment.images_per_second(pair, number=8, draws=8, repeats=15)
    found["strong views: of plain PIL"] = views["ours"] / views["plain PIL"]
    return found


def below(found: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """The ratios that fell by more than their slack."""
    return [name for name, value in found.items() if value < recorded[name] * (1 - OTHER_SLACK.get(name, SLACK))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_scenes(Path(folder))
        found = ratios(data)
        if options.record:
            RECORD.write_text(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1) + "\n")
        recorded = json.loads(RECORD.read_text())
        for _ in range(TRIES - 1):
            if below(found, recorded):
                again = ratios(data)
                found = {name: max(value, again[name]) for name, value in found.items()}
    fallen = below(found, recorded)
    rows = [{"ratio": name, "now": found[name], "recorded": recorded[name], "fell": name in fallen} for name in found]
    report("speed and memory against the record", rows, None)
    if fallen:
        print(f"too far below {RECORD.name} in each of {TRIES} measurements: {', '.join(fallen)}", file=sys.stderr)
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
