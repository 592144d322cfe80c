"""A model of training on 1 to 512 GPUs: images/s, bandwidth from the store, checkpoints and all-reduce (docs/scaling.md).

    python -m tests.benchmarks.scaling_model [--coordination FILE.json] [--write docs/scaling.md]

Prints the tables as Markdown; --write puts them between the page's markers. FILE.json is what bench_coordination.py
writes; without it --write keeps the measurement that the page holds. Only that cost was measured by us: no GPU was.
Units: bytes, seconds, floating-point operations (a multiply-add is two), unless a name says otherwise.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BEGIN, END = "<!-- scaling_model:begin -->", "<!-- scaling_model:end -->"
HELD = "<!-- coordination: "  # what was measured, as JSON inside the page
NOT_MEASURED = (
    "**Coordination: not measured yet, taken as 0.** The measured table comes here (`--coordination FILE.json`)."
)


@dataclass(frozen=True)
class Constants:
    """What does not depend on network or data set. "Assumed": nobody's figure; replace it by your own first."""

    # one GPU, and the process that drives it
    peak_flops: float = 989e12  # H100 SXM, bf16 without sparsity: NVIDIA, H100 datasheet
    host_s_per_operation: float = 15e-6  # assumed, eager PyTorch: 5 to 25 µs are published
    other_operations: int = 500  # assumed: views, losses, optimiser, EMA; the network's own are in Workload
    jitter: float = 0.02  # assumed: standard deviation of a worker's step time, relative
    # gradients
    gpus_per_node: int = 8  # DGX/HGX H100
    nvlink: float = 0.8 * 450e9  # bytes/s a direction (NVIDIA, H100 datasheet); assumed share of 80 %
    node_network: float = 0.8 * 400e9 / 8  # bytes/s: 400 Gb/s a node (AWS p4d; p5 has 3,200); assumed share of 80 %
    nvlink_latency_s: float = 3e-6  # assumed, per hop
    network_latency_s: float = 10e-6  # assumed, per hop
    collective_s: float = 20e-6  # assumed: to start a collective
    bucket_bytes: float = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb (PyTorch documentation)
    overlap: float = (
        0.8  # assumed share of the backward pass that hides communication (Li et al., VLDB 2020: most of it)
    )
    # object storage, and the stream of unlabelled images
    store_bytes_per_node: float = 8e9  # c5n.18xlarge, 100 Gb/s: dvassallo/s3-benchmark
    gets_per_prefix: float = 5500  # GET/s: Amazon S3 user guide, "Best practices design patterns"
    prefixes: int = 1
    rows_per_file: int = 256  # `threestage ingest`
    gets_per_file: float = 20  # assumed: an image file and its pseudo-masks, footers and data in ranges of 32 MB
    gets_by_reference: float = 2  # an image: docs/storage.md
    cores_per_gpu: float = 96 / 8 - 2  # AWS p5.48xlarge: 192 vCPU; assumed: two keep the training process
    map_pixels_per_s: float = 150e6  # assumed: a core decodes pseudo-mask and confidence and cuts the canvas
    encode_pixels_per_s: float = 30e6  # assumed: a core writes a pseudo-mask PNG and compresses its confidence
    map_bytes_per_pixel: float = 0.03 + 0.35  # assumed: pseudo-mask as PNG, confidence as zstd
    stream_tasks: int = 1024  # MAX_TASKS in threestage/ray_backend/pool_stream.py: no more tasks than that read files
    block_bytes: float = 1.1 * 32 * 2**20  # BLOCK_BYTES there
    blocks_per_s: float = 1000  # assumed: what one Ray Data executor and its split coordinator hand out
    object_store_per_node: float = 10e9  # assumed: bytes/s through one node's shared memory, written and read
    # checkpoints and failures
    snapshot_rate: float = 5e9  # assumed: bytes/s from the GPU into pageable host memory
    upload_rate: float = 0.3e9  # assumed: torch.save, then one object's upload in parts
    restart_s: float = 30.0  # assumed; hardware that must be replaced takes minutes
    node_mtbf_s: float = 54 * 86400 * 2048 / 419  # 419 stops in 54 days of 16,384 GPUs: Llama 3 (Meta, 2024)
    checkpoint_every: int = 500  # steps: training.checkpoint_every
    paper_steps: int = 60_000  # of stages 2 and 3 (Ke et al.)

    def nodes(self, gpus: int) -> int:
        return math.ceil(gpus / self.gpus_per_node)


