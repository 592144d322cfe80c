"""docs/encoders.md from docs/encoders.json, which the slow tests of tests/unit/models/test_encoders_page.py fill row by row."""

import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from threestage.errors import InputError
from threestage.models import network as networks
from threestage.models.network import Network, build_network, check_settings
from threestage.models.settings import NetworkSettings

ROOT = Path(__file__).parents[1]
PAGE, RECORDS = ROOT / "docs/encoders.md", ROOT / "docs/encoders.json"
BESIDE = "resnet50"
HEADS: tuple[tuple[Any, Any], ...] = (("deeplabv2", 8), ("deeplabv3plus", 16), ("fpn", 32), ("linear", 32), ("dpt", 32))
"""With the output stride; a ViT has its own."""
NAMES = """
resnet18 resnet34 resnet50 resnet50d resnet101 resnext50_32x4d wide_resnet50_2 seresnet50 resnest26d res2net50_26w_4s ecaresnet26t
resnetv2_50x1_bit mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100 tf_mobilenetv3_small_minimal_100
mobilenetv4_conv_small efficientnet_b0 tf_efficientnet_b0 tf_efficientnetv2_b0 tf_efficientnet_lite0 mnasnet_100 fbnetc_100
ghostnet_100 regnetx_002
regnety_002 regnety_032 convnext_atto convnext_pico convnext_tiny convnextv2_atto convnextv2_tiny inception_next_atto densenet121
dla34 vgg16_bn xception65 rexnet_100 hgnetv2_b0 repvgg_a0 edgenext_small poolformer_s12 caformer_s18
swin_tiny_patch4_window7_224 swin_small_patch4_window7_224 swinv2_tiny_window8_256 pvt_v2_b0 pvt_v2_b2 maxvit_rmlp_pico_rw_256
maxvit_tiny_tf_224 coatnet_nano_rw_224 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small hrnet_w18 twins_svt_small efficientvit_b0
vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2
vit_small_patch16_dinov3 eva02_tiny_patch14_224 deit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 mixer_s32_224
"""
ENCODERS = NAMES.split()

Record = dict[str, Any]


def code() -> str:
    """A digest of what a record depends on."""
    files = [Path(networks.__file__).with_name(f"{name}.py") for name in ("encoders", "heads", "network", "trunks")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def recorded() -> dict[str, Record]:
    found: dict[str, Record] = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    return found


def record(encoder: str, found: Record) -> None:
    """Keep what was found of an encoder, and write the page anew."""
    records = recorded()
    records[encoder] = {**records.get(encoder, {}), **found}
    RECORDS.write_text(json.dumps({name: records[name] for name in ENCODERS if name in records}, indent=1) + "\n")
    PAGE.write_text(page(records))


def settings_of(encoder: str, head: Any, stride: Any) -> NetworkSettings:
    return NetworkSettings(
        encoder=encoder, head=head, output_stride=stride, batch_norm="live", align_corners=False, head_width=64
    )


def measured(encoder: str) -> Record:
    """Which heads it works with, and why not the others: built, used at odd sizes, and with a gradient for every weight."""
    found: Record = {"heads": {}, "code": code()}
    for head, stride in HEADS:
        settings = settings_of(encoder, head, stride)
        try:
            check_settings(settings)
        except InputError as error:
            found["heads"][head] = error.message
            continue
        network = build_network(settings, 3, "branch")
        found["heads"][head] = wrong_in(network) or "works"
        if "parameters" not in found:
            found["parameters"] = sum(one.numel() for one in network.encoder.parameters())
            found["multiple"] = network.encoder.size_multiple
            found["time"] = round(seconds(network) / seconds(beside()), 2)
    return found


@cache
def beside() -> Network:
    return build_network(settings_of(BESIDE, *HEADS[0]), 3, "branch")


def wrong_in(network: Network) -> str | None:
    """What does not work in it, or None."""
    network.eval()
    with torch.inference_mode():
        for size in ((33, 49), (70, 129)):
            shown = network(torch.rand(1, 3, *size), with_auxiliary=True)
            if any(one.shape != (1, 3, *size) or not torch.isfinite(one).all() for one in shown):
                return f"logits of {size[0]}x{size[1]} pixels are wrong"
    network.train()
    main, auxiliary = network(torch.rand(2, 3, 65, 97), with_auxiliary=True)
    (main.square().mean() + auxiliary.square().mean()).backward()
    without = [name for name, one in network.named_parameters() if one.requires_grad and one.grad is None]
    return f"no gradient for {without[0]}" if without else None


@torch.inference_mode()
def seconds(network: Network) -> float:
    """Of the CPU, for the main logits of one image of 224×224 pixels: the least of three."""
    image, found = torch.rand(1, 3, 224, 224), []
    network.eval()(image)
    for _ in range(3):
        start = time.process_time()
        network(image)
        found.append(time.process_time() - start)
    return min(found)


def main_head(found: Record) -> tuple[str, int] | None:
    """The head that exports are tried with: the last one that works."""
    return next(((head, stride) for head, stride in reversed(HEADS) if found["heads"].get(head) == "works"), None)


INTRODUCTION = """# Encoders

The slow tests of `tests/unit/models/test_encoders_page.py` write this page, with random weights,
in float32 on a CPU. Do not edit it. An empty row was not tried.

- **✓**: stage 2's network can be built, gives finite logits at 33×49 and 70×129 pixels, and every
  trainable weight gets a gradient. The number beside a head is `network.output_stride`; a ViT has
  its own.
- **Sides**: images are padded to a multiple of it inside the network.
- **Time**: CPU time of a forward pass at 224×224 pixels, one thread, with the first head that
  works, relative to resnet50 with deeplabv2 at stride 8.
- **Program, ONNX**: the exported forms, with the last head that works. Their logits are compared
  with the network's at three sizes. The number is the shortest side that they take.

"""


def page(records: dict[str, Record]) -> str:
    heads = [f"{head} /{stride}" if head not in ("linear", "dpt") else head for head, stride in HEADS]
    columns = ["encoder", "million weights", *heads, "sides", "time", "program", "ONNX"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    refused = []
    for name in ENCODERS:
        found = records.get(name)
        if found is None:
            lines.append(f"| `{name}` |" + " |" * (len(columns) - 1))
            continue
        cells = ["✓" if found["heads"].get(head) == "works" else "–" for head, _ in HEADS]
        if "parameters" not in found:
            refused.append(f"| `{name}` | {found['heads'][HEADS[3][0]]} |")
        weights = f"{found['parameters'] / 1e6:.1f}" if "parameters" in found else "–"
        exports = [_short(found.get(form)) for form in ("program", "onnx")]
        row = [f"`{name}`", weights, *cells, found.get("multiple", "–"), found.get("time", "–"), *exports]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    text = INTRODUCTION + "\n".join(lines) + "\n"
    if refused:
        text += "\n## Refused with every head\n\n| encoder | message |\n|---|---|\n" + "\n".join(refused) + "\n"
    failed = [
        f"| `{name}` | {form} | {found[form]} |"
        for name, found in records.items()
        for form in ("program", "onnx")
        if isinstance(found.get(form), str)
    ]
    if failed:
        text += "\n## Not exported\n\n| encoder | form | why |\n|---|---|---|\n" + "\n".join(failed) + "\n"
    return text


def _short(found: Any) -> str:
    return "" if found is None else str(found) if isinstance(found, int) else "–"
