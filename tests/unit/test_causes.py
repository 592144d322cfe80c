"""What is told of an error that comes from another process."""

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from threestage.errors import InputError, StageFailure
from threestage.on_ray.causes import cause_of, first_line, last_line, ours


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def in_a_task(cause: Exception) -> RayTaskError:
    return RayTaskError("task", "Traceback …", cause)


@pytest.mark.parametrize("own", [InputError("data.root: mend it"), StageFailure("stage1: nan")])
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
def test_what_ray_data_appends_is_not_told(kind: type[Exception]) -> None:
    error = in_a_task(
        kind("a.jpg: mend it\nFailed to map after 1/1 attempts\nTo change retry attempts …")
    ).as_instanceof_cause()
    told = ours(error, "predict: ")
    assert type(told) is kind and str(told) in ("a.jpg: mend it", "predict: a.jpg: mend it; the same command goes on")