# Share of peak. ResNet-50 v1.5 trains at 2,470 images/s on an A100 (NVIDIA DeepLearningExamples): × 3 × 8.2 GFLOP = 19 %
# of 312 TFLOP/s. Depthwise convolutions are bound by memory: assumed a fifth of that.
UTILISATION, DEPTHWISE_UTILISATION = 0.20, 0.04
# Pixels/s of one core. simplejpeg: 700 ImageNet images/s (ternaus/imread_benchmark), here of 0.18 megapixels. libpng: a
# third to two fifths of fpng's 162 megapixels/s (fpng's README).
JPEG, PNG = 700 * 0.18e6, 60e6


@dataclass(frozen=True)
class Workload:
    """A network on a data set in stage 2, the dearest. FLOPs and parameters are counted on this repository's network
    on the meta device, dilations (6, 12); a unit test counts them again."""

    name: str
    encoder: str
    num_classes: int
    output_stride: int
    crop: tuple[int, int]  # pixels
    labelled: int  # images per step and worker (method.md; CamVid: its preset)
    unlabelled: int
    student_flops: float  # forward pass of one crop, with the auxiliary branch
    teacher_flops: float  # main head only
    parameters: float  # trainable, of the student
    operations: int  # of the student's two passes and the teacher's one: kernels to launch at least, counted once
    teacher_operations: int
    utilisation: float
    canvas: tuple[int, int]  # of the stream, pixels
    image_pixels: float  # as stored
    image_bytes: float  # as stored
    decode_pixels_per_s: float
    downscale: int = 1

    @property
    def pool_pixels(self) -> float:
        """Of an image as it is trained on and predicted."""
        return self.image_pixels / self.downscale**2

    @property
    def canvas_bytes(self) -> float:
        """Of an image in Ray's object store: RGB, pseudo-mask, confidence."""
        return self.canvas[0] * self.canvas[1] * 5

    @property
    def checkpoint_bytes(self) -> float:
        """float32 student, teacher and Adam's two moments; buffers are half a per cent more."""
        return 4 * 4 * self.parameters


# VOC2012's archive is 2.0 GB for 17,125 images; Cityscapes' leftImg8bit 11 GB for 5,000; CamVid at 480×360: assumed.
WORKLOADS = (
    Workload("ResNet-101, VOC 321×321", "resnet101", 21, 8, (321, 321), 1, 9, 200.83e9, 147.99e9, 58.89e6,
             1119, 348, UTILISATION, (500, 500), 500 * 375, 117e3, JPEG),
    Workload("ResNet-101, Cityscapes 256×512", "resnet101", 19, 8, (256, 512), 1, 4, 244.19e9, 180.12e9, 58.74e6,
             1119, 348, UTILISATION, (256, 512), 2048 * 1024, 2.2e6, PNG, downscale=2),
    Workload("ResNet-50, Cityscapes 256×512", "resnet50", 19, 8, (256, 512), 1, 4, 166.61e9, 102.54e9, 39.80e6,
             609, 178, UTILISATION, (256, 512), 2048 * 1024, 2.2e6, PNG, downscale=2),
    Workload("MobileNetV2, CamVid 352×480", "mobilenetv2_100", 11, 16, (352, 480), 4, 4, 4.891e9, 3.152e9, 3.161e6,
             577, 152, DEPTHWISE_UTILISATION, (352, 480), 480 * 360, 70e3, JPEG),
)  # fmt: skip
DETAILED = (WORKLOADS[0], WORKLOADS[2], WORKLOADS[3])


@dataclass(frozen=True)
class Coordination:
    """What a step that only sleeps costs beyond its sleep, measured on our small machine.

    One worker's cost is its own work, which the model has elsewhere; with more workers than cores they take turns at it.
    What is left after taking that off is coordination.
    """

    workers: list[int]
    overhead_ms_per_step: list[float]
    sleep_ms: float
    date: str
    machine: str
    cores: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Coordination":
        """From the benchmark's file; keys that are not needed are ignored. ValueError on a ragged or empty table."""
        made = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        if not made.workers or len(made.workers) != len(made.overhead_ms_per_step):
            raise ValueError(f"{len(made.workers)} worker counts, {len(made.overhead_ms_per_step)} overheads: no table")
        return made

    def coordination_ms(self) -> list[float]:
        """By number of workers: overhead − overhead of one worker · max(1, workers / cores), not below 0."""
        own = self.overhead_ms_per_step[0] / max(1.0, self.workers[0] / self.cores)
        turns = [own * max(1.0, workers / self.cores) for workers in self.workers]
        return [max(0.0, o - t) for o, t in zip(self.overhead_ms_per_step, turns, strict=True)]

    def seconds(self, gpus: int) -> float:
        """a + b · log2(workers), fitted with neither below 0: beyond the measured counts it is a guess."""
        log, measured = np.log2(self.workers), np.array(self.coordination_ms()) / 1000
        b = max(0.0, float(np.polyfit(log, measured, 1)[0])) if np.ptp(log) else 0.0
        return max(0.0, float(np.mean(measured - b * log))) + b * math.log2(gpus)


