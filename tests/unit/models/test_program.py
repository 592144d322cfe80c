"""Why: a model that trained must be usable elsewhere, and a program that could run code must not be loaded."""

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.bad_inputs.models import packed_model
from threestage.config import load
from threestage.data.bands import Bands
from threestage.models import program as programs
from threestage.models.export import EXPORTED_IMAGES, ModelCard, export_program, load_model, save_model
from threestage.models.network import Network, build_network
from threestage.models.program import least_side, without_program, write_program
from threestage.models.settings import NetworkSettings
from threestage.models.traceable import same_padding
from threestage.prediction.image_model import Model
from threestage.run import run as runs


def write_model(folder: Path, encoder: str = "test_resnet", stride: int = 32) -> Path:
    settings = NetworkSettings(encoder=encoder, head="linear", output_stride=stride, batch_norm="live")
    colours = ((0, 0, 0), (200, 0, 0), (0, 200, 0))
    card = ModelCard(network=settings, classes=("a", "b", "c"), colours=colours, downscale=1, stage="stage3")
    save_model(str(folder), build_network(settings, 3, seed=1), card)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with its program."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    (folder / "program.pt2").write_bytes(export_program(str(folder)))
    return folder


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_the_padding_is_timms(kernel: int, stride: int, dilation: int) -> None:
    from timm.layers.padding import get_same_padding

    for side in range(1, 70):
        assert same_padding(side, kernel, stride, dilation) == get_same_padding(side, kernel, stride, dilation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "stride", "least"),
    [
        ("convnext_atto", 16, 33),
        ("inception_next_atto", 16, 33),
        ("tf_mobilenetv3_small_minimal_100", 16, 33),
        ("vit_small_patch16_dinov3", 16, 33),
        ("pvt_v2_b0", 32, 65),
    ],
)
def test_encoders_that_could_not_be_exported(tmp_path: Path, encoder: str, stride: int, least: int) -> None:
    """The padding, the rotary positions and the least sides are ours; the logits are the network's."""
    folder = write_model(tmp_path, encoder, stride)
    (tmp_path / "program.pt2").write_bytes(export_program(str(folder)))
    assert least_side(tmp_path / "program.pt2") == least
    found, network = (
        packed_model()._load_program(tmp_path / "program.pt2", torch.device("cpu"))[0],
        load_model(str(folder))[0],
    )
    for size in ((least, 130), (71, 90), (200, 65)):
        image = torch.rand(1, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(found(image), network(image)[0], rtol=1e-4, atol=1e-4)


def test_an_export_has_a_deadline_and_its_end_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path)
    assert write_program(folder, 0.01) == "torch.export did not end within 0 s"

    def ended(code: int, line: str) -> Callable[..., Any]:
        def run(*arguments: Any, stdout: Any, **more: Any) -> Any:
            stdout.write(line.encode())
            return subprocess.CompletedProcess([], code)

        return run

    for code, line, reason in (
        (1, "noise\nUserError: no such op\n", "UserError: no such op"),
        (-9, "", "the exporting process was killed by signal 9; is there enough memory?"),
        (3, "", "the exporting process ended with exit code 3"),
    ):
        monkeypatch.setattr(subprocess, "run", ended(code, line))
        assert write_program(folder) == reason
    assert not (folder / "program.pt2").exists()
    network = NetworkSettings(encoder="test_resnet", batch_norm="live")
    assert "test_resnet are registered without program.pt2" in (without_program(network) or "")


def test_the_process_exports_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def program_of(network: Network) -> bytes:
        tried.append(network.num_classes)
        return b"program"

    monkeypatch.setattr(programs, "program_of", program_of)
    folder = write_model(tmp_path)
    assert programs.main(folder) == 0 and (folder / "program.pt2").read_bytes() == b"program"
    (folder / "model.safetensors").unlink()
    assert programs.main(folder) == 0 and tried == [3, 3]


def test_what_will_be_missing_is_said_when_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(runs, "without_program", lambda network: f"models of {network.encoder} are registered without")
    config = load("demo", ["data.root=data"])
    runs._warn_without_program(config, said.append)
    assert said == [f"models of {config.network.encoder} are registered without"]


def test_a_program_of_ours_is_loaded_and_says_its_least_side(exported: Path) -> None:
    program, least = packed_model()._load_program(exported / "program.pt2", torch.device("cpu"))
    assert (least, least_side(exported / "program.pt2"), EXPORTED_IMAGES) == (33, 33, (1, 4096))
    network = load_model(str(exported))[0]
    image = torch.rand(2, 3, 50, 70)
    torch.testing.assert_close(program(image), network(image)[0], rtol=1e-4, atol=1e-4)


