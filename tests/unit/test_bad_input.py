"""Why: what a user types wrong must end at once, in one line that names the thing, its value and the mend; never in a traceback,
never in a cluster that is started in vain."""

import io
import json
import os
import pickle
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
from threestage import local
from threestage.cli import main
from threestage.data.records import MANIFEST_NAME
from threestage.models.export import ModelCard, save_model
from threestage.models.network import NetworkSettings, build_network

CLOSED = "http://127.0.0.1:9"  # a port on which nobody listens
JOBS = Path(threestage.__file__).resolve().parents[1] / "jobs"
SPACE = {"stages": [2], "search": {"consistency.weight": {"uniform": [0, 1]}}, "trials": 2}
CLASSES = [{"name": "ground", "colour": [90, 90, 90], "ids": [0]}, {"name": "thing", "colour": [255, 0, 0], "ids": [1]}]

USAGE = """
rnu demo                                             | rnu | Did you mean 'run'
run                                                  | config | threestage run --help
run demo --sed 3                                     | --sed | --seed | --help
run demo --seed x                                    | --seed x | integer
run demo extra                                       | extra | threestage run --help
models pul models:/x/1 out                           | pul | Did you mean 'pull'
submit rnu                                           | rnu | Did you mean 'run'
demo --seed -1                                       | --seed -1 | greater than or equal to 0
sweep thresholds mine.yaml --trials 0                | --trials 0 | greater than or equal to 1
predict model images out --workers 0                 | --workers 0 | greater than or equal to 1
ingest images out --max-bad-fraction 2               | --max-bad-fraction 2 | less than or equal to 1
evaluate model data --split vla                      | --split vla | 'val'
report run --images 0                                | --images 0 | greater than or equal to 1
clean                                                | run | threestage clean --help
"""
CONFIGURATION = """
config camvd                                         | camvd | did you mean camvid?
config nowhere.yaml                                  | nowhere.yaml | nor a YAML file
config images                                        | images | nor a YAML file
config broken.yaml                                   | broken.yaml | line 2, column 5 | mend it there
config list.yaml                                     | list.yaml | sections such as data:
config empty.yaml                                    | empty.yaml | sections such as data:
config binary.yaml                                   | binary.yaml | data/not-utf8
config wrong-base.yaml                               | base='camvd' | did you mean camvid?
config types.yaml                                    | stage1.steps='many' | integer | augment=[1] | section
config demo --set stage1.steps                       | --set stage1.steps | write it as a.b=c
config demo --set stage1..steps=3                    | --set stage1..steps=3 | write it as a.b=c
config demo --set stage1.stps=3                      | stage1.stps=3 | did you mean steps?
config demo --set stge1.steps=3                      | stge1 | did you mean stage1?
config demo --set stage1=3                           | stage1=3 | a section
config demo --set stage1.steps.x=3                   | stage1.steps.x=3 | steps is a value
config demo --set stage1.steps=-1                    | stage1.steps=-1 | greater than or equal to 1
config demo --set stage1.steps=                      | stage1.steps=None | integer
config demo --set optimiser.learning_rate=inf        | optimiser.learning_rate=inf | finite
config demo --set network.head=deeplabv3             | network.head='deeplabv3' | did you mean deeplabv2?
config demo --set augment.crop_size=5                | augment.crop_size=5 | a list
config demo --set 'augment.crop_size=[1'             | augment.crop_size=[1 | not YAML
config demo --set 'name=a b'                         | name='a b' | pattern
config demo --set storage.endpoint=localhost:9000    | storage.endpoint='localhost:9000' | http://host:port
config demo --set storage.endpoint=http://a:b@c      | storage.endpoint | AWS_ACCESS_KEY_ID
config demo --set cluster.workers=[3,1]              | workers=(3, 1) | least
"""
RUNS = """
demo --out file --local                              | --out | file | give another
demo --out s3:/bucket --local                        | s3:/bucket | s3://bucket/prefix
demo --out out --set stage1.steps                    | --set stage1.steps | write it as a.b=c
run mine.yaml --local --out gs://bucket/run          | gs://bucket/run | s3://bucket/prefix
run mine.yaml --local --out s3://                    | s3:// | names no bucket
run mine.yaml --local --out ''                       | empty | give a path
run mine.yaml --local --out /proc/x/y                | --out | /proc/x/y | mend the path
run mine.yaml --local --out file/x                   | --out | file | give another
run mine.yaml --local --set data.root=nowhere        | data.root | nowhere | threestage ingest
run mine.yaml --local --set data.root=images         | data.root | images | threestage ingest
run mine.yaml --local --set data.root=broken-data    | data.root | broken-data | bring it back
run mine.yaml --local --set data.root=newer-data     | newer-data | format 99 | upgrade threestage
run mine.yaml --local --set data.labelled=1000       | data.labelled is 1000 | ask for fewer
run mine.yaml --local --set data.labelled=ids.txt    | data.labelled=ids.txt | mend the list
run mine.yaml --local --set data.labelled=no.txt     | no.txt | mend data.labelled
run mine.yaml --local --set data.unlabelled=empty    | empty | mend data.unlabelled
run mine.yaml --local --set stage1.labelled_batch=99 | stage1.labelled_batch=99 | label more images
run mine.yaml --local --set network.encoder=resnt18  | network.encoder | resnt18 | did you mean resnet18
run mine.yaml --local --set network.weights=no.pth   | no.pth | mend network.weights
run mine.yaml --local --set network.weights=evil.pth | evil.pth | could run code | state dict
run mine.yaml --local --set network.weights=text.pth | text.pth | state dict
run mine.yaml --local --set network.weights=list.pth | list.pth | holds a list | state dict
run mine.yaml --local --set network.weights=images   | images | storage/not-a-file
run mine.yaml --local --out s3://b/x --set storage.endpoint=CLOSED | --out | CLOSED | mend storage.endpoint
run mine.yaml --out run --local                      | run | holds config.json | another folder
run mine.yaml --out broken-run --local               | split.json | is damaged | a copy
run mine.yaml --out sweep --local                    | sweep | holds a sweep | another folder
run mine.yaml --out out --local --reuse nowhere      | nowhere | mend --reuse
run mine.yaml --out out --set cluster.address=127.0.0.1:9     | cluster.address=127.0.0.1:9 | mend the address
run mine.yaml --out out --set cluster.address=ray://127.0.0.1:9 | cluster.address=ray://127.0.0.1:9 | HOST:PORT
run mine.yaml --out new --set registry.tracking_uri=CLOSED    | CLOSED | registry.tracking_uri
sweep thresholdz mine.yaml                           | thresholdz | did you mean thresholds?
sweep list.yaml mine.yaml                            | list.yaml | stages: and search:
sweep unknown-key.yaml mine.yaml                     | search.consistency.wieght | did you mean consistency.weight?
sweep unknown-range.yaml mine.yaml                   | unifrm | did you mean uniform?
sweep thresholds mine.yaml --out sweep               | sweep | --resume
sweep thresholds mine.yaml --out run                 | run | holds config.json | another folder
sweep thresholds demo --set data.root=nowhere        | data.root | nowhere | threestage ingest
check camvd                                          | camvd | did you mean camvid?
check mine.yaml --local --address x:1                | --address x:1 | leave one of them out
check mine.yaml --local --out s3:/bucket             | s3:/bucket | s3://bucket/prefix
init s3://bucket/project                             | s3://bucket/project | give a local path
init file                                            | file | give another folder
"""
IMAGES = """
ingest nowhere out --format images --local           | nowhere | does not exist | expected
ingest file out --format images --local              | file | not a directory | mend the path
ingest empty out --format images --local             | empty | no image below it | .jpg
ingest images file --format images --local           | file | another folder
ingest images s3:/b/x --format images --local        | s3:/b/x | s3://bucket/prefix
ingest images out --format cityscape                 | format='cityscape' | did you mean cityscapes?
ingest images out --format images --split tran       | split='tran' | did you mean train?
ingest images out --format images --masks masks      | masks=masks | leave --masks out
ingest images out --format voc --local               | images | no PASCAL VOC | JPEGImages
ingest images out                                    | class_map | --class-map FILE
ingest images out --class-map classes.yaml           | masks | --masks FOLDER
ingest images out --masks masks --class-map no.yaml  | no.yaml | data/class-map
ingest images out --masks masks --class-map images   | images | storage/not-a-file
ingest images out --masks masks --class-map list.yaml  | list.yaml | data/class-map
ingest images out --masks masks --class-map twice.yaml | twice.yaml | class name ground | data/class-map
ingest images out --masks empty --class-map classes.yaml --local       | empty | data/mask-format
ingest images out --masks small-masks --class-map classes.yaml --local | 3.png | 40x40 | rejected
ingest images out --masks other-ids --class-map classes.yaml --local   | 3.png | id 7 | add it
ingest cut-images out --masks masks --class-map classes.yaml --local   | 3.jpg | truncated | rejected
ingest images newer-data --format images --local     | newer-data | format 99 | upgrade threestage
ingest 'an ö folder' out --format images --local     | an ö folder | no image below it
ingest images out --format images --rows-per-file 2 --address 127.0.0.1:9 | 127.0.0.1:9 | mend the address
evaluate nowhere data                                | nowhere | holds no model | the folder of a run
evaluate newer-model data                            | newer-model | format 2 | upgrade threestage
evaluate broken-card data                            | broken-card | model.json is damaged | a copy
evaluate no-weights data                             | no-weights | no model.safetensors | a copy
evaluate broken-weights data                         | broken-weights | model.safetensors is damaged | a copy
evaluate other-card data                             | other-card | 3 classes and 2 colours | a copy
evaluate model nowhere                               | nowhere | threestage ingest
evaluate model data                                  | data has the classes | give a data set
evaluate model data --window 16                      | --window 16 | e.g. --window 256,512
evaluate model data --window 15,16                   | window=15x16 | try 16,16
evaluate model data --stride 8,8                     | stride=8x8 | give a window too
evaluate model data --scales ,                       | --scales , | e.g. --scales 0.75,1,1.25
evaluate model data --scales 1,1000000               | scales.1=1000000.0 | less than or equal to 16
evaluate models:/x data --tracking-uri sqlite:///empty.db  | models:/x | models:/NAME@champion
evaluate models:/x/1 data --tracking-uri CLOSED      | CLOSED | is it up
predict model nowhere out                            | nowhere | not found | give an image
predict model empty out                              | empty | no images there | give the folder
predict model bad.parquet pre                        | bad.parquet | not a Parquet file | remove it
predict model other.parquet pre                      | other.parquet | picture | rename or convert it
predict model images images/out                      | images/out | give another folder
predict model images file --local                    | file | is a file | another folder
predict model images out --format pngg               | format='pngg' | did you mean png?
predict newer-model images out                       | newer-model | format 2 | upgrade threestage
predict model s3:/b/x out                            | s3:/b/x | s3://bucket/prefix
predict model images pre --address 127.0.0.1:9       | 127.0.0.1:9 | mend the address
"""
RESULTS = """
report nowhere                                       | nowhere | split.json | the folder that a run got as --out
report broken-run                                    | split.json | is damaged | a copy
report s3:/run                                       | s3:/run | s3://bucket/prefix
sync nowhere                                         | nowhere | no config.json | is no run
sync broken-run                                      | config.json | is damaged | a copy
sync run                                             | config.json | storage/damaged-json
clean nowhere --yes                                  | nowhere | give the --out of a run
clean sweep --yes                                    | sweep | name one of its runs
models list --tracking-uri CLOSED                    | CLOSED | is it up
models list --tracking-uri sqlite:///text.pth        | text.pth | not a database | registry.tracking_uri
models list --tracking-uri sqlite:///no.db           | no.db | there is none | --tracking-uri
models pull camvid mod --tracking-uri sqlite:///empty.db   | camvid | models:/NAME@champion
models promote models:/camvid/9 --tracking-uri sqlite:///empty.db | models:/camvid/9 | threestage models list
models lineage models:/camvid@stage9 --tracking-uri sqlite:///empty.db | models:/camvid@stage9 | threestage models list
submit run demo                                      | --out is not given | s3://bucket/prefix
submit run demo --out runs/x                         | --out runs/x | s3://bucket/prefix
submit run demo --out s3://b/x                       | data.root=demo | s3://bucket/
submit run camvd --out s3://b/x                      | camvd | did you mean camvid?
submit run demo --out s3://b/x --sed 3               | --sed | --seed
submit run demo --out s3://b/x --local               | --local | leave it out
submit run demo --out s3://b/x --working-dir nowhere | --working-dir nowhere | no such folder
submit run demo --out s3://b/x --env 3=4 --set data.root=s3://b/d | --env 3 | NAME=VALUE
submit run demo --out s3://b/x --env A_KEY=x --set data.root=s3://b/d | --env A_KEY | a Secret
submit run demo --out s3://b/x --entrypoint-resources { --set data.root=s3://b/d | --entrypoint-resources { | AMOUNT
submit run demo --out s3://b/x --working-dir empty --address localhost --set data.root=s3://b/d | --address localhost | http://127.0.0.1:8265
submit run demo --out s3://b/x --working-dir empty --address CLOSED --set data.root=s3://b/d | --address CLOSED | mend the address
submit sweep thresholdz demo --out s3://b/x          | thresholdz | did you mean thresholds?
submit ingest images out --format images             | OUT out | s3://bucket/prefix
submit predict model images out                      | OUT out | s3://bucket/prefix
submit evaluate model data --out out                 | --out out | s3://bucket/prefix
"""
OTHER_PROGRAMS = """
jobs/run.py camvd                                    | camvd | did you mean camvid?
jobs/sweep.py thresholdz demo                        | thresholdz | did you mean thresholds?
jobs/ingest.py nowhere out --format images --local   | nowhere | does not exist
jobs/predict.py nowhere images out                   | nowhere | the folder of a run
jobs/evaluate.py nowhere data                        | nowhere | the folder of a run
threestage.local camvd --out out                     | camvd | did you mean camvid?
threestage.local demo                                | --out | python -m threestage.local --help
threestage.local demo --out out --seed x             | --seed | 'x' | --help
threestage.local demo --out s3:/b                    | s3:/b | s3://bucket/prefix
"""


