"""Why: what a user types wrong must end at once, in one line that names the thing, its value and the fix; never in a traceback,
never in a cluster that is started in vain."""

import io
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import threestage
from tests.conftest import write_photos
from threestage.cli.app import main
from threestage.data.records import MANIFEST_NAME
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.run import local_main

CODE = re.compile(r" \[[a-z-]+/[a-z0-9-]+\]")
CLOSED = "http://127.0.0.1:9"  # a port on which nobody listens
JOBS = Path(threestage.__file__).resolve().parents[1] / "jobs"
SPACE = {"stages": [2], "search": {"consistency.weight": {"uniform": [0, 1]}}, "trials": 2}
CLASSES = [{"name": "ground", "colour": [90, 90, 90], "ids": [0]}, {"name": "thing", "colour": [255, 0, 0], "ids": [1]}]

# A row: what is typed, the code of its error, and what else the line names.
USAGE = """
rnu demo                                             | config/usage | rnu | Did you mean 'run'
run                                                  | config/usage | config | threestage run --help
run demo --sed 3                                     | config/usage | --sed | --seed | --help
run demo --seed x                                    | config/usage | --seed x
run demo extra                                       | config/usage | extra | threestage run --help
models pul models:/x/1 out                           | config/usage | pul | Did you mean 'pull'
submit rnu                                           | config/usage | rnu | Did you mean 'run'
demo --seed -1                                       | config/usage | --seed -1
sweep thresholds mine.yaml --trials 0                | config/usage | --trials 0
predict model images out --workers 0                 | config/usage | --workers 0
ingest images out --max-bad-fraction 2               | config/usage | --max-bad-fraction 2
evaluate model data --split vla                      | config/usage | --split vla
report run --images 0                                | config/usage | --images 0
clean                                                | config/usage | run | threestage clean --help
"""
CONFIGURATION = """
config camvd                                         | config/not-found | camvd | did you mean camvid?
config nowhere.yaml                                  | config/not-found | nowhere.yaml
config images                                        | config/not-found | images
config broken.yaml                                   | config/not-yaml | broken.yaml | line 2, column 5
config list.yaml                                     | config/not-a-mapping | list.yaml
config empty.yaml                                    | config/not-a-mapping | empty.yaml
config binary.yaml                                   | data/not-utf8 | binary.yaml
config wrong-base.yaml                               | config/unknown-base | base='camvd' | did you mean camvid?
config types.yaml                                    | config/invalid-value | stage1.steps='many' | augment=[1]
config demo --set stage1.steps                       | config/not-an-assignment | --set stage1.steps
config demo --set stage1..steps=3                    | config/not-an-assignment | --set stage1..steps=3
config demo --set stage1.stps=3                      | config/unknown-key | stage1.stps=3 | did you mean steps?
config demo --set stge1.steps=3                      | config/unknown-key | stge1 | did you mean stage1?
config demo --set stage1=3                           | config/invalid-value | stage1=3
config demo --set stage1.steps.x=3                   | config/unknown-key | stage1.steps.x=3 | steps is a value
config demo --set stage1.steps=-1                    | config/invalid-value | stage1.steps=-1
config demo --set stage1.steps=                      | config/invalid-value | stage1.steps=None
config demo --set optimiser.learning_rate=inf        | config/invalid-value | optimiser.learning_rate=inf
config demo --set network.head=deeplabv3             | config/invalid-value | network.head='deeplabv3' | did you mean deeplabv2?
config demo --set augment.crop_size=5                | config/invalid-value | augment.crop_size=5
config demo --set 'augment.crop_size=[1'             | config/not-yaml | augment.crop_size=[1
config demo --set 'name=a b'                         | config/invalid-value | name='a b'
config demo --set storage.endpoint=localhost:9000    | storage/endpoint | storage.endpoint='localhost:9000' | http://host:port
config demo --set storage.endpoint=http://a:b@c      | storage/endpoint | storage.endpoint | AWS_ACCESS_KEY_ID
config demo --set cluster.workers=[3,1]              | config/invalid-value | workers=(3, 1)
"""
RUNS = """
demo --out file --local                              | storage/not-a-folder | --out | file
demo --out s3:/bucket --local                        | storage/scheme | s3:/bucket | s3://bucket/prefix
demo --out out --set stage1.steps                    | config/not-an-assignment | --set stage1.steps
run mine.yaml --local --out gs://bucket/run          | storage/scheme | gs://bucket/run | s3://bucket/prefix
run mine.yaml --local --out s3://                    | storage/not-a-bucket | s3://
run mine.yaml --local --out ''                       | storage/scheme
run mine.yaml --local --out /proc/x/y                | storage/not-found | --out | /proc/x/y
run mine.yaml --local --out file/x                   | storage/not-a-folder | --out | file
run mine.yaml --local --set data.root=nowhere        | data/no-data-set | data.root | nowhere | threestage ingest
run mine.yaml --local --set data.root=images         | data/no-data-set | data.root | images | threestage ingest
run mine.yaml --local --set data.root=broken-data    | storage/damaged-json | data.root | broken-data
run mine.yaml --local --set data.root=newer-data     | data/newer-format | newer-data | format 99
run mine.yaml --local --set data.labelled=1000       | data/too-few-labels | data.labelled is 1000
run mine.yaml --local --set data.labelled=ids.txt    | data/labelled-list | data.labelled=ids.txt
run mine.yaml --local --set data.labelled=no.txt     | storage/not-found | no.txt | data.labelled
run mine.yaml --local --set data.unlabelled=empty    | data/no-images | empty | data.unlabelled
run mine.yaml --local --set stage1.labelled_batch=99 | config/batch | stage1.labelled_batch=99
run mine.yaml --local --set network.encoder=resnt18  | network/unknown-encoder | network.encoder | resnt18 | did you mean resnet18
run mine.yaml --local --set network.weights=no.pth   | storage/not-found | no.pth | network.weights
run mine.yaml --local --set network.weights=evil.pth | network/damaged-weights | evil.pth
run mine.yaml --local --set network.weights=text.pth | network/damaged-weights | text.pth
run mine.yaml --local --set network.weights=list.pth | network/damaged-weights | list.pth
run mine.yaml --local --set network.weights=images   | storage/not-a-file | images
run mine.yaml --local --out s3://b/x --set storage.endpoint=CLOSED | storage/unreachable | --out | CLOSED | storage.endpoint
run mine.yaml --out run --local                      | data/foreign-folder | run
run mine.yaml --out broken-run --local               | storage/damaged-json | split.json
run mine.yaml --out sweep --local                    | data/foreign-folder | sweep
run mine.yaml --out out --local --reuse nowhere      | run/reused-gone | nowhere | --reuse
run mine.yaml --out out --set cluster.address=127.0.0.1:9 | ray/no-answer | cluster.address=127.0.0.1:9
run mine.yaml --out out --set cluster.address=ray://127.0.0.1:9 | ray/address | cluster.address=ray://127.0.0.1:9 | HOST:PORT
run mine.yaml --out new --set registry.tracking_uri=CLOSED | mlflow/unavailable | CLOSED | registry.tracking_uri
sweep thresholdz mine.yaml                           | sweep/not-found | thresholdz | did you mean thresholds?
sweep list.yaml mine.yaml                            | config/not-a-mapping | list.yaml
sweep unknown-key.yaml mine.yaml                     | config/unknown-key | search.consistency.wieght | consistency.weight?
sweep unknown-range.yaml mine.yaml                   | config/unknown-key | unifrm | did you mean uniform?
sweep thresholds mine.yaml --out sweep               | sweep/exists | sweep | --resume
sweep thresholds mine.yaml --out run                 | data/foreign-folder | run
sweep thresholds demo --set data.root=nowhere        | data/no-data-set | data.root | nowhere | threestage ingest
check camvd                                          | config/not-found | camvd | did you mean camvid?
check mine.yaml --local --address x:1                | check/local-address | --address x:1
check mine.yaml --local --out s3:/bucket             | storage/scheme | s3:/bucket | s3://bucket/prefix
init s3://bucket/project                             | storage/scheme | s3://bucket/project
init file                                            | init/exists | file
runs list nowhere                                    | run/no-run | nowhere
runs list file                                       | storage/not-found | file
runs show nowhere                                    | run/no-run | nowhere
runs compare nowhere                                 | run/no-run | nowhere
runs cost nowhere --price-per-hour -1                | config/usage | --price-per-hour -1
"""
IMAGES = """
classes nowhere                                      | data/no-files | nowhere
classes empty                                        | data/annotations | empty
labels export nowhere out --to coco                  | labels/no-masks | nowhere
labels export nowhere out --to coc                   | labels/format | --to coc | coco
models export nowhere out.onnx --to onnx             | models/no-model | nowhere
next nowhere --out chosen                            | run/no-champion | nowhere
suspects nowhere --out chosen                        | run/no-champion | nowhere
forecast nowhere --out chosen                        | run/no-champion | nowhere
serve nowhere --local                                | models/no-model | nowhere
doctor --set x=1                                     | config/usage | --set
train nowhere --masks masks --ignore white           | config/usage | --ignore white | 255,255,255
ingest nowhere out --format images --local           | data/no-files | nowhere
ingest file out --format images --local              | storage/not-found | file
ingest empty out --format images --local             | data/no-images | empty | .jpg
ingest images file --format images --local           | data/foreign-folder | file
ingest images s3:/b/x --format images --local        | storage/scheme | s3:/b/x | s3://bucket/prefix
ingest images out --format cityscape                 | config/invalid-value | format='cityscape' | did you mean cityscapes?
ingest images out --format images --split tran       | config/invalid-value | split='tran' | did you mean train?
ingest images out --format images --masks masks      | data/format-option | masks=masks
ingest images out --format voc --local               | data/layout | images | JPEGImages
ingest images out                                    | class-map/missing | class_map | --class-map FILE
ingest images out --class-map classes.yaml           | data/format-option | masks | --masks FOLDER
ingest images out --masks masks --class-map no.yaml  | data/class-map | no.yaml
ingest images out --masks masks --class-map images   | storage/not-a-file | images
ingest images out --masks masks --class-map list.yaml | data/class-map | list.yaml
ingest images out --masks masks --class-map twice.yaml | data/class-map | twice.yaml | ground
ingest images out --masks empty --class-map classes.yaml --local | data/mask-format | empty
ingest images out --masks small-masks --class-map classes.yaml --local | data/bad-images | 3.png | 40x40
ingest images out --masks other-ids --class-map classes.yaml --local | data/bad-images | 3.png | id 7
ingest cut-images out --masks masks --class-map classes.yaml --local | data/bad-images | 3.jpg
ingest images newer-data --format images --local     | data/newer-format | newer-data | format 99
ingest 'an ö folder' out --format images --local     | data/no-images | an ö folder
ingest images out --format images --rows-per-file 2 --address 127.0.0.1:9 | ray/no-answer | 127.0.0.1:9
evaluate nowhere data                                | models/no-model | nowhere
evaluate newer-model data                            | models/newer-format | newer-model | format 2
evaluate broken-card data                            | models/damaged-card | broken-card
evaluate no-weights data                             | models/no-weights | no-weights
evaluate broken-weights data                         | models/damaged-weights | broken-weights
evaluate other-card data                             | models/damaged-card | other-card
evaluate model nowhere                               | data/no-data-set | nowhere | threestage ingest
evaluate model data                                  | evaluate/other-classes
evaluate model data --window 16                      | config/usage | --window 16 | e.g. --window 256,512
evaluate model data --window 15,16                   | network/size-multiple | window=15x16 | try 16,16
evaluate model data --stride 8,8                     | predict/stride | stride=8x8
evaluate model data --scales ,                       | config/usage | --scales , | e.g. --scales 0.75,1,1.25
evaluate model data --scales 1,1000000               | config/invalid-value | scales.1=1000000.0
evaluate models:/x data --tracking-uri sqlite:///empty.db | mlflow/no-model | models:/x | models:/NAME@champion
evaluate models:/x/1 data --tracking-uri CLOSED      | mlflow/unavailable | CLOSED
predict model nowhere out                            | predict/not-found | nowhere
predict model empty out                              | predict/no-images | empty
predict model bad.parquet pre                        | predict/no-images | bad.parquet
predict model other.parquet pre                      | predict/no-images | other.parquet | picture
predict model images images/out                      | predict/output-in-input | images/out
predict model images file --local                    | data/foreign-folder | file
predict model images out --format pngg               | config/invalid-value | format='pngg' | did you mean png?
predict newer-model images out                       | models/newer-format | newer-model | format 2
predict model s3:/b/x out                            | storage/scheme | s3:/b/x | s3://bucket/prefix
predict model images pre --address 127.0.0.1:9       | ray/no-answer | 127.0.0.1:9
"""
RESULTS = """
report nowhere                                       | run/no-run | nowhere | split.json
report broken-run                                    | storage/damaged-json | split.json
report s3:/run                                       | storage/scheme | s3:/run | s3://bucket/prefix
sync nowhere                                         | run/no-run | nowhere
sync broken-run                                      | storage/damaged-json | config.json
sync run                                             | storage/damaged-json | config.json
clean nowhere --yes                                  | run/no-run | nowhere
clean sweep --yes                                    | run/no-run | sweep
models list --tracking-uri CLOSED                    | mlflow/unavailable | CLOSED
models list --tracking-uri sqlite:///text.pth        | mlflow/unavailable | text.pth | registry.tracking_uri
models list --tracking-uri sqlite:///no.db           | mlflow/no-store | no.db | --tracking-uri
models pull camvid mod --tracking-uri sqlite:///empty.db | mlflow/no-model | camvid | models:/NAME@champion
models promote models:/camvid/9 --tracking-uri sqlite:///empty.db | mlflow/no-model | models:/camvid/9
models rollback models:/camvid@champion --tracking-uri sqlite:///empty.db | mlflow/no-model | models:/camvid@champion
models lineage models:/camvid@stage9 --tracking-uri sqlite:///empty.db | mlflow/no-model | models:/camvid@stage9
submit run demo                                      | submit/unshared-place | s3://bucket/prefix
submit run demo --out runs/x                         | submit/unshared-place | --out runs/x | s3://bucket/prefix
submit run demo --out s3://b/x                       | submit/unshared-place | data.root=demo | s3://bucket/
submit run camvd --out s3://b/x                      | config/not-found | camvd | did you mean camvid?
submit run demo --out s3://b/x --sed 3               | config/usage | --sed | --seed
submit run demo --out s3://b/x --local               | config/usage | --local
submit run demo --out s3://b/x --working-dir nowhere | storage/not-found | --working-dir nowhere
submit run demo --out s3://b/x --env 3=4 --set data.root=s3://b/d | config/usage | --env 3
submit run demo --out s3://b/x --env A_KEY=x --set data.root=s3://b/d | submit/secret-variable | --env A_KEY
submit run demo --out s3://b/x --entrypoint-resources { --set data.root=s3://b/d | config/usage | AMOUNT
submit run demo --out s3://b/x --working-dir empty --address localhost --set data.root=s3://b/d | ray/address | localhost
submit run demo --out s3://b/x --working-dir empty --address CLOSED --set data.root=s3://b/d | ray/no-answer | --address CLOSED
submit sweep thresholdz demo --out s3://b/x          | sweep/not-found | thresholdz | did you mean thresholds?
submit ingest images out --format images             | submit/unshared-place | OUT out | s3://bucket/prefix
submit predict model images out                      | submit/unshared-place | OUT out | s3://bucket/prefix
submit evaluate model data --out out                 | submit/unshared-place | --out out | s3://bucket/prefix
"""
OTHER_PROGRAMS = """
jobs/run.py camvd                                    | config/not-found | camvd | did you mean camvid?
jobs/sweep.py thresholdz demo                        | sweep/not-found | thresholdz | did you mean thresholds?
jobs/ingest.py nowhere out --format images --local   | data/no-files | nowhere
jobs/predict.py nowhere images out                   | models/no-model | nowhere
jobs/evaluate.py nowhere data                        | models/no-model | nowhere
threestage.local camvd --out out                     | config/not-found | camvd | did you mean camvid?
threestage.local demo                                | config/usage | --out | python -m threestage.local --help
threestage.local demo --out out --seed x             | config/usage | --seed | 'x' | --help
threestage.local demo --out s3:/b                    | storage/scheme | s3:/b | s3://bucket/prefix
"""


