"""The script that MLflow packs into a registered model ("models from code"): images in, class ids out.

It runs wherever the model is loaded, without threestage and without pickle; torch is imported once weights are needed.
"""

import ast
import base64
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

PIXELS_AT_ONCE, MOST_PIXELS = 2**22, 2**26
IMAGES_AT_ONCE, MOST_SIDE = 1024, 16384  # of the images that the program was exported for
LONGEST_EXPRESSION, MOST_POWERS = 10_000, 4
FUNCTIONS = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|ModularIndexing|Where"
    "|Identity|CeilToInt|FloorToInt|TruncToInt|TruncToFloat|RoundToInt|IntTrueDiv|FloatTrueDiv|ToFloat|PowByNatural"
    "|Equality|Unequality|GreaterThan|LessThan|StrictGreaterThan|StrictLessThan|And|Or|Not"
)
"""What symbolic expressions of a program may call."""
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims)\.(?!from_file\b)\w+\.\w+|torch\.sym_\w+|torch\._sym_sqrt"
    r"|_operator\.(add|sub|mul|neg|pos|floordiv|truediv|mod|pow|eq|ne|lt|le|gt|ge|getitem|and_|or_)|math\.trunc"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast)"
)
"""What the nodes of a program may call."""
NAME, PATH = re.compile(r"\w*", re.ASCII), re.compile(r"[\w.+]*", re.ASCII)
"""Names of nodes and arguments, and of weights: torch writes them into Python code that it runs."""
TREE = re.compile(r'(?:[\[\]{}:, 01]|null|"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))")*')
"""How a program may describe its arguments."""
ENTRY = re.compile(
    r"[\w-]+/(?:archive_format|archive_version|version|byteorder|\.data/(?:version|serialization_id)|models/model\.json"
    r"|data/(?:weights/(?:weight_\d+|model_weights_config\.json)|constants/(?:tensor_\d+|model_constants_config\.json)"
    r"|sample_inputs/model\.pt))"
)
"""The files of a program: among them no shared library and no pickled object."""