def rows(table: str) -> Iterator[Any]:
    for line in table.strip().replace("CLOSED", CLOSED).splitlines():
        command, *expected = (part.strip() for part in line.split(" | "))
        yield pytest.param(command, expected, id=command)


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
            raise SystemExit(local.main(arguments))
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
@pytest.mark.parametrize(("line", "expected"), TABLE)
def test_one_line_names_the_thing_the_value_and_the_mend(
    line: str, expected: list[str], alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_program(line, monkeypatch)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, f"not one line: {error}"
    assert "Traceback" not in error and "\x1b" not in error
    assert [text for text in expected if text not in error] == [], error
    assert not (alone / "code-was-run").exists()


def test_every_command_is_tried() -> None:
    from tests.unit.test_help import COMMANDS

    tried = [row.values[0] for row in TABLE]
    assert [name for name in COMMANDS if not any(f"{line} ".startswith(f"{name} ") for line in tried)] == []


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ("--local --set data.root=nowhere", "data.root", "threestage ingest"),
        ("--local --set stage1.labelled_batch=99", "input", "label more images"),
        ("--set registry.tracking_uri=CLOSED --set data.root=nowhere", "registry.tracking_uri", "is it up"),
        ("--set cluster.address=127.0.0.1:9 --set data.root=nowhere", "cluster.address", "mend the address"),
    ],
)
def test_check_says_what_is_wrong_in_a_line_each(
    options: str,
    name: str,
    expected: str,
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("threestage.check.measure_here", lambda found: iter(()))
    assert run_program(f"check mine.yaml --json {options.replace('CLOSED', CLOSED)}", monkeypatch) == 2
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert expected in lines[name]["problem"]


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
    assert "give --yes" in capsys.readouterr().err and (tmp_path / "stage1/checkpoints/1").exists()
