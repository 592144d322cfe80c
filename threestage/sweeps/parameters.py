"""One searched key of a space: its range or its choices, and when it is there at all."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, model_validator

from threestage.errors import InputError
from threestage.settings import Settings

Number = int | FiniteFloat
INTERIOR = 0.3819660112501051  # of a range: a point that is whole by accident only
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _with_numbers(value: Any) -> Any:
    """YAML reads 1e-3 as text."""
    if isinstance(value, list | tuple):
        return [_with_numbers(part) for part in value]
    if not isinstance(value, str | int | float | dict | None):
        raise InputError(
            f"{value} is a {type(value).__name__}: give numbers, texts, true or false, null, or lists of them",
            "sweep/parameter",
        )
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


Values = Annotated[tuple[Any, ...], BeforeValidator(_with_numbers)]


class Parameter(Settings):
    """Exactly one of `uniform`, `loguniform` and `choice`."""

    uniform: tuple[Number, Number] | None = Field(None, description="whole numbers where bounds and step all are")
    loguniform: tuple[FiniteFloat, FiniteFloat] | None = None
    choice: Values | None = None
    step: Number | None = Field(None, description="of uniform: only its first bound plus a multiple of this")
    when: dict[str, Values] = Field(
        {}, description="only in trials where each of these choices has one of these values"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if sum(given is not None for given in (self.uniform, self.loguniform, self.choice)) != 1:
            raise InputError("give exactly one of uniform, loguniform and choice", "sweep/parameter")
        if self.choice is not None:
            labels = [label(value) for value in self.choice]
            if not labels:
                raise InputError("choice=[]: is empty; give values", "sweep/parameter")
            if twice := [one for one in labels if labels.count(one) > 1]:
                raise InputError(f"choice: has {twice[0]} twice; take one out", "sweep/parameter")
        else:
            self._check_range()
        if self.step is not None:
            self._check_step(self.step)
        return self

    def _check_range(self) -> None:
        low, high = self.bounds
        if low >= high:
            raise InputError(
                f"{self.kind}=[{low}, {high}]: is empty; the first bound must be below the second", "sweep/parameter"
            )
        if self.loguniform is not None and low <= 0:
            raise InputError(f"loguniform=[{low}, {high}]: both bounds must be above 0", "sweep/parameter")

    def _check_step(self, step: float) -> None:
        if self.uniform is None:
            raise InputError(f"step={step}: belongs to uniform, not to {self.kind}; take it out", "sweep/parameter")
        low, high = self.bounds
        if not 0 < step <= high - low:
            raise InputError(f"step={step}: must be above 0 and fit into uniform=[{low}, {high}]", "sweep/parameter")

    @property
    def kind(self) -> Literal["uniform", "loguniform", "choice"]:
        if self.choice is not None:
            return "choice"
        return "uniform" if self.uniform is not None else "loguniform"

    @property
    def bounds(self) -> tuple[float, float]:
        """As written, of a range."""
        found = self.uniform or self.loguniform
        assert found is not None
        return found

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.uniform is not None and all(isinstance(part, int) for part in (*self.uniform, self.step or 0))

    @property
    def last(self) -> float:
        """The largest value of a range: with a step it may lie below the bound."""
        low, high = self.bounds
        return high if self.step is None else self._at(int((_decimal(high) - _decimal(low)) / _decimal(self.step)))

    def snapped(self, value: float) -> float:
        """The value of the range that is nearest to `value`, free of rounding noise."""
        if self.step is None:
            return int(value) if self.whole else float(value)
        return self._at(round((value - self.bounds[0]) / self.step))

    def values(self) -> Iterator[Any]:
        """Every value, in order; only for choices and ranges with a step."""
        if self.choice is not None:
            yield from self.choice
            return
        assert self.step is not None
        for k in range(round((self.last - self.bounds[0]) / self.step) + 1):
            yield self._at(k)

    def samples(self) -> list[Any]:
        """Values by which the others can be judged: all choices; the ends of a range, and one between."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.bounds
        between = low + INTERIOR * (high - low) if self.step is None else self._at(1)
        return [self.snapped(low), self.snapped(between), self.last]

    def _at(self, k: int) -> float:
        """The value k steps above the first bound."""
        assert self.step is not None
        exact = _decimal(self.bounds[0]) + k * _decimal(self.step)
        return int(exact) if self.whole else float(exact)


def label(value: Any) -> str:
    """A value as JSON text: equal texts are equal values."""
    return json.dumps(value, sort_keys=True)


def _decimal(value: float) -> Decimal:
    return Decimal(str(value))
