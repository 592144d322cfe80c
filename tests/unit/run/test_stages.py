"""A stage that cannot be trained where it is says so once, in a line."""

import torch

from tests.refusals import refused
from threestage.errors import StageFailure
from threestage.run.stages import within_device_memory


def test_a_device_that_is_too_small_ends_the_stage() -> None:
    """Not a lost worker, which Ray would start again to the same end."""
    named = "Tried to allocate 2.00 GiB", "training.accumulate"
    with refused("stage/out-of-memory", *named, error=StageFailure), within_device_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 8 GiB.")