def scalar_s(c: Constants, gpus: int) -> float:
    """All-reduce of a few numbers: 2 · log2(n) hops."""
    if gpus == 1:
        return 0.0
    inside, between = math.log2(min(gpus, c.gpus_per_node)), math.log2(c.nodes(gpus))
    return c.collective_s + 2 * (inside * c.nvlink_latency_s + between * c.network_latency_s)


def allreduce_s(c: Constants, size: float, gpus: int) -> float:
    """2(g-1)/g · size over NVLink among a node's g GPUs, 2(N-1)/N · size among N nodes, and the hops of each bucket."""
    g, n = min(gpus, c.gpus_per_node), c.nodes(gpus)
    volume = 2 * (g - 1) / g * size / c.nvlink + 2 * (n - 1) / n * size / c.node_network
    return volume + math.ceil(size / c.bucket_bytes) * scalar_s(c, gpus)


def busy_s(c: Constants, w: Workload) -> tuple[float, float]:
    """A GPU's seconds for one image of a step (student forward and backward, teacher forward), and those that launching
    a step's kernels takes whatever its batch."""
    gpu = (3 * w.student_flops + w.teacher_flops) / (c.peak_flops * w.utilisation)
    return gpu, (w.operations + c.other_operations) * c.host_s_per_operation


def image_cost(c: Constants, w: Workload) -> tuple[float, float]:
    """Of an image of the stream: bytes from the store (encoded image, pseudo-mask, confidence), and a core's seconds."""
    decoding = w.image_pixels / w.decode_pixels_per_s + w.pool_pixels / c.map_pixels_per_s
    return w.image_bytes + c.map_bytes_per_pixel * w.pool_pixels, decoding


def stream_limits(c: Constants, w: Workload, gpus: int, by_reference: bool = False) -> dict[str, float]:
    """The most images/s that each part of the stream lets through. A part of a node has its part of cores and network."""
    share, (size, core_s) = gpus / c.gpus_per_node, image_cost(c, w)
    gets = c.gets_per_file / c.rows_per_file + (c.gets_by_reference if by_reference else 0)  # an image
    return {
        "decoding": gpus * c.cores_per_gpu / core_s,
        "read tasks": c.stream_tasks / core_s,
        "nodes' network": share * c.store_bytes_per_node / size,
        "requests": c.prefixes * c.gets_per_prefix / gets,
        "handing out blocks": c.blocks_per_s * math.ceil(c.block_bytes / w.canvas_bytes),
        "Ray's object store": share * c.object_store_per_node / w.canvas_bytes,
    }


@dataclass(frozen=True)
class Row:
    """Stage 2 on `gpus` GPUs; seconds are those of a step."""

    gpus: int
    step: float
    allreduce: float  # of the gradients, hidden or not
    exposed: float  # the part of it that is not hidden
    images: float  # unlabelled images/s, all GPUs together
    limit: str
    efficiency: float  # images/s a GPU, relative to one GPU alone
    store_bytes: float  # per second, all nodes together
    object_store_bytes: float  # per second and node
    cores: float  # that decode
    lost: float  # share of time lost to checkpoints and failures


def row(c: Constants, w: Workload, gpus: int, coordination: Coordination | None = None) -> Row:
    """All figures for one number of GPUs, with `per_worker` batches."""
    an_image, host = busy_s(c, w)
    gpu, size = (w.labelled + w.unlabelled) * an_image, 4 * w.parameters  # of float32 gradients
    busy, allreduce = max(gpu, host), allreduce_s(c, size, gpus)
    backward = busy * 2 * w.student_flops / (3 * w.student_flops + w.teacher_flops)
    last_bucket = allreduce * min(1.0, c.bucket_bytes / size)  # nothing is left to hide it behind
    exposed = max(allreduce - c.overlap * backward, last_bucket)
    slowest = c.jitter * math.sqrt(2 * math.log(gpus)) * busy  # about the largest of n normal deviates
    step = busy + exposed + slowest + scalar_s(c, gpus) + (coordination.seconds(gpus) if coordination else 0.0)
    own = "all-reduce" if exposed > busy else "GPU" if gpu >= host else "kernel launches"
    limits = {own: gpus * w.unlabelled / step} | stream_limits(c, w, gpus)
    limit = min(limits, key=lambda part: limits[part])
    images = limits[limit]
    step = gpus * w.unlabelled / images  # longer where data are late
    stored, core_s = image_cost(c, w)
    return Row(
        gpus, step, allreduce, exposed, images, limit,
        efficiency=1.0 if gpus == 1 else images / gpus / row(c, w, 1, coordination).images,
        store_bytes=images * stored, object_store_bytes=images * w.canvas_bytes / c.nodes(gpus),
        cores=images * core_s, lost=lost_share(c, w, gpus, c.checkpoint_every * step),
    )  # fmt: skip


