"""Exporting a model in a process of its own, with a deadline: torch.export fails for some networks and never ends for others.

python -m threestage.models.program FOLDER [NAME]     # writes FOLDER/program.pt2, or model.onnx
                                                      # from FOLDER/model.json and, where it is there, its weights
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from threestage.data.bands import MOST, RGB, Bands
from threestage.errors import reason_of
from threestage.models.export import CARD, PROGRAM, WEIGHTS, ModelCard, load_card, load_model, program_of
from threestage.models.network import build_network, check_settings
from threestage.models.onnx_model import ONNX, onnx_of
from threestage.models.settings import NetworkSettings

EXPORT_S = 300.0
LONGEST_REASON = 300


def write_program(folder: Path, seconds: float = EXPORT_S, name: str = PROGRAM) -> str | None:
    """Write `program.pt2`, or `model.onnx`, into a local folder with `model.json` and `model.safetensors`, or random weights.

    Returns None, or why there is no such file.
    """
    command = [sys.executable, "-m", __name__, str(folder), name]
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=seconds,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        except subprocess.TimeoutExpired:
            return unfinished(seconds)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if done.returncode == 0 and (folder / name).is_file():
        return None
    (folder / name).unlink(missing_ok=True)
    if done.returncode < 0:
        return f"the exporting process was killed by signal {-done.returncode}; is there enough memory?"
    return lines[-1][:LONGEST_REASON] if lines else f"the exporting process ended with exit code {done.returncode}"


def unfinished(seconds: float) -> str:
    """Why there is no file where the time was over."""
    return f"torch.export did not end within {seconds:.0f} s"


def without_program(network: NetworkSettings, seconds: float = EXPORT_S) -> str | None:
    """A warning where models with these settings will be registered without their program, tried with random weights; else None.

    InputError where no network can be made of the settings.
    """
    reason = _why_not(network, seconds, PROGRAM)
    if reason is None:
        return None
    return f"models of {network.encoder} are registered without program.pt2, which mlflow.pyfunc needs: {reason}"


def without_onnx(network: NetworkSettings, seconds: float = EXPORT_S) -> str | None:
    """As `without_program`, of the export to ONNX."""
    reason = _why_not(network, seconds, ONNX)
    return None if reason is None else f"models of {network.encoder} cannot be exported to ONNX: {reason}"


def _why_not(network: NetworkSettings, seconds: float, name: str) -> str | None:
    check_settings(network)
    settings, colours = network.model_copy(update={"weights": None, "pretrained": False}), ((0, 0, 0), (255, 255, 255))
    count = settings.channels
    bands = None if count == RGB else Bands(count=count, low=(0,) * count, high=(MOST,) * count)
    card = ModelCard(network=settings, classes=("a", "b"), colours=colours, downscale=1, stage="stage1", bands=bands)
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, CARD).write_text(card.model_dump_json())
        return write_program(Path(temporary), seconds, name)


def least_side(program: Path) -> int:
    """The shortest side, in pixels, that a program takes."""
    with zipfile.ZipFile(program) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/models/model.json"))
        ranges = json.loads(archive.read(name))["range_constraints"]
    return max(int(found["min_val"]) for found in ranges.values())


def main(folder: Path, name: str = PROGRAM) -> int:
    try:
        card = load_card(str(folder))
        if (folder / WEIGHTS).exists():
            network, _ = load_model(str(folder))
        else:
            network = build_network(card.network, len(card.classes)).eval()
        (folder / name).write_bytes(onnx_of(network, card) if name == ONNX else program_of(network))
    except Exception as error:  # whatever torch.export ends with, as the line that write_program returns
        print(reason_of(error).partition("\n")[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