def rows(table: str) -> Iterator[Any]:
    for line in table.strip().replace("CLOSED", CLOSED).splitlines():
        command, code, *named = (part.strip() for part in line.split(" | "))
        yield pytest.param(command, code, named, id=command)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("code-was-run",)


@pytest.fixture(scope="module")
def place(scenes: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything that can be wrong."""
    folder = tmp_path_factory.mktemp("bad")
    files: dict[str, str | bytes] = {
        "mine.yaml": f"base: demo\ndata: {{root: '{scenes}', labelled: 10}}",
        "broken.yaml": "data: [1, 2\nname: x\n",
        "list.yaml": "- 1",
        "empty.yaml": "",
        "binary.yaml": b"\x00\x01\xff",
        "wrong-base.yaml": "base: camvd",
        "types.yaml": "base: demo\nstage1: {steps: many}\naugment: [1]",
        "unknown-key.yaml": yaml.safe_dump(SPACE | {"search": {"consistency.wieght": {"uniform": [0, 1]}}}),
        "unknown-range.yaml": yaml.safe_dump(SPACE | {"search": {"consistency.weight": {"unifrm": [0, 1]}}}),
        "classes.yaml": yaml.safe_dump({"classes": CLASSES, "ignore": {"ids": [255]}}),
        "twice.yaml": yaml.safe_dump({"classes": [CLASSES[0], CLASSES[0]]}),
        "ids.txt": "nobody\n",
        "file": "text",
        "text.pth": "no tensors, " * 100,
        "evil.pth": pickle.dumps(Evil()),
        "bad.parquet": "text",
        f"broken-data/{MANIFEST_NAME}": "{",
        "run/split.json": "{}",
        "run/config.json": "[]",
        "broken-run/split.json": "{",
        "broken-run/config.json": "{",
        "sweep/sweep.json": '{"sweep_key": "a"}',
        "empty/nothing.txt": "",
        "an ö folder/nothing.txt": "",
        "newer-data/" + MANIFEST_NAME: json.dumps({"format": 99}),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    shutil.copy(empty_store, folder / "empty.db")
    (folder / "data").symlink_to(scenes)
    torch.save([1, 2], folder / "list.pth")
    pq.write_table(pa.table({"picture": [b"x"]}), folder / "other.parquet")
    _images(folder)
    _models(folder)
    return folder


def _images(folder: Path) -> None:
    write_photos(folder, 5)
    shutil.copytree(folder / "images", folder / "cut-images")
    (folder / "cut-images/3.jpg").write_bytes((folder / "images/3.jpg").read_bytes()[:-200])
    for name, mask in (("small-masks", np.zeros((40, 40), np.uint8)), ("other-ids", np.full((40, 48), 7, np.uint8))):
        shutil.copytree(folder / "masks", folder / name)
        Image.fromarray(mask).save(folder / name / "3.png")


def _models(folder: Path) -> None:
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    card = ModelCard(
        network=settings, classes=("ground", "thing"), colours=((0, 0, 0), (9, 9, 9)), downscale=1, stage="stage1"
    )
    save_model(str(folder / "model"), build_network(settings, 2), card)
    changes: dict[str, Callable[[Path], Any]] = {
        "newer-model": lambda model: _rewrite(model / "model.json", format=2),
        "other-card": lambda model: _rewrite(model / "model.json", classes=["a", "b", "c"]),
        "broken-card": lambda model: (model / "model.json").write_text("{"),
        "no-weights": lambda model: (model / "model.safetensors").unlink(),
        "broken-weights": lambda model: (model / "model.safetensors").write_text("text"),
    }
    for name, change in changes.items():
        shutil.copytree(folder / "model", folder / name)
        change(folder / name)


def _rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def run_program(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `threestage LINE`, `jobs/….py …` or `threestage.local …` in this process; its exit code."""
    program, *arguments = shlex.split(line)
    with pytest.raises(SystemExit) as ended:
        if program == "threestage.local":
            raise SystemExit(local_main.main(arguments))
        if program.startswith("jobs/"):
            monkeypatch.setattr("sys.argv", [program, *arguments])
            runpy.run_path(str(JOBS.parent / program), run_name="__main__")
        monkeypatch.setattr("sys.argv", ["threestage", program, *arguments])
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the folder, with no store named by the environment; Ray must not be started."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("Ray was started")

    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "RAY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.chdir(place)
    return place


TABLE = [row for table in (USAGE, CONFIGURATION, RUNS, IMAGES, RESULTS, OTHER_PROGRAMS) for row in rows(table)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.parametrize(("line", "code", "named"), TABLE)
def test_one_line_names_the_thing_the_value_and_the_fix(
    line: str,
    code: str,
    named: list[str],
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exit_code = run_program(line, monkeypatch)
    error = capsys.readouterr().err
    assert exit_code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, f"not one line: {error}"
    assert "Traceback" not in error and "\x1b" not in error
    assert error.endswith(f" [{code}]\n") and len(CODE.findall(error)) == 1, error
    assert [text for text in named if text not in error] == [], error
    assert not (alone / "code-was-run").exists()


def test_every_command_is_tried() -> None:
    from tests.unit.cli.test_help import COMMANDS

    tried = [row.values[0] for row in TABLE]
    assert [name for name in COMMANDS if not any(f"{line} ".startswith(f"{name} ") for line in tried)] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.parametrize(
    ("options", "name", "code"),
    [
        ("--local --set data.root=nowhere", "data.root", "data/no-data-set"),
        ("--local --set stage1.labelled_batch=99", "input", "config/batch"),
        ("--set registry.tracking_uri=CLOSED --set data.root=nowhere", "registry.tracking_uri", "mlflow/unavailable"),
        ("--set cluster.address=127.0.0.1:9 --set data.root=nowhere", "cluster.address", "ray/no-answer"),
    ],
)
def test_check_says_what_is_wrong_in_a_line_each(
    options: str,
    name: str,
    code: str,
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("threestage.checks.run_check.measure_here", lambda found: iter(()))
    assert run_program(f"check mine.yaml --json {options.replace('CLOSED', CLOSED)}", monkeypatch) == 2
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines[name]["code"] == code


def test_a_question_that_nobody_answers(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("split.json", "stage1/done.json", "stage1/checkpoints/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("{}")
    split = {"labelled": [], "validation": [], "validation_split": "val"}
    (tmp_path / "split.json").write_text(json.dumps({"split": split}))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run_program(f"clean {tmp_path}", monkeypatch) == 1
    assert (
        "--yes to skip the question [clean/no-answer]" in capsys.readouterr().err
        and (tmp_path / "stage1/checkpoints/1").exists()
    )