class PackedModel(PythonModel):  # type: ignore[misc,unused-ignore]
    """Predicts class ids with the exported program in the artifact folder "model"."""

    def load_context(self, context: Any) -> None:
        import torch

        folder = Path(context.artifacts["model"])
        _check_digests(folder, (context.model_config or {}).get("files"))
        if not (folder / "program.pt2").exists():
            raise ValueError(
                f"{folder} has no program.pt2: this network could not be exported (README.md says why); predict with "
                "`threestage predict`"
            )
        card = json.loads((folder / "model.json").read_text())
        self.downscale = card["downscale"]
        self.inference = card.get("inference") or {"window": None}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bands = card.get("bands")
        self.mean = torch.tensor(_mean(card["network"]), device=self.device).view(-1, 1, 1)
        self.network, self.least_side = _load_program(folder / "program.pt2", self.device)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
        """uint8 RGB images (N,H,W,3), or N PNG or JPEG files of one size in base64 → uint8 class ids (N,H,W).
        A model of other bands takes (N,H,W,B), the numbers that the image files hold.

        With params {"confidence": True}: a dict of "class_ids" and "confidence", float32 (N,H,W) in [0,1]. Images are
        looked at whole, or in the windows that the model was trained with, at a single scale.
        """
        files = _encoded(model_input)
        if self.bands is not None:
            images = _levels(model_input, self.bands)
        else:
            images = _as_bytes(model_input) if files is None else _decoded(files)
        wanted, shape = bool((params or {}).get("confidence")), images.shape[:3]
        if max(shape[1:]) > MOST_SIDE * self.downscale:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]}: the program takes sides up to {MOST_SIDE * self.downscale}"
            )
        class_ids = np.zeros(shape, np.uint8)
        confidence = np.zeros(shape if wanted else 0, np.float32)
        for rows in _pieces(shape):
            ids, sure = self._ask(np.ascontiguousarray(images[rows]))
            class_ids[rows] = _enlarged(ids, self.downscale, shape[1:])
            if wanted:
                confidence[rows] = _enlarged(sure, self.downscale, shape[1:])
        return {"class_ids": class_ids, "confidence": confidence} if wanted else class_ids

    def _ask(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class ids and confidences, at the size that the network looks at."""
        import torch

        pixels = torch.from_numpy(_reduced(images, self.downscale)).to(self.device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            logits = _in_windows(self._logits, pixels, self.inference)
            confidence, class_ids = logits.float().log_softmax(dim=1).max(dim=1)
        return class_ids.to(torch.uint8).cpu().numpy(), confidence.exp().cpu().numpy()

    def _logits(self, pixels: Any) -> Any:
        """Of images (N,C,H,W), or of a window of them; a side below the program's least is padded with the mean colour."""
        from torch.nn import functional

        height, width = pixels.shape[-2:]
        missing = (0, max(0, self.least_side - width), 0, max(0, self.least_side - height))
        if any(missing):
            pixels = functional.pad(pixels - self.mean, missing) + self.mean
        return self.network(pixels)[..., :height, :width]


def _in_windows(ask: Callable[[Any], Any], pixels: Any, inference: Mapping[str, Any]) -> Any:
    """Logits (N,C,H,W) as the model's card says that images are given to it: whole, or the mean of windows."""
    import torch

    size, window = pixels.shape[-2:], inference["window"]
    if window is None or all(side <= most for side, most in zip(size, window, strict=True)):
        return ask(pixels)
    stride = inference["stride"] or [-(-2 * side // 3) for side in window]
    tops, lefts = (
        [0] if side <= most else [*range(0, side - most, step), side - most]
        for side, most, step in zip(size, window, stride, strict=True)
    )
    total: Any = None
    count = torch.zeros(size, device=pixels.device)
    for top in tops:
        for left in lefts:
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = ask(pixels[place]).float()
            weight = torch.ones(logits.shape[-2:], device=pixels.device)
            if inference["overlap"] == "hann":
                rows, columns = (torch.sin(torch.pi * (torch.arange(n) + 0.5) / n) ** 2 for n in logits.shape[-2:])
                weight = (rows[:, None] * columns).to(pixels.device)
            total = logits.new_zeros((*logits.shape[:2], *size)) if total is None else total
            total[place] += logits * weight
            count[place] += weight
    return total / count


def _encoded(model_input: Any) -> list[str | bytes] | None:
    """The images in base64, if they are: a list, a column "image" or "b64", or {"b64": …} for each; else None."""
    if isinstance(model_input, str | bytes):
        return [model_input]
    if hasattr(model_input, "columns"):  # a DataFrame
        model_input = {name: list(model_input[name]) for name in model_input.columns}
    if isinstance(model_input, dict) and len(model_input) == 1 and next(iter(model_input)) in ("b64", "image"):
        model_input = next(iter(model_input.values()))
    items: list[Any] = np.ravel(np.asarray(model_input, object)).tolist() if np.ndim(model_input) <= 2 else []
    texts = [item.get("b64") if isinstance(item, dict) else item for item in items]
    files = [text for text in texts if isinstance(text, str | bytes)]
    return files if files and len(files) == len(texts) else None


def _decoded(files: list[str | bytes]) -> np.ndarray:
    """PNG or JPEG files in base64 as uint8 (N,H,W,3). ValueError for what cannot be read exactly, and for several sizes."""
    images = []
    for number, text in enumerate(files):
        try:
            images.append(_pixels(base64.b64decode(text, validate=True)))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"image {number}: not a PNG or JPEG in base64 that can be read ({error})") from None
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ValueError(f"images of {len(sizes)} sizes (height, width): {sizes[:3]}; send each size by itself")
    return np.stack(images)


def _pixels(data: bytes) -> np.ndarray:
    """RGB (H,W,3), turned as EXIF says."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS}")
        bits = data[24] if image.format == "PNG" else 8
        if image.mode not in ("RGB", "L", "P") or "transparency" in image.info or bits > 8:
            raise ValueError(f"mode {image.mode} of {bits} bits; give RGB or grey of 8 bits without transparency")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _mean(network: Mapping[str, Any]) -> list[float]:
    """Of each channel, as threestage gives it to the network."""
    mean, channels = network["mean"], network.get("channels", 3)
    return [sum(mean) / 3] if channels == 1 else [mean[channel % 3] for channel in range(channels)]


def _levels(images: Any, bands: Mapping[str, Any]) -> np.ndarray:
    """Numbers of image files (N,H,W,B) as uint8 (N,H,W,C), as threestage reads them."""
    values = np.asarray(images)
    if values.ndim != 4 or values.shape[3] != bands["count"] or values.dtype.kind not in "uif":
        raise ValueError(
            f"images of shape {values.shape} and type {values.dtype}: give (N,H,W,{bands['count']}), numbers as the image files "
            "hold them"
        )
    used = bands["used"] or range(1, bands["count"] + 1)
    low, high = (np.array([bands[end][number - 1] for number in used]) for end in ("low", "high"))
    found = np.empty((*values.shape[:3], len(low)), np.uint8)
    for row, image in enumerate(values):
        wide = image[:, :, [number - 1 for number in used]].astype(np.float64)
        wide = (wide - low) * (255 / np.where(high == low, 1, high - low))
        found[row] = np.rint(np.clip(np.nan_to_num(wide, nan=0, posinf=255, neginf=0), 0, 255))
    return found


def _as_bytes(images: Any) -> np.ndarray:
    """The images as uint8 (N,H,W,3). Whole numbers outside 0..255, and floats, whose range nobody knows, are refused."""
    values = np.asarray(images)
    if values.ndim != 4 or values.shape[3] != 3:
        raise ValueError(f"images of shape {values.shape}: give (N,H,W,3), RGB images of one size")
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"images of {values.dtype}: give whole numbers from 0 to 255 (uint8); floats in [0,1] are to be multiplied by 255 "
            "and rounded"
        )
    if values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"pixels from {values.min()} to {values.max()}: give whole numbers from 0 to 255 (uint8)")
    return values.astype(np.uint8)


def _check_digests(folder: Path, expected: Mapping[str, str] | None) -> None:
    """ValueError where a file is not the one that was registered; a version of before has no digests."""
    for name, digest in (expected or {}).items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{file} is missing or is not what was registered")


def _load_program(path: Path, device: Any) -> tuple[Any, int]:
    """The program as a module on the device, and the shortest side that it takes. A file that could run code is refused."""
    import torch
    from torch.export.passes import move_to_device_pass

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        program = torch.export.load(_checked(path))
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    least_side = max(int(found.lower) for found in program.range_constraints.values())
    return move_to_device_pass(program, device).module(), least_side


def _checked(path: Path) -> io.BytesIO:
    """The program's archive, written anew from the entries that were looked at: torch reads zip files by rules of its own."""
    checked, names = io.BytesIO(), set[str]()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
        for entry in archive.infolist():
            name = entry.filename
            if not ENTRY.fullmatch(name) or entry.compress_type != zipfile.ZIP_STORED or name in names:
                raise ValueError(f"{path} holds {name!r}, which is no part of a program (it may be a pickled object)")
            names.add(name)
            content = archive.read(entry)
            if name.endswith(".json"):
                try:
                    tree = json.loads(content, object_hook=_without_notes)
                except RecursionError:
                    raise ValueError(f"{path} holds {name!r}, which nests too deeply for a program") from None
                for key, value in _strings(tree):
                    _refuse_code(path, key, value)
                content = json.dumps(tree).encode()
            copy.writestr(name, content)
    checked.seek(0)
    return checked


def _without_notes(found: dict[str, Any]) -> dict[str, Any]:
    """A JSON object without what the nodes tell of the code that they were traced from: any text, which nothing needs."""
    return found | {"metadata": {}} if "metadata" in found else found


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of nested JSON, with the key that it stands under; the keys themselves stand under ""."""
    waiting = [(key, tree)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, dict):
            waiting.extend(("", name) for name in value)
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, item) for item in value)


def _refuse_code(path: Path, key: str, text: str) -> None:
    """ValueError for a string that torch would evaluate, and that is not of the grammar of exported networks."""
    known = {"expr_str": _is_expression, "target": OPERATOR.fullmatch, "as_operator": OPERATOR.fullmatch}
    known |= {"in_spec": TREE.fullmatch, "out_spec": TREE.fullmatch, "guards_code": lambda text: None}
    known |= {key: NAME.fullmatch for key in ("name", "as_name", "forward_arg_names")}
    known |= {key: lambda text: True for key in ("as_string", "as_strings")}  # shown as Python shows them
    if not known.get(key, PATH.fullmatch)(text):  # type: ignore[operator]
        raise ValueError(f"{path} holds the {key} {text[:100]!r}, which no exported network has: it is not loaded")


def _is_expression(text: str) -> bool:
    """Whether it is calls of FUNCTIONS on numbers and symbols such as Symbol('s6', integer=True), and nothing else.

    Its powers are few and small: torch works them out.
    """
    if len(text) > LONGEST_EXPRESSION or text.count("Pow") > MOST_POWERS:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(_is_plain, nodes))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        text = node.value if isinstance(node.value, str) else repr(node.value)
        return re.fullmatch(r"[a-z]{1,3}\d{1,9}|-?[\d.]{1,40}(e[+-]?\d{1,3})?|True|False", text) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and ("Pow" not in node.func.id or _is_small_power(node))
    if isinstance(node, ast.Name):
        return bool(FUNCTIONS.fullmatch(node.id) or re.fullmatch(r"[su]\d{1,9}|true|false", node.id))
    return isinstance(node, ast.Expression | ast.keyword | ast.Load | ast.UnaryOp | ast.USub)


def _is_small_power(call: ast.Call) -> bool:
    """Whether a call of Pow has an exponent of one digit."""
    return len(call.args) == 2 and re.fullmatch(r"(Integer\()?-?\d\)?", ast.unparse(call.args[1])) is not None


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Of (N,H,W): as many images at a time as the memory of a small device holds."""
    number, height, width = shape
    at_once = min(IMAGES_AT_ONCE, max(1, PIXELS_AT_ONCE // max(1, height * width)))
    for start in range(0, number if height and width else 0, at_once):
        yield slice(start, start + at_once)


def _reduced(images: np.ndarray, factor: int) -> np.ndarray:
    """(N,H,W,C) → (N,H//f,W//f,C): the mean of each block, rounded half up, as in training; a side below f stays."""
    if factor == 1 or min(images.shape[1:3]) < factor:
        return images
    number, height, width = len(images), images.shape[1] // factor, images.shape[2] // factor
    blocks = images[:, : height * factor, : width * factor].reshape(number, height, factor, width, factor, -1)
    total = blocks.sum(axis=(2, 4), dtype=np.uint32)
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def _enlarged(values: np.ndarray, factor: int, size: tuple[int, ...]) -> np.ndarray:
    """(N,h,w) at the size (H,W): each value is its block's, the last ones also the ragged rest's."""
    if values.shape[1:] == size:
        return values
    rows, columns = (
        np.minimum(np.arange(wanted) // factor, there - 1) for wanted, there in zip(size, values.shape[1:], strict=True)
    )
    return values[:, rows][:, :, columns]


set_model(PackedModel())
