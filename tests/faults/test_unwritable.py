"""A run whose `--out` takes no writes any more, or not for a while, on a disk, on S3 and on Ray.

Each test prints what was measured (`pytest -s`); docs/reliability.md holds it.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_config
from tests.failing_s3 import ERRORS
from tests.faulty_s3 import Faults
from tests.small_disk import fill, mounted, remount
from threestage.run_folder.events import read_events
from threestage.training.checkpoint import Checkpoints, checkpoint_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = 4000
LOCAL = "from threestage.run.local_main import main; import sys; sys.exit(main())"
RAY = "from threestage.cli.app import main; main()"


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.integration)])
def program(request: pytest.FixtureRequest) -> str:
    return LOCAL if request.param == "local" else RAY


class Driver:
    """`threestage run` of one stage in a process of its own."""

    def __init__(self, program: str, scenes: Path, folder: Path, out: str, **training: float) -> None:
        often = {"log_every": 10, "checkpoint_every": 10, "evaluate_every": 100_000, **training}
        registry = {"tracking_uri": f"sqlite:///{folder}/mlflow.db"}
        config = tiny_config(
            scenes, stages=1, stage1={"steps": LONG, "labelled_batch": 2}, training=often, registry=registry
        )
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-c", program, *([] if program == LOCAL else ["run"]), "config.yaml", "--out", out]
        self.out, self._errors = out, folder / "errors"
        with self._errors.open("wb") as errors, (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=errors)

    def wait_for_checkpoint(self, after: int = 0) -> int:
        """Until one after a step is saved; its step."""
        while self.process.poll() is None:
            latest = Checkpoints(checkpoint_folder(f"{self.out}/stage1")).latest()
            if latest is not None and latest.step > after:
                return latest.step
            time.sleep(0.05)
        raise AssertionError(self._errors.read_text()[-2000:])

    def wait_for_end(self, what: str) -> str:
        """The error's line; the driver ends with 3 within seconds of the fault."""
        fault = time.monotonic()
        code = self.process.wait(300)
        lines = [line for line in self._errors.read_text().splitlines() if line.startswith("error:")]
        print(f"\n{what}: exit code {code} after {time.monotonic() - fault:.1f} s: {lines}")
        assert code == 3 and len(lines) == 1 and "[stage/unwritable]" in lines[0], self._errors.read_text()[-3000:]
        return lines[0]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    remount(folder, "ro")
    yield
    remount(folder, "rw")


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    fill(folder)
    yield
    (folder / "filling").unlink()


@pytest.mark.parametrize(("fault", "named"), [(full, "no space left on device"), (read_only, "read-only file system")])
def test_a_disk(
    program: str,
    scenes: Path,
    tmp_path: Path,
    fault: Callable[[Path], contextlib.AbstractContextManager[None]],
    named: str,
) -> None:
    with mounted(tmp_path / "disk", "size=96m") as disk:
        driver = Driver(program, scenes, tmp_path, f"{disk}/run")
        driver.wait_for_checkpoint()
        with fault(disk):
            line = driver.wait_for_end(named)
        step = driver_step(f"{disk}/run")
        assert named in line and str(disk) in line and f"checkpoint is of step {step};" in line
        shutil.copytree(disk / "run", tmp_path / "after")  # what it left can be read


def driver_step(out: str) -> int:
    latest = Checkpoints(checkpoint_folder(f"{out}/stage1")).latest()
    assert latest is not None
    return latest.step


@pytest.mark.parametrize("name", ["denied", "token", "bucket"])
def test_a_store_that_refuses(program: str, scenes: Path, tmp_path: Path, faults: Faults, name: str) -> None:
    driver = Driver(program, scenes, tmp_path, "s3://bucket/run")
    driver.wait_for_checkpoint()
    faults.answer = ERRORS[name]
    line = driver.wait_for_end(f"S3 {ERRORS[name].code}")
    assert "s3://bucket" in line and "last good checkpoint is of step" in line
    faults.answer = None
    assert f"of step {driver_step('s3://bucket/run')};" in line


def warnings_of(out: str) -> list[str]:
    """Those of the events, once they have been written: their thread, too, waits for a store that was away."""
    for _ in range(60):
        if warnings := [event["text"] for event in read_events(out) if event["kind"] == "warning"]:
            return warnings
        time.sleep(1)
    return []


@pytest.mark.parametrize(("seconds", "limit_s"), [(20, 900), (150, 5)])
def test_a_store_that_is_away(
    program: str, scenes: Path, tmp_path: Path, faults: Faults, seconds: int, limit_s: int
) -> None:
    """Longer than the client's own retries, with the limit shortened: training waits, and continues with the next step."""
    driver = Driver(program, scenes, tmp_path, "s3://bucket/run", unsaved_limit_s=limit_s)
    before = driver.wait_for_checkpoint()
    faults.unavailable_for(seconds)
    time.sleep(seconds)
    begun = time.monotonic()
    after = driver.wait_for_checkpoint(before)
    print(
        f"\n503 for {seconds} s, limit {limit_s} s: {before} -> {after}, {time.monotonic() - begun:.1f} s after it was back"
    )
    driver.wait_for_checkpoint(after)
    warnings = warnings_of("s3://bucket/run")
    print(warnings)
    assert any("training waits" in text for text in warnings) == (seconds > 100)
    driver.stop()