CODE = "Add.flatten.__globals__['__builtins__']['__import__']('os').mkdir({!r}) or "


@pytest.mark.parametrize("kind", ["size", "guard", "operator", "argument", "node", "second file", "pickle", "depth"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_changed_program_is_not_loaded(exported: Path, tmp_path: Path, kind: str) -> None:
    """Of a real program: each would run when torch loads it, or when it is called."""
    path, ran = tmp_path / "program.pt2", tmp_path / "ran"
    with zipfile.ZipFile(exported / "program.pt2") as given, zipfile.ZipFile(path, "w") as changed:
        for entry in given.infolist():
            content = given.read(entry)
            if entry.filename.endswith("/models/model.json"):
                if kind == "second file":
                    changed.writestr(entry.filename, content)
                content = change(content, "size" if kind == "second file" else kind, CODE.format(str(ran)))
            changed.writestr(entry.filename, content)
        if kind == "pickle":
            changed.writestr("archive/data/constants/custom_obj_0", b"")
    with pytest.raises(ValueError, match=r"program\.pt2 holds "):
        packed_model()._load_program(path, torch.device("cpu"))
    assert not ran.exists()


def change(content: bytes, kind: str, code: str) -> bytes:
    model = json.loads(content)
    if kind == "guard":
        model["guards_code"] = ["print(1)"]
    elif kind == "operator":
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"
    elif kind == "argument":  # names become a function's text
        return content.replace(b'"image"', json.dumps(f"image={code}").encode())
    elif kind == "node":
        model["graph_module"]["graph"]["nodes"][0]["name"] = "torch.load"
    elif kind == "depth":
        return b"[" * 200_000
    elif kind == "size":
        return content.replace(b'"expr_str": "', b'"expr_str": "' + code.encode(), 1)
    return json.dumps(model).encode()


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("Add(FloorDiv(Add(Symbol('s6', positive=True, integer=True), Integer(-1)), Integer(16)), Integer(1))", True),
        ("Max(Integer(0), Mul(Float('0.5', precision=53), Symbol('u0')))", True),
        ("Add(__import__('os'), Integer(1))", False),
        ("Integer(1).__class__", False),
        ("Add('__import__(1)')", False),
        ("[x for x in ()]", False),
        ("Mul(Integer(2), Pow(Symbol('s6', integer=True), Integer(-1)))", True),
        ("Pow(Integer(10), Integer(9999999999))", False),
        ("Pow(Integer(10), exp=Integer(9))", False),
        ("PowByNatural(" * 5 + "Integer(9)" + ", Integer(9))" * 5, False),
        ("Rational('1e1000000000')", False),
        ("lambda: 0", False),
        ("(" * 3000, False),
    ],
)
def test_the_grammar_of_expressions(text: str, taken: bool) -> None:
    assert packed_model()._is_expression(text) is taken


def test_pixels_are_whole_numbers_of_a_byte() -> None:
    as_bytes = packed_model()._as_bytes
    image = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)
    np.testing.assert_array_equal(as_bytes(image.tolist()), image.astype(np.uint8))
    assert as_bytes(image.astype(np.uint8)).dtype == np.uint8
    for wrong, line in (
        (image / 255, "floats in \\[0,1\\] are to be multiplied by 255"),
        (image + 200, "pixels from 200 to 319"),
        (image[0], "shape"),
        (np.zeros((1, 4, 4, 1), np.uint8), "shape"),
    ):
        with pytest.raises(ValueError, match=line):
            as_bytes(wrong)


@pytest.mark.slow
def test_a_packed_model_of_four_bands_takes_the_numbers_of_the_files(tmp_path: Path) -> None:
    bands = Bands(count=4, low=(0, 10, 100, 5), high=(4000, 9000, 800, 6000), used=(4, 1))
    settings = NetworkSettings(encoder="test_resnet", head="linear", output_stride=32, batch_norm="live", channels=2)
    colours = ((0, 0, 0), (200, 0, 0))
    card = ModelCard(network=settings, classes=("a", "b"), colours=colours, downscale=1, stage="stage3", bands=bands)
    save_model(str(tmp_path), build_network(settings, 2, seed=1), card)
    (tmp_path / "program.pt2").write_bytes(export_program(str(tmp_path)))
    packed = packed_model().PackedModel()
    packed.load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}, model_config=None))
    images = np.random.default_rng(0).integers(0, 9000, (2, 70, 50, 4), dtype=np.uint16)
    found, model = packed.predict(None, images), Model(*load_model(str(tmp_path)))
    expected = np.stack([model.predict(image).class_ids for image in images])
    assert (found == expected).mean() > 0.999
