"""Why: an exported file is for runtimes that know neither torch nor this package; OpenVINO stands for them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fresh.processes import command_of
from tests.unit.models.test_program import write_model
from threestage.models.export import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SIZES = ((64, 64), (97, 203), (33, 120))
ELSEWHERE = """
import importlib.util, sys
import numpy as np, openvino
assert importlib.util.find_spec("threestage") is None and importlib.util.find_spec("torch") is None
model = openvino.Core().compile_model(sys.argv[1], "CPU")
images = np.load(sys.argv[2])
np.savez(sys.argv[3], **{name: model(images[name])[0] for name in images.files})
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment with OpenVINO alone."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "-q", "openvino"]
    if subprocess.run(command).returncode:
        pytest.skip("OpenVINO cannot be installed here")
    return python


@pytest.mark.parametrize("more", [(), ("--class-ids",)])
def test_openvino_reads_what_the_command_wrote(elsewhere: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    folder, file = write_model(tmp_path / "model"), tmp_path / "model.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "threestage", "models", "export", str(folder), str(file), *more, "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and '"opset": 20' in done.stdout, done.stderr
    images = {f"{size}": np.random.default_rng(0).random((2, 3, *size), dtype=np.float32) for size in SIZES}
    np.savez(tmp_path / "images.npz", **images)  # type: ignore[arg-type,unused-ignore]
    command_of(elsewhere, "-c", ELSEWHERE, str(file), f"{tmp_path}/images.npz", f"{tmp_path}/found.npz", env={})
    network, found = load_model(str(folder))[0], np.load(tmp_path / "found.npz")
    for size, image in images.items():
        with torch.inference_mode():
            logits = network(torch.from_numpy(image))[0]
        if more:
            assert (found[size] == logits.argmax(dim=1).numpy()).mean() > 0.999
        else:
            np.testing.assert_allclose(found[size], logits.numpy(), rtol=0, atol=1e-3 * float(logits.abs().max()))
