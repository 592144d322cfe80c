"""Why: a wrong encoder, crop or weights file must cost one line before training starts, and the right one must load."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tests.narrow_encoders  # noqa: F401  makes them known to timm
from tests.refusals import refused
from threestage.config import validated
from threestage.models.encoders import create_timm
from threestage.models.heads import DeepLabV3PlusHead
from threestage.models.network import build_network, check_settings, crop_fits, doubtful_normalisation, size_multiple
from threestage.models.settings import NetworkSettings
from threestage.ray_settings import ClusterSettings

WEIGHTS = Path(__file__).parents[3].parent / "shared" / "data" / "weights" / "mobilenetv2_100.imagenet.pth"


def settings(**values: Any) -> NetworkSettings:
    return NetworkSettings(**{"encoder": "test_resnet", "batch_norm": "live", **values})


def same_state(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def timm_state(encoder: str = "test_resnet") -> dict[str, Tensor]:
    return create_timm(encoder, 32).state_dict()


def save(path: Path, state: dict[str, Any]) -> str:
    torch.save(state, path)
    return str(path)


def test_a_checkpoint_with_classifier_loads_in_half_precision(tmp_path: Path) -> None:
    state = timm_state()
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    network = build_network(settings(weights=save(tmp_path / "a.pth", half)), 3, "branch")
    loaded = network.encoder.trunk.state_dict()["layers.conv1_0.weight"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, half["conv1.0.weight"].float())
    assert network.auxiliary_stage is not None
    assert torch.equal(
        network.auxiliary_stage.state_dict()["layer4_0.conv1.weight"], half["layer4.0.conv1.weight"].float()
    )


@pytest.mark.parametrize("encoder", ["test_vit", "mobilenetv3_small_050", "test_convnext"])
def test_safetensors_fit_every_family(tmp_path: Path, encoder: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.torch.save({name: value.contiguous() for name, value in timm_state(encoder).items()}))
    chosen = settings(encoder=encoder, weights=str(path), output_stride=16)
    check_settings(chosen)
    assert same_state(build_network(chosen, 3, seed=1).encoder, build_network(chosen, 3, seed=2).encoder)


def test_wrapped_state_dicts_are_opened(tmp_path: Path) -> None:
    wrapped = {"state_dict": {f"module.{name}": value for name, value in timm_state().items()}, "epoch": 3}
    check_settings(settings(weights=save(tmp_path / "a.pth", wrapped)))


def test_the_shared_mobilenet_weights_load() -> None:
    if not WEIGHTS.exists():
        pytest.skip("shared/data/weights is not here")
    chosen = settings(
        encoder="mobilenetv2_100", weights=str(WEIGHTS), batch_norm="frozen", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    check_settings(chosen)
    network = build_network(chosen, 3, seed=1)
    expected = torch.load(io.BytesIO(WEIGHTS.read_bytes()), weights_only=True)["conv_stem.weight"].float()
    assert torch.equal(network.encoder.trunk.state_dict()["layers.conv_stem.weight"], expected)
    assert same_state(network.encoder, build_network(chosen, 3, seed=2).encoder)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = timm_state()
    state["conv1.0.weight"] = torch.zeros(3, 3, 3, 3)
    state["stranger.weight"] = torch.zeros(1)
    del state["layer4.0.conv1.weight"]
    chosen = settings(weights=save(tmp_path / "a.pth", state))
    refusals: tuple[Callable[[NetworkSettings], object], ...] = (check_settings, lambda given: build_network(given, 3))
    for refuse in refusals:
        parts = ("1 missing (layer4.0.conv1.weight)", "conv1.0.weight is (3, 3, 3, 3), not", "1 unexpected (stranger")
        with refused("network/other-weights", *parts) as caught:
            refuse(chosen)
        assert "\n" not in str(caught.value)


def test_weights_of_another_encoder_are_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", timm_state("test_efficientnet"))
    with refused("network/other-weights", path, "network.encoder test_resnet", " missing (", ", …)", " unexpected ("):
        check_settings(settings(weights=path))


ODD: dict[str, Callable[[Tensor], dict[Any, Tensor]]] = {
    "meta": lambda plain: {"conv1.0.weight": plain.to("meta")},
    "quantised": lambda plain: {"conv1.0.weight": torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8)},
    "complex": lambda plain: {"conv1.0.weight": plain.to(torch.complex64)},
    "integer key": lambda plain: {7: plain},
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantised tensors
def test_tensors_that_cannot_be_copied_are_refused(tmp_path: Path, kind: str) -> None:
    state = timm_state()
    path = save(tmp_path / "a.pth", state | ODD[kind](state["conv1.0.weight"]))
    with refused("network/odd-weights", path):
        check_settings(settings(weights=path))


def test_weights_of_a_file_with_another_normalisation_are_doubtful_and_taken(tmp_path: Path) -> None:
    chosen = settings(encoder="resnet18", weights="somewhere.pth", mean=(0.5,) * 3)
    warning = doubtful_normalisation(chosen)
    assert warning is not None
    for part in ("network.mean=[0.5, 0.5, 0.5]", "take mean [0.485, 0.456, 0.406]", "somewhere.pth"):
        assert part in warning
    assert doubtful_normalisation(settings(encoder="resnet18", weights="somewhere.pth")) is None
    assert doubtful_normalisation(settings(encoder="resnet18", mean=(0.5,) * 3)) is None


class Unsafe:
    """What a pickle may hold and a weights file may not."""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("absent.pth", "network/unreadable-weights"),
        ("text.pth", "network/damaged-weights"),
        ("text.safetensors", "network/damaged-weights"),
        ("unsafe.pth", "network/damaged-weights"),
        ("list.pth", "network/damaged-weights"),
    ],
)
def test_unreadable_weights_are_refused(tmp_path: Path, name: str, code: str) -> None:
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("not weights at all, but long enough to look like a header")
    elif name != "absent.pth":
        torch.save({"x": Unsafe()} if name.startswith("unsafe") else [1], path)
    with refused(code, "network.weights:", name):
        check_settings(settings(weights=str(path)))


@pytest.mark.parametrize(
    ("values", "code", "named"),
    [
        ({"encoder": "mobilenet_v2_100"}, "unknown-encoder", ["'mobilenet_v2_100'", " mobilenetv2_100"]),
        ({"encoder": "resnet18.nonsense"}, "unknown-encoder", ["'resnet18.nonsense'", " resnet18"]),
        ({"encoder": "qqqqqq"}, "unknown-encoder", ["'qqqqqq'"]),
        ({"encoder": "vgg11_bn"}, "unsupported-encoder", ["vgg11_bn"]),
        ({"encoder": "vgg11_bn", "output_stride": 32}, "unsupported-encoder", ["vgg11_bn"]),
        ({"encoder": "pvt_v2_b0"}, "output-stride", ["pvt_v2_b0", "set network.output_stride to 32"]),
        (
            {"encoder": "narrow_hrnet", "output_stride": 32},
            "unsuited-head",
            ["narrow_hrnet", "network.head to fpn"],
        ),
        ({"encoder": "narrow_hrnet", "head": "fpn"}, "output-stride", ["set network.output_stride to 32"]),
        ({"encoder": "narrow_swin"}, "output-stride", ["set network.output_stride to 32"]),
        ({"encoder": "resnet18", "head": "fpn"}, "unsuited-head", ["'resnet18'", "set network.output_stride to 32"]),
        ({"encoder": "test_vit", "head": "fpn"}, "unsuited-head", ["'test_vit'", "network.head to dpt"]),
        ({"encoder": "hiera_tiny_224", "output_stride": 32}, "unsupported-encoder", ["224x224 pixels only", "swin"]),
        ({"encoder": "mixer_s32_224", "output_stride": 32}, "unsupported-encoder", ["mixer_s32_224"]),
        ({"encoder": "vit_relpos_small_patch16_224"}, "unsupported-encoder", ["vit_relpos_small_patch16_224"]),
        ({"batch_norm": "frozen"}, "frozen-without-weights", ["network.batch_norm", "live", "network.weights"]),
        ({"encoder": "resnet18.nonsense", "pretrained": True}, "unknown-encoder", [" resnet18"]),
        (
            {"encoder": "resnet18", "pretrained": True, "std": (1 / 255,) * 3},
            "normalisation",
            ["network.std=[0.00", "resnet18", "[0.485, "],
        ),
        (
            {"encoder": "resnet18", "pretrained": True, "mean": (0.5,) * 3},
            "normalisation",
            ["network.mean=[0.5, ", "resnet18", "[0.485, "],
        ),
        ({"encoder": "test_resnet", "head": "dpt"}, "no-transformer", ["network.head", "'test_resnet'"]),
        ({"encoder": "test_vit", "head": "deeplabv3plus"}, "no-map-at-stride-4", ["network.head", "'test_vit'"]),
    ],
)
def test_unsuited_settings_are_refused_by_name(values: dict[str, Any], code: str, named: list[str]) -> None:
    with refused(f"network/{code}", *named):
        check_settings(settings(**values))


def test_the_head_is_as_wide_as_it_is_set() -> None:
    network = build_network(settings(head="deeplabv3plus", head_width=24), 3, "branch")
    for head in (network.main_head, network.auxiliary_head):
        assert isinstance(head, DeepLabV3PlusHead)
        assert (head.classifier.in_channels, head.classifier.out_channels) == (24, 3)
    images = torch.rand(2, 3, 64, 64)
    assert [one.shape for one in network(images, with_auxiliary=True)] == [(2, 3, 64, 64)] * 2


def test_a_head_whose_package_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders.deeplabv3.decoder", None)
    with refused("network/missing-package", "network.head=deeplabv3plus", "segmentation-models-pytorch", "deeplabv2"):
        check_settings(settings(head="deeplabv3plus", encoder="mobilenetv2_100"))
    check_settings(settings())


def test_weights_of_the_four_stages_of_a_swin_fit(tmp_path: Path) -> None:
    state = timm_state("narrow_swin")
    weights = save(tmp_path / "swin.pth", state)
    network = build_network(settings(encoder="narrow_swin", output_stride=32, head="fpn", weights=weights), 3)
    own = {name.replace("_", "."): value for name, value in network.encoder.state_dict().items()}
    for name in ("layers.0.blocks.0.attn.qkv.weight", "layers.3.blocks.0.norm1.bias"):
        (mine,) = (value for key, value in own.items() if key.endswith(name.replace("_", ".")))
        assert torch.equal(mine, state[name])


def test_timms_weights_take_what_they_expect() -> None:
    check_settings(settings(encoder="resnet18", pretrained=True, mean=(0.48, 0.46, 0.41), std=(0.23, 0.22, 0.22)))
    check_settings(settings(encoder="test_resnet", pretrained=True, mean=(0.5,) * 3, std=(0.5,) * 3))


def test_an_unreachable_hub_asks_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with refused("network/no-pretrained-weights", "network.pretrained:", "give network.weights"):
        build_network(settings(pretrained=True), 3)


@pytest.mark.parametrize(
    ("encoder", "output_stride", "crop", "fits"),
    [
        ("resnet101", 8, (321, 321), True),
        ("resnet101", 8, (256, 512), True),
        ("resnet101", 8, (256, 513), True),
        ("resnet101", 8, (322, 321), False),
        ("resnet101", 16, (321, 328), False),
        ("vit_small_patch14_dinov2", 8, (322, 322), True),
        ("vit_small_patch14_dinov2", 8, (323, 322), False),
        ("test_vit", 8, (64, 48), True),
        ("resnet18", 8, (1, 8), False),
    ],
)
def test_crop_sizes(encoder: str, output_stride: int, crop: tuple[int, int], fits: bool) -> None:
    assert crop_fits(settings(encoder=encoder, output_stride=output_stride), crop) is fits


def test_size_multiple_of_a_vit_without_patch_in_its_name_comes_from_timm() -> None:
    assert size_multiple(settings(encoder="test_vit")) == 16


def test_batch_norm_of_deeplabv3plus_is_live_whatever_the_encoders_is() -> None:
    settings = {head: NetworkSettings(head=head) for head in ("deeplabv2", "deeplabv3plus")}
    assert {head: one.has_live_batch_norm for head, one in settings.items()} == {
        "deeplabv2": False,
        "deeplabv3plus": True,
    }
    assert NetworkSettings(batch_norm="live").has_live_batch_norm
    on_gpus, on_cpus = ClusterSettings(gpus_per_worker=1), ClusterSettings()
    assert (
        on_gpus.synchronises(live=True) and not on_gpus.synchronises(live=False) and not on_cpus.synchronises(live=True)
    )
    assert not ClusterSettings(gpus_per_worker=1, sync_batch_norm=False).synchronises(live=True)


def test_weights_bring_their_normalisation_and_replace_the_hubs() -> None:
    plain = NetworkSettings.model_validate({"weights": "a.pth", "pretrained": True})
    assert plain.weights == "a.pth" and not plain.pretrained
    halves = [0.5, 0.5, 0.5]
    given = NetworkSettings.model_validate({"weights": {"path": "a.pth", "mean": halves, "std": halves}})
    assert given == plain.model_copy(update={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    for wrong in ({"mean": halves}, {"path": "a.pth", "scale": 2}):
        with refused("config/invalid-value", "path: FILE"):
            validated(NetworkSettings, {"weights": wrong})
