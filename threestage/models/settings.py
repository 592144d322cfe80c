"""The settings of a network."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, PositiveInt, model_validator

from threestage.data.bands import MAX_BANDS, RGB
from threestage.errors import InputError
from threestage.settings import Settings

Size = tuple[PositiveInt, PositiveInt]
Deviation = Annotated[float, Field(ge=1e-3, allow_inf_nan=False)]
WEIGHTS_KEYS = {"path", "mean", "std"}


class NetworkSettings(Settings):
    """The network and its initial weights. For a ViT take `head=linear` or `dpt`, and `align_corners=false`."""

    encoder: str = "resnet101"
    """Timm name of the encoder."""
    weights: str | None = None
    """Path or URI of a .safetensors or .pth file with the encoder's weights, or {path, mean, std}; null: see `pretrained`."""
    pretrained: bool = False
    """Download timm's weights; without this and `weights` the encoder starts from random numbers."""
    output_stride: Literal[8, 16, 32] = 8
    """Pixels per cell of a convolutional encoder's last map; a ViT's is its patch size."""
    head: Literal["deeplabv2", "deeplabv3plus", "linear", "dpt", "fpn"] = "deeplabv2"
    """Decoder: the paper's (deeplabv2), a newer one, one 1×1 convolution (for a ViT), DPT on four maps of a ViT, or FPN on four
    maps of any other encoder."""
    dilations: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=64)] = (
        6,
        12,
        18,
        24,
    )
    """Dilations of deeplabv2's classifiers; the authors' code runs only (6, 12)."""
    head_width: Annotated[int, Field(ge=1, le=8192)] = 256
    """Channels inside deeplabv3plus and fpn; a tiny encoder needs fewer."""
    batch_norm: Literal["frozen", "live"] = "frozen"
    """Batch norm of the encoder and the branch; frozen fixes statistics, scale and shift. From scratch take live."""
    freeze_encoder: bool = False
    """Train the heads only. The branch's copy of the encoder's last stage is frozen too."""
    gradient_checkpointing: bool = False
    """Recompute a ViT's blocks in the backward pass: less memory, more time."""
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (0.485, 0.456, 0.406)
    """Mean of RGB in [0,1] that the encoder's weights expect."""
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    """Standard deviation of RGB in [0,1] that the encoder's weights expect."""
    channels: Annotated[int, Field(ge=1, le=MAX_BANDS)] = RGB
    """Bands that the network sees. A run sets it from the data set and `data.bands`: set nothing here."""
    align_corners: bool = True
    """Align corners in the bilinear upsampling of the logits."""

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, given: Any) -> Any:
        """Weights from a file replace the hub's, and may bring their normalisation: `weights: {path, mean, std}`."""
        if not isinstance(given, Mapping) or given.get("weights") is None:
            return given
        weights = given["weights"]
        if isinstance(weights, Mapping):
            if "path" not in weights or not weights.keys() <= WEIGHTS_KEYS:
                raise InputError(
                    f"weights={dict(weights)}: write a path, or {{path: FILE, mean: [R, G, B], std: [R, G, B]}}",
                    "config/invalid-value",
                )
            given = {**given, **weights, "weights": weights["path"]}
            del given["path"]
        return {**given, "pretrained": False}

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of each channel. RGB's own; of one channel their averages; of others RGB's over and over, as timm repeats
        the weights of the first convolution."""
        mean, std = self.mean, self.std
        if self.channels == 1:
            return (sum(mean) / RGB,), (sum(std) / RGB,)
        places = [channel % RGB for channel in range(self.channels)]
        return tuple(mean[place] for place in places), tuple(std[place] for place in places)

    @property
    def has_live_batch_norm(self) -> bool:
        """Whether a training step depends on its batch's statistics: deeplabv3plus has batch norm of its own."""
        return self.batch_norm == "live" or self.head == "deeplabv3plus"


class InferenceSettings(Settings):
    """Whole images or windows, wherever a run predicts: in evaluation, for pseudo-masks, and when its models are used."""

    window: Size | None = Field(
        None, description="height and width of a window in pixels, after `data.downscale`; null: the whole image"
    )
    stride: Size | None = Field(None, description="pixels between windows; null: two thirds of the window")
    overlap: Literal["mean", "hann"] = Field(
        "mean", description="average of the logits where windows overlap: plain, or with Hann weights (no seams)"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.stride is not None and self.window is None:
            raise InputError(f"stride={sides(self.stride)} is of windows; give a window too", "predict/stride")
        if self.overlap != "mean" and self.window is None:
            raise InputError(f"overlap={self.overlap} is of windows; give a window too", "predict/stride")
        if self.window is not None and any(s > w for s, w in zip(self.step, self.window, strict=True)):
            raise InputError(
                f"stride={sides(self.step)} leaves gaps between windows of {sides(self.window)}; make it smaller",
                "predict/stride",
            )
        return self

    @property
    def step(self) -> tuple[int, int]:
        """The stride of the windows; (0,0) without any."""
        height, width = self.window or (0, 0)
        return self.stride or (-(-2 * height // 3), -(-2 * width // 3))


def sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
