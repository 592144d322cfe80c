"""What is told of an error that comes from another process."""

import pickle

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from tests.refusals import refused
from tests.store_away import busy
from threestage.errors import CodedError, InputError, StageFailure, StoreAway
from threestage.ray_backend.failures import (
    alive_ids,
    cause_of,
    code_of,
    first_line,
    last_line,
    to_stage_failure,
    to_user_error,
    translate_ray_errors,
)


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def in_a_task(cause: Exception) -> RayTaskError:
    return RayTaskError("task", "Traceback …", cause)


@pytest.mark.parametrize("own", [InputError("data.root: fix it"), StageFailure("stage1: nan")])
def test_our_own_error_is_the_cause_even_where_another_one_led_to_it(own: Exception) -> None:
    error = chained(ValueError("Ray's"), in_a_task(chained(own, KeyError("inside"))))
    assert cause_of(error) is own
    assert cause_of(chained(ValueError("Ray Data's"), in_a_task(own).as_instanceof_cause())) is own


def test_without_one_of_ours_it_is_the_innermost() -> None:
    inner = OSError("503 Slow Down")
    assert cause_of(in_a_task(chained(RuntimeError("outer"), inner))) is inner
    assert cause_of(inner) is inner


def test_a_line_of_many() -> None:
    error = in_a_task(ValueError("Traceback:\n  File …\nValueError: no such class\n"))
    assert last_line(error) == "ValueError: no such class" and first_line(error) == "Traceback:"
    assert first_line(WorkerCrashedError()).startswith("The worker died unexpectedly")
    assert last_line(in_a_task(ValueError())) == first_line(ValueError(" ")) == "ValueError"


@pytest.mark.parametrize("kind", [InputError, StageFailure])
def test_what_ray_data_appends_is_not_told(kind: type[CodedError]) -> None:
    own = kind("a.jpg: fix it", "image/bad")
    own.args = (f"{own}\nFailed to map after 1/1 attempts\nTo change retry attempts …",)
    found = to_user_error(in_a_task(pickle.loads(pickle.dumps(own))).as_instanceof_cause(), "predict: ")
    assert type(found) is kind and found.code == "image/bad"
    assert found.message in ("a.jpg: fix it", "predict: a.jpg: fix it; the same command continues")


def test_a_store_that_is_away_is_still_that_for_the_driver() -> None:
    """The driver waits for it, and continues."""
    with pytest.raises(StoreAway, match="overloaded or down") as caught, translate_ray_errors():
        raise busy()
    found = to_stage_failure(in_a_task(caught.value), "pseudo-masks: away", "ray/task-failed")
    assert type(found) is StoreAway and found.code == "storage/busy"
    with refused("ray/task-failed", "Is a directory", error=StageFailure), translate_ray_errors():
        raise OSError(21, "Is a directory")


def test_a_line_of_one_of_ours_has_no_code() -> None:
    """It becomes a part of another line, which has one."""
    own = StageFailure("stage1: nan; lower the learning rate", "stage/diverged")
    assert first_line(own) == last_line(own) == own.message and code_of(own) == "stage/diverged"
    trace = in_a_task(RuntimeError(f"Traceback:\n  File …\nthreestage.errors.StageFailure: {own}"))
    assert last_line(trace) == f"threestage.errors.StageFailure: {own.message}" and code_of(trace) is None


def test_what_else_fails_in_a_task_is_a_failure_with_a_code() -> None:
    with refused("ray/task-failed", "KeyError", "inside", error=StageFailure), translate_ray_errors():
        raise KeyError("inside")
    with refused("data/no-files", "photos"), translate_ray_errors():
        raise InputError("photos: no image", "data/no-files")
    assert to_user_error(WorkerCrashedError()).code == "ray/task-failed"


def test_nodes_that_are_gone_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}])
    assert alive_ids() == {"a"}
