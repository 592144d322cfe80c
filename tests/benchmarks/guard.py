"""Is anything slower than it was? Ratios from one run against those that were recorded: a part of `make test`.

    python -m tests.benchmarks.guard [--record]

Synthetic scenes, one torch thread, CPU seconds of this process: what else runs on the machine counts little. A ratio that is more
than SLACK below its record fails; what it means is told in the benchmark that it comes from. --record writes a new record:
after a change that is meant to have an effect, on a machine that has nothing else to do.
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
SLACK = 0.2
SMALL = (
    "stages=2", "network.head=deeplabv2", "augment.crop_size=[80, 112]", "stage1.labelled_batch=2",
    *(f"stage{n}.{kind}_batch=2" for n in (2, 3) for kind in ("labelled", "unlabelled")),
)  # fmt: skip


def ratios(data: str) -> dict[str, float]:
    """What is compared; more is better."""
    found = {}
    for row in measure_stages(quick_config("camvid", data, SMALL), steps=20):
        found[f"{row['stage']}: bare / step"] = row["bare / step"]
        found[f"{row['stage']}: bare memory / memory"] = 1 / row["memory / bare"]
    found["EMA: loop / ours"] = bench_ema.measure("mobilenetv2_100", rounds=20)["loop / ours"]
    views = bench_augment.images_per_second(bench_augment.strong_ways((160, 224), number=8), number=8, rounds=25)
    found["strong views: of plain PIL"] = views["ours"] / views["plain PIL"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = ratios(make_scenes(Path(folder)))
    if options.record:
        RECORD.write_text(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1) + "\n")
    recorded = json.loads(RECORD.read_text())
    rows = [
        {"ratio": name, "now": value, "recorded": recorded[name], "fell": value < recorded[name] * (1 - SLACK)}
        for name, value in found.items()
    ]
    report("speed and memory against the record", rows, None)
    fallen = [row["ratio"] for row in rows if row["fell"]]
    if fallen:
        print(f"more than {SLACK:.0%} below {RECORD.name}: {', '.join(map(str, fallen))}", file=sys.stderr)
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