def lost_share(c: Constants, w: Workload, gpus: int, interval_s: float) -> float:
    """Share of time that goes to snapshots, and to steps done again and restarts after a node fails."""
    upload = w.checkpoint_bytes / c.upload_rate
    waiting = w.checkpoint_bytes / c.snapshot_rate + max(0.0, upload - interval_s)  # for the upload of the one before
    failed = (interval_s / 2 + upload + c.restart_s) * c.nodes(gpus) / c.node_mtbf_s
    return waiting / (interval_s + waiting) + failed


def best_interval_s(c: Constants, w: Workload, gpus: int) -> float:
    """Young's √(2 · snapshot · MTBF), no shorter than the upload."""
    young = math.sqrt(2 * w.checkpoint_bytes / c.snapshot_rate * c.node_mtbf_s / c.nodes(gpus))
    return max(w.checkpoint_bytes / c.upload_rate, young)


def prediction(c: Constants, w: Workload) -> tuple[float, str]:
    """Whole images/s that one GPU turns into pseudo-masks, and what limits it: GPUs need nothing of each other."""
    flops = w.teacher_flops * w.pool_pixels / (w.crop[0] * w.crop[1])
    cpu = w.image_pixels / w.decode_pixels_per_s + w.pool_pixels / c.encode_pixels_per_s
    limits = {
        "GPU": c.peak_flops * w.utilisation / flops,
        "kernel launches": 8 / (w.teacher_operations * c.host_s_per_operation),  # pseudo_mask.batch_size
        "decoding, encoding": c.cores_per_gpu / cpu,
    }
    limit = min(limits, key=lambda part: limits[part])
    return limits[limit], limit


# fmt: off
def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))]


def short(value: float) -> str:
    """Two or three figures, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def hours(c: Constants, r: Row) -> float:
    """Of the paper's steps, checkpoints and failures included."""
    return c.paper_steps * r.step * (1 + r.lost) / 3600


