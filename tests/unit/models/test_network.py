"""Why: every encoder family has to give g, ĝ and g̃ at any image size, train just what it should, and fail in words."""

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.narrow_encoders import NARROW
from threestage.models.encoders import create_timm, split_encoder, taps_of
from threestage.models.heads import DeepLabV2Head, DPTHead
from threestage.models.network import Auxiliary, Network, build_network, check_settings
from threestage.models.settings import NetworkSettings
from threestage.models.traceable import replace_pooling
from threestage.training.ema import make_teacher, update_teacher

TINY = "test_resnet"


def settings(**values: Any) -> NetworkSettings:
    return NetworkSettings(**{"encoder": TINY, "batch_norm": "live", **values})


def images(height: int = 33, width: int = 49, number: int = 2) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(0))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def backward(network: Network) -> None:
    main, auxiliary = network(images(), with_auxiliary=True)
    total = main.square().mean()
    (total if auxiliary is None else total + auxiliary.square().mean()).backward()


@pytest.mark.parametrize(
    "encoder",
    [
        "test_resnet",
        "resnet10t",
        "mobilenetv2_050",
        "mobilenetv3_small_050",
        "test_efficientnet",
        "test_convnext",
        "regnetx_002",
        "test_vit",
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
    ],
)
def test_any_encoder_at_any_size(encoder: str) -> None:
    network = build_network(settings(encoder=encoder, output_stride=16), 5, "branch").eval()
    for height, width in ((33, 49), (64, 32), (17, 70)):
        with torch.no_grad():
            main, auxiliary = network(images(height, width), with_auxiliary=True)
        assert auxiliary is not None
        assert main.shape == auxiliary.shape == (2, 5, height, width)
        assert torch.isfinite(main).all()


