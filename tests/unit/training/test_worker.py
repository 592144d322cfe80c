"""What many workers find together must be what one finds: to the last pixel, and each image once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from threestage.config import load
from threestage.data.batches import SampleSet
from threestage.data.pool import PoolFile, data_set_files, pseudo_mask_uri
from threestage.data.records import labelled_rows, load_manifest
from threestage.data.samples import TableSamples
from threestage.data.storage import read_table
from threestage.evaluation import CHUNK, WorkerShare, evaluate
from threestage.models.network import Network, build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.pool_prediction import predict_files
from threestage.prediction.pseudo_masks import PoolTask
from threestage.run.stages import images_per_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classes(scenes: Path) -> int:
    return len(load_manifest(str(scenes)).classes)


@pytest.fixture(scope="module")
def network(classes: int) -> Network:
    return build_network(NetworkSettings(encoder="test_resnet", dilations=(1, 2)), classes, "none", 0).eval()


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_counts_are_equal(scenes: Path, network: Network, classes: int, workers: int) -> None:
    """27 images are four chunks: of seven workers three have none."""
    samples = SampleSet(TableSamples(labelled_rows(str(scenes), load_manifest(str(scenes)), "train")), 1)
    samples = SampleSet(samples.samples[:27], 1)
    assert 3 * CHUNK < len(samples) < 4 * CHUNK
    one = evaluate(network, samples, classes, CPU)
    parts = [evaluate(network, samples, classes, CPU, WorkerShare(rank, workers)) for rank in range(workers)]
    assert torch.equal(torch.stack([part.confusion for part in parts]).sum(0), one.confusion)
    assert torch.equal(torch.stack([part.images for part in parts]).sum(0), one.images)
    assert one.confusion.sum() == 27 * 64 * 64 - sum(
        int((samples.decoded(i).maps["mask"] == 255).sum()) for i in range(27)
    )


def test_pseudo_masks_are_equal(scenes: Path, network: Network, classes: int, tmp_path: Path) -> None:
    files = data_set_files(str(scenes), load_manifest(str(scenes)))
    assert len(files) > 1

    def predicted(name: str, shares: Sequence[Sequence[PoolFile]]) -> list[object]:
        task = PoolTask(
            destination=str(tmp_path / name), model_digest="m", num_classes=classes, downscale=1, batch_size=3,
            max_image_pixels=10**6, used_ids=frozenset(), excluded_ids=frozenset(),
        )  # fmt: skip
        for share in shares:
            list(predict_files(network, task, share, CPU))
        return [read_table(pseudo_mask_uri(task.destination, file)).to_pylist() for file in files]

    assert predicted("one", [files]) == predicted("many", [[file] for file in reversed(files)])


def test_a_stream_goes_on_after_the_images_that_it_gave() -> None:
    """It gives three workers two images each of a batch of four: six have gone by."""
    config = load("demo", ["training.batch_scope=global", "stage2.labelled_batch=5", "stage2.unlabelled_batch=4"])
    assert [images_per_step(config, "stage2", workers) for workers in (1, 2, 3)] == [(5, 4), (5, 4), (5, 6)]
    one_each = load("demo", ["stage2.labelled_batch=5", "stage2.unlabelled_batch=4"])
    assert images_per_step(one_each, "stage2", 3) == (15, 12)