def tables(c: Constants, m: Coordination | None = None) -> str:
    """The page's generated part."""
    lines = [HELD + (json.dumps(asdict(m)) if m else "none") + " -->"]
    if m is None:
        lines += ["", NOT_MEASURED]
    else:
        title = f"Coordination, {m.date}, {m.machine}: extra time of a step that sleeps {m.sleep_ms:g} ms, and the fit"
        whole = [f"{value:.2f}" for value in m.overhead_ms_per_step]
        coordination = [*m.coordination_ms(), *(1000 * m.seconds(n) for n in (8, 64, 512))]
        rows = [["ms a step", *whole, "", "", ""], ["coordination", *(f"{value:.2f}" for value in coordination)]]
        lines += table(title, ["workers", *map(str, m.workers), "fit: 8", "64", "512"], rows)
    for w in DETAILED:
        lines += table(f"{w.name}, {w.labelled} + {w.unlabelled} images per GPU and step",
            ["GPUs", "images/s", "efficiency", "limited by", "step, ms", "all-reduce, ms (not hidden)", "store, GB/s",
             "Ray's object store, GB/s a node", "decode cores", "checkpoints, failures"],
            [[str(r.gpus), short(r.images), f"{r.efficiency:.2f}", r.limit, f"{1000 * r.step:.1f}",
              f"{1000 * r.allreduce:.1f} ({1000 * r.exposed:.1f})", short(r.store_bytes / 1e9),
              short(r.object_store_bytes / 1e9), f"{r.cores:,.0f}", f"{r.lost:.1%}"]
             for r in (row(c, w, n, m) for n in GPUS)])
    lines += table("Hours for 60,000 steps, and minutes for as many images in fewer steps",
        ["", "1 GPU, h", "8, h", "64, h", "512, h", "8, min (7,500 steps)", "64, min (938)", "512, min (117)"],
        [[w.name, *(short(hours(c, row(c, w, n, m))) for n in (1, 8, 64, 512)),
          *(short(60 / n * hours(c, row(c, w, n, m))) for n in (8, 64, 512))] for w in WORKLOADS])
    lines += table("How many GPUs each limit feeds, and images a GPU needs in a step to hide kernel launches",
        ["", "300 blocks/s", "1,000", "3,000", "1,024 read tasks", "a prefix by reference", "cores a GPU", "images a GPU"],
        [feeding_cells(c, w) for w in WORKLOADS])
    free = replace(c, stream_tasks=10**9, blocks_per_s=1e9, prefixes=10**6)
    cells = [[row(replace(free, node_network=0.8e9 * gigabits / 8), replace(WORKLOADS[0], utilisation=share), 512, m)
              for gigabits in (100, 400, 3200)] for share in (0.1, 0.2, 0.4)]
    lines += table(f"{WORKLOADS[0].name}: efficiency of 512 GPUs that the stream keeps fed",
        ["utilisation", "100 Gb/s a node", "400 Gb/s", "3,200 Gb/s"],
        [[share, *(f"{r.efficiency:.2f}" for r in line)] for share, line in zip(("10%", "20%", "40%"), cells, strict=True)])
    lines += table("Checkpoints: seconds to save one, seconds between two at best, and what is lost then",
        ["", "MB", "snapshot", "upload", "interval on 8 GPUs", "64", "512", "lost on 512", "restart in 10 min"],
        [checkpoint_cells(c, w) for w in DETAILED])
    lines += table("Pseudo-masks",
        ["", "images/s a GPU", "limited by", "KB an image", "10⁸ images, TB", "10⁶ on 1 GPU, h", "10⁶ on 8, h",
         "10⁸ on 64, h", "10⁸ on 512, h"], [prediction_cells(c, w) for w in DETAILED])
    return "\n".join(lines)

def feeding_cells(c: Constants, w: Workload) -> list[str]:
    alone = row(c, w, 1).images
    fed_by = [stream_limits(replace(c, blocks_per_s=b), w, 1)["handing out blocks"] for b in (300, 1000, 3000)]
    fed_by += [stream_limits(c, w, 1)["read tasks"], stream_limits(c, w, 1, by_reference=True)["requests"]]
    needed = [short(alone * image_cost(c, w)[1]), short(busy_s(c, w)[1] / busy_s(c, w)[0])]
    return [w.name, *(f"{images / alone:,.0f}" for images in fed_by), *needed]


def checkpoint_cells(c: Constants, w: Workload) -> list[str]:
    size, slow = w.checkpoint_bytes, replace(c, restart_s=600)
    lost = [f"{lost_share(k, w, 512, best_interval_s(k, w, 512)):.2%}" for k in (c, slow)]
    intervals = [f"{best_interval_s(c, w, n):,.0f}" for n in (8, 64, 512)]
    return [w.name, f"{size / 1e6:,.0f}", short(size / c.snapshot_rate), short(size / c.upload_rate), *intervals, *lost]


def prediction_cells(c: Constants, w: Workload) -> list[str]:
    (images, limit), size = prediction(c, w), c.map_bytes_per_pixel * w.pool_pixels
    took = [short(count / (gpus * images) / 3600) for count, gpus in ((1e6, 1), (1e6, 8), (1e8, 64), (1e8, 512))]
    return [w.name, short(images), limit, short(size / 1e3), short(1e8 * size / 1e12), *took]
# fmt: on


def rewritten(page: str, measured: Coordination | None = None) -> str:
    """The page with new tables between its markers; the measurement that it holds is kept unless there is a new one."""
    before, old, after = page.partition(BEGIN)[0], page.partition(BEGIN)[2].partition(END)[0], page.partition(END)[2]
    held = old.partition(HELD)[2].partition(" -->")[0]
    if measured is None and held not in ("", "none"):
        measured = Coordination.of(json.loads(held))
    return f"{before}{BEGIN}\n{tables(Constants(), measured)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordination", type=Path, help="what bench_coordination.py wrote")
    parser.add_argument("--write", type=Path, help="page whose tables to replace")
    options = parser.parse_args()
    measured = Coordination.of(json.loads(options.coordination.read_text())) if options.coordination else None
    if options.write is None:
        print(tables(Constants(), measured))
    else:
        options.write.write_text(rewritten(options.write.read_text(), measured))


if __name__ == "__main__":
    main()