@pytest.mark.parametrize("encoder", [*NARROW, "test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_four_maps_of_any_hierarchical_encoder(encoder: str) -> None:
    """Stage 2's branch is a copy of the last stage, on the first three maps of the encoder itself."""
    given = settings(encoder=encoder, output_stride=32, head="fpn", head_width=16)
    network = build_network(given, 5, "branch")
    backward(network)
    assert not [name for name, one in network.named_parameters() if one.requires_grad and one.grad is None]
    network.eval()
    with torch.no_grad():
        for height, width in ((33, 49), (17, 130)):
            main, auxiliary = network(images(height, width), with_auxiliary=True)
            assert auxiliary is not None and main.shape == auxiliary.shape == (2, 5, height, width)
            assert torch.isfinite(main).all() and not torch.equal(main, auxiliary)
        low, third = network.encoder.trunk(images(64, 128))
        maps = network.encoder.last(*third)
    assert [one.shape[2:] for one in maps] == [(16, 32), (8, 16), (4, 8), (2, 4)]
    assert low is not None and low.shape[2:] == (16, 32)


@pytest.mark.parametrize("encoder", ["narrow_swin", "narrow_hiera", "narrow_maxvit"])
def test_the_last_map_of_a_hierarchical_transformer(encoder: str) -> None:
    network = build_network(
        settings(encoder=encoder, output_stride=32, head="deeplabv3plus", head_width=16), 5, "branch"
    )
    backward(network)
    assert not [name for name, one in network.named_parameters() if one.requires_grad and one.grad is None]
    assert network.encoder.size_multiple == (64 if encoder == "narrow_maxvit" else 32)


@pytest.mark.parametrize(
    "encoder",
    [
        "swin_tiny_patch4_window7_224",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("swinv2_tiny_window8_256", "maxvit_tiny_tf_224")),
    ],
)
def test_timms_own_can_be_cut(encoder: str) -> None:
    check_settings(settings(encoder=encoder, output_stride=32, head="fpn"))


@pytest.mark.parametrize("encoder", ["test_resnet", "mobilenetv3_small_050", "test_convnext"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_is_kept(encoder: str, output_stride: int) -> None:
    network = build_network(settings(encoder=encoder, output_stride=output_stride), 2).eval()
    with torch.no_grad():
        low, third = network.encoder.trunk(images(64, 96))
        deep = network.encoder.last(*third)
    assert deep.shape == (2, network.encoder.channels, 64 // output_stride, 96 // output_stride)
    assert low is not None and low.shape[1:] == (network.encoder.low_channels, 16, 24)


def test_vit_map_is_timms_own() -> None:
    model = create_timm("test_vit", 16).eval()
    image = images(48, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)[0]  # type: ignore[operator]
        encoder = split_encoder("test_vit", model, 16)
        _, third = encoder.eval().trunk(image)
        assert torch.allclose(encoder.last(*third), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("blocks", "taps"), [(12, (2, 5, 8, 11)), (24, (4, 11, 17, 23)), (40, (9, 19, 29, 39)), (6, (0, 2, 3, 5))]
)
def test_dpt_takes_the_ends_of_the_quarters(blocks: int, taps: tuple[int, ...]) -> None:
    assert taps_of(blocks) == taps


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_the_four_maps_are_timms_own_in_their_order(name: str) -> None:
    """Class tokens and registers are cut off, and the last norm is on each map, as DINOv2 gives them."""
    model = create_timm(name, 16).eval()
    image, taps = images(48, 112), list(taps_of(len(model.blocks)))  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model.forward_intermediates(image, indices=taps, norm=True, intermediates_only=True)  # type: ignore[operator]
        encoder = split_encoder(name, model, 16, tapped=True).eval()
        maps = encoder.last(*encoder.trunk(image).third)
    assert len(maps) == 4
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "width", "widths"),
    [(384, 64, (48, 96, 192, 384)), (768, 128, (96, 192, 384, 768)), (1024, 256, (256, 512, 1024, 1024))],
)
def test_the_widths_of_dpt_are_unimatch_v2s(channels: int, width: int, widths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        head = DPTHead(channels, 5)
        maps = tuple(torch.empty(1, channels, 7, 5) for _ in range(4))
        assert head(None, maps).shape == (1, 5, 56, 40), "eight cells for each cell of the maps"
    assert tuple(layer.out_channels for layer in head.project) == widths
    assert {layer.out_channels for layer in head.narrow} == {width}


def test_a_frozen_encoder_gets_no_gradient_and_its_teacher_does_not_drift() -> None:
    network = build_network(settings(encoder="test_vit", head="dpt", freeze_encoder=True), 3, "branch")
    teacher, before = make_teacher(network), copy.deepcopy(network.encoder.state_dict())
    backward(network)
    heads = ("main_head.", "auxiliary_head.")
    assert all((parameter.grad is not None) == name.startswith(heads) for name, parameter in network.named_parameters())
    torch.optim.SGD(network.new_parameters(), lr=0.1).step()
    for _ in range(3):
        update_teacher(teacher, network, 0.99)
    for name, value in before.items():
        assert torch.equal(teacher.encoder.state_dict()[name], value), name  # type: ignore[union-attr]
    assert not network.encoder.training and not same_state(teacher.main_head, network.main_head)  # type: ignore[arg-type]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        given = settings(encoder="test_vit", head="dpt", gradient_checkpointing=checkpointing)
        network = build_network(given, 3, "branch", seed=1)
        backward(network)
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("auxiliary", ["none", "branch", "shared"])
@pytest.mark.parametrize(
    ("encoder", "head"),
    [
        ("test_resnet", "deeplabv2"),
        ("test_resnet", "deeplabv3plus"),
        ("mobilenetv3_small_050", "deeplabv2"),
        ("test_convnext", "linear"),
        ("test_vit", "linear"),
        ("test_vit", "dpt"),
        ("deit_tiny_distilled_patch16_224", "linear"),
    ],
)
@pytest.mark.parametrize("batch_norm", ["frozen", "live"])
def test_every_trainable_parameter_gets_a_gradient(
    encoder: str, head: str, auxiliary: Auxiliary, batch_norm: str
) -> None:
    network = build_network(settings(encoder=encoder, head=head, output_stride=16, batch_norm=batch_norm), 3, auxiliary)
    backward(network)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert not [name for name, parameter in trainable.items() if parameter.grad is None]
    listed = [id(p) for p in network.pretrained_parameters() + network.new_parameters()]
    assert sorted(listed) == sorted(id(p) for p in trainable.values())


def test_the_branch_takes_the_new_layers_rate() -> None:
    network = build_network(settings(), 3, "branch")
    assert network.auxiliary_stage is not None
    new = {id(parameter) for parameter in network.new_parameters()}
    assert all(id(parameter) in new for parameter in network.auxiliary_stage.parameters())


@pytest.mark.parametrize("head", ["deeplabv2", "deeplabv3plus"])
def test_frozen_batch_norm_keeps_statistics_scale_and_shift(head: str) -> None:
    network = build_network(settings(batch_norm="frozen", head=head, encoder="test_efficientnet"), 3, "branch")
    network.eval().train()
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.BatchNorm2d) and name.startswith(("encoder", "auxiliary_stage"))
    ]
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers}
    convolution = next(network.encoder.last.parameters()).clone()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    backward(network)
    optimiser.step()
    assert any(name.startswith("auxiliary_stage") for name, _ in layers)
    for name, layer in layers:
        assert not layer.training
        assert all(torch.equal(value, before[name][key]) for key, value in layer.state_dict().items())
    assert not torch.equal(next(network.encoder.last.parameters()), convolution)
    heads = [layer for layer in network.main_head.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(layer.training for layer in heads)


def test_live_batch_norm_follows_the_images() -> None:
    network = build_network(settings(), 3)
    before = network.encoder.state_dict()["trunk.layers.bn1.running_mean"].clone()
    network(images())
    assert not torch.equal(network.encoder.state_dict()["trunk.layers.bn1.running_mean"], before)


def test_a_seed_gives_one_network_and_leaves_torchs_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, other, different = (build_network(settings(), 3, "branch", seed) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_state(one, other)
    assert not same_state(one, different)


def test_the_branch_is_a_copy_of_its_own() -> None:
    network = build_network(settings(batch_norm="frozen"), 3, "branch").eval()
    assert network.auxiliary_stage is not None
    assert same_state(network.auxiliary_stage, network.encoder.last)
    main, auxiliary = network(images(), with_auxiliary=True)
    with torch.no_grad():
        for parameter in network.auxiliary_stage.parameters():
            parameter.add_(0.1)
    changed_main, changed_auxiliary = network(images(), with_auxiliary=True)
    assert torch.equal(main, changed_main)
    assert not torch.equal(auxiliary, changed_auxiliary)
    network.zero_grad()
    network(images(), with_auxiliary=True)[1].sum().backward()
    assert all(parameter.grad is None for parameter in network.encoder.last.parameters())
    assert any(parameter.grad is not None for parameter in network.encoder.trunk.parameters())


@pytest.mark.parametrize("auxiliary", ["branch", "shared"])
def test_the_main_network_ships_alone(auxiliary: Auxiliary) -> None:
    network = build_network(settings(), 3, auxiliary, seed=1).eval()
    shipped = build_network(settings(), 3, "none", seed=2).eval()
    shipped.load_state_dict(network.main_state_dict(), strict=True)
    expected, nothing = network(images())
    assert nothing is None
    assert torch.equal(shipped(images(), with_auxiliary=True)[0], expected)
    assert network.main_state_dict().keys() == shipped.state_dict().keys()


def test_images_are_normalised_inside() -> None:
    plain = build_network(settings(mean=(0, 0, 0), std=(1, 1, 1)), 3, seed=3).eval()
    shifted = build_network(settings(mean=(0.5, 0.25, 0.125), std=(0.5, 0.5, 0.5)), 3, seed=3).eval()
    mean = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    assert torch.allclose(shifted(images())[0], plain((images() - mean) / 0.5)[0], atol=1e-6)


def test_deeplabv2_sums_dilated_classifiers_that_start_small() -> None:
    head = DeepLabV2Head(64, 4, (6, 12))
    deep = torch.rand(1, 64, 9, 9)
    assert torch.allclose(head(None, deep), sum(classifier(deep) for classifier in head.classifiers))
    weights = torch.cat([classifier.weight.flatten() for classifier in head.classifiers])  # type: ignore[operator]
    assert abs(weights.std().item() - 0.01) < 0.001
    assert all(not classifier.bias.any() for classifier in head.classifiers)  # type: ignore[operator]


@pytest.mark.parametrize("output_stride", [8, 32])
@pytest.mark.parametrize("size", [(33, 49), (64, 32)])
def test_traceable_pooling_computes_the_same(output_stride: int, size: tuple[int, int]) -> None:
    network = build_network(settings(output_stride=output_stride), 3).eval()
    expected = network(images(*size))[0]
    pools = sum(type(module).__name__ == "TraceablePool" for module in network.modules())
    replace_pooling(network)
    assert sum(type(module).__name__ == "TraceablePool" for module in network.modules()) > pools
    assert torch.allclose(network(images(*size))[0], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext", "test_vit"])
def test_an_exported_network_takes_any_size(encoder: str) -> None:
    network = build_network(settings(encoder=encoder, head="linear"), 3).eval()
    replace_pooling(network)
    sides = {index: torch.export.Dim(name, min=32, max=4096) for index, name in ((2, "height"), (3, "width"))}
    shapes = ({0: torch.export.Dim("images", min=1, max=64), **sides},)
    program = torch.export.export(network, (images(64, 96),), dynamic_shapes=(*shapes,)).module()
    for size in ((75, 53), (64, 64)):
        assert torch.allclose(program(images(*size, number=3))[0], network(images(*size, number=3))[0], atol=1e-5)


@pytest.mark.parametrize("encoder", ["test_resnet", "test_efficientnet", "test_vit", "hrnet_w18_small"])
@pytest.mark.parametrize("channels", [1, 4])
def test_any_encoder_takes_other_bands(encoder: str, channels: int) -> None:
    head = {"test_vit": "linear", "hrnet_w18_small": "fpn"}.get(encoder, "deeplabv2")
    chosen = settings(encoder=encoder, head=head, output_stride=32, channels=channels)
    check_settings(chosen)
    if encoder != "hrnet_w18_small":
        image = torch.rand(1, channels, 33, 49)
        assert build_network(chosen, 3).eval()(image)[0].shape == (1, 3, 33, 49)


def test_weights_of_rgb_are_widened_as_timm_widens_its_own(tmp_path: Path) -> None:
    state = create_timm(TINY, 32).state_dict()
    safetensors.torch.save_file(state, tmp_path / "rgb.safetensors")
    first = state["conv1.0.weight"]
    expected = {1: first.sum(1, keepdim=True), 2: first[:, :2] * 1.5, 5: first[:, [0, 1, 2, 0, 1]] * 0.6}
    for channels, weights in expected.items():
        found = build_network(settings(weights=str(tmp_path / "rgb.safetensors"), channels=channels), 3)
        torch.testing.assert_close(found.state_dict()["encoder.trunk.layers.conv1_0.weight"], weights)


def test_the_normalisation_of_other_bands_follows_the_weights() -> None:
    four = build_network(settings(channels=4), 2)
    assert four.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406, 0.485])
    assert four.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225, 0.229])
    (mean,), (std,) = settings(channels=1).normalisation
    assert (mean, std) == pytest.approx(((0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3))
