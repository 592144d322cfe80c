"""A network as an ONNX model: written, checked with onnxruntime against the network, and run.

Its input `image` is in [0,1], float32 (N,C,H,W), three channels of RGB unless the metadata have `bands`: any N and, from a
least side on, any H and W; the normalisation is inside. Its output is `logits`, float32 (N,C,H,W), or `class_ids`, uint8
(N,H,W). Its metadata names the classes and what a user must know (see `_metadata`). Needs the extra `onnx`.
"""

import importlib.util
import json
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import threestage
from threestage.errors import InputError
from threestage.models.export import ModelCard, refuse_other_logits, trace
from threestage.models.network import Network

if TYPE_CHECKING:
    import onnx

ONNX = "model.onnx"
OPSET = 20
TOLERANCE = 1e-4
INPUT, LOGITS, CLASS_IDS = "image", "logits", "class_ids"
AXES = {INPUT: ("images", None, "height", "width"), LOGITS: ("images", None, "height", "width")}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing_packages() -> str | None:
    """What to install where the extra is missing, else None."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed; pip install 'threestage[onnx]'" if missing else None


def refuse_missing_packages() -> None:
    if missing := missing_packages():
        raise InputError(f"ONNX: {missing}", "models/missing-package")


def onnx_of(network: Network, card: ModelCard) -> bytes:
    """A network in eval mode as an ONNX model that gives logits.

    Raises whatever torch.export and torch.onnx raise, and ValueError where onnxruntime's logits are not the network's.
    """
    traced = trace(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            traced.program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[LOGITS],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    _tidy(model)
    for key, value in _metadata(card, traced.least_side).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    session = OnnxNetwork(content)
    refuse_other_logits(lambda image: session(image)[0], network, traced.least_side, TOLERANCE)
    return content


def _metadata(card: ModelCard, least_side: int) -> dict[str, str]:
    """`downscale`: how many times an image is reduced, by the mean of each block, before the model sees it; `least_side`: the
    shortest side, in pixels, that it takes; `inference`: the windows in which images are to be given to it; `bands`, where they
    are not 8-bit RGB: which bands of an image it takes, and the numbers of each that are 0 and 1."""
    bands = {} if card.bands is None else {"bands": card.bands.model_dump_json()}
    return {
        "classes": json.dumps(card.classes),
        "colours": json.dumps(card.colours),
        "downscale": str(card.downscale),
        "least_side": str(least_side),
        "encoder": card.network.encoder,
        "stage": card.stage,
        "inference": card.inference.model_dump_json(),
        "threestage": threestage.__version__,
        **bands,
    }


def shortest_side(content: bytes) -> int:
    """The shortest side, in pixels, that a model of `onnx_of` takes."""
    import onnx

    properties = {each.key: each.value for each in onnx.load_from_string(content).metadata_props}
    return int(properties["least_side"])


def _tidy(model: "onnx.ModelProto") -> None:
    """Name the axes, and leave out what torch writes of the code and the paths that the model was traced from."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]  # sizes of inner values, by the names that the axes had
    for value in (*graph.input, *graph.output):
        for place, name in zip(value.type.tensor_type.shape.dim, AXES[value.name], strict=True):
            if name is not None:
                place.dim_param = name


def with_class_ids(content: bytes) -> bytes:
    """A model of `onnx_of` that gives the class with the largest logit in place of the logits."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_from_string(content)
    graph = model.graph
    graph.node.append(helper.make_node("ArgMax", [LOGITS], ["class_numbers"], axis=1, keepdims=0))
    graph.node.append(helper.make_node("Cast", ["class_numbers"], [CLASS_IDS], to=TensorProto.UINT8))
    del graph.output[:]
    axes = [name for name in AXES[LOGITS] if name is not None]
    graph.output.append(helper.make_tensor_value_info(CLASS_IDS, TensorProto.UINT8, axes))
    onnx.checker.check_model(model)
    return model.SerializeToString()


class OnnxNetwork(nn.Module):
    """An ONNX model in onnxruntime, on the CPU, that is called as a network is: image (N,C,H,W) → its output and None.

    `seconds`, `pixels`: what it has run so far.
    """

    def __init__(self, content: bytes, threads: int = 0) -> None:
        """threads: 0 takes all cores."""
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors alone
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.seconds, self.pixels = 0.0, 0

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        values, start = image.cpu().numpy(), time.perf_counter()
        (found,) = self.session.run(None, {INPUT: values})
        self.seconds += time.perf_counter() - start
        self.pixels += values[:, 0].size
        return torch.from_numpy(found).to(image.device), None


# ---- Eight bits


def quantised(content: bytes, images: Iterable[np.ndarray]) -> bytes:
    """A model of `onnx_of` in eight-bit integers, by onnxruntime's static quantisation: unsigned activations, and signed weights
    with a scale per output channel.

    The weights use seven bits (reduce_range): with eight, CPUs without VNNI add them up with saturation, which is wrong.
    images: uint8 (H,W,C) at the model's size, whose activations decide the ranges.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, values: Iterator[np.ndarray]) -> None:
            self.values = values

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.values, None)
            return None if image is None else {INPUT: image.transpose(2, 0, 1)[None].astype(np.float32) / 255}

    model = onnx.load_from_string(content)
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # torch.onnx did its work
    with TemporaryDirectory() as folder:
        target = Path(folder, ONNX)
        quantize_static(
            model,
            target,
            Reader(iter(images)),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return target.read_bytes()
