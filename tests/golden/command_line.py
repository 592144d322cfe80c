"""Commands in this process, and the digests of what they write. Tests that use commands and files alone survive every move and
rename inside the package."""

import contextlib
import hashlib
import io
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from threestage.cli.app import main

CPU = ("model name", "cpu family", "model", "stepping", "cache size")
VERSIONS = ("torch", "timm", "numpy", "pillow", "simplejpeg")


def run_command(*words: object, code: int = 0) -> str:
    """Standard output of `threestage WORDS`. AssertionError with all that it printed where its exit code is not `code`."""
    out, problems = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["threestage", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(problems),
    ):
        try:
            main()
        except SystemExit as ended:
            assert int(ended.code or 0) == code, f"{out.getvalue()}\n{problems.getvalue()}"
        else:
            raise AssertionError("main() returned without an exit code")
    return out.getvalue()


def this_machine() -> dict[str, str]:
    """What decides which floating-point kernels run: two machines that agree here compute the same bits."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    return {
        **{name: version(name) for name in VERSIONS},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "cpu": " ".join(first.get(name, "") for name in CPU).strip() or platform.processor(),
    }


def weights_digest(model: Path) -> str:
    """sha256 over the names of a model's tensors, in order, and their values as float32."""
    tensors, digest = load_file(model / "model.safetensors"), hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def decoded_masks(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Class ids and confidences (H,W) uint8 of a set of pseudo-masks, by image id."""
    found = {}
    for file in sorted(folder.glob("*.parquet")):
        if file.stem in ("index", "rejects"):
            continue
        for row in pq.read_table(file).to_pylist():
            if row["pseudo_mask"] is not None:
                mask = np.asarray(Image.open(io.BytesIO(row["pseudo_mask"])))
                confidence = np.frombuffer(row["confidence"], np.uint8).reshape(mask.shape)
                found[row["image_id"]] = (mask, confidence)
    return found


def masks_digest(folder: Path) -> str:
    """sha256 over the decoded pseudo-masks and confidences of a set, in order of the image ids."""
    digest, masks = hashlib.sha256(), decoded_masks(folder)
    for image_id in sorted(masks):
        digest.update(image_id.encode() + b"".join(array.tobytes() for array in masks[image_id]))
    return digest.hexdigest()


def settings(changes: dict[str, Any]) -> Sequence[str]:
    """The words of `--set` for values by dotted key."""
    return [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
