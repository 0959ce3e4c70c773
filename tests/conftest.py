"""Fixtures for all tests: numbers that are measured are shown beside what was asked, at the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.oracle.shapes import Shape

if TYPE_CHECKING:
    from tests.oracle.base_models import Oracle


@dataclass(frozen=True)
class Number:
    """One measured number and its bound."""

    name: str
    seen: float
    asked: str
    held: bool


_NUMBERS = pytest.StashKey[list[Number]]()


class RecordNumber(Protocol):
    """Record a measured number, show it in the closing table, and fail the test if it is out of bounds."""

    def __call__(
        self, name: str, seen: float, *, at_most: float | None = None, at_least: float | None = None
    ) -> None: ...


@pytest.fixture
def record_number(request: pytest.FixtureRequest) -> RecordNumber:
    numbers = request.config.stash.setdefault(_NUMBERS, [])

    def record(name: str, seen: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        held = (at_most is None or seen <= at_most) and (at_least is None or seen >= at_least)
        bounds = [f"{sign} {bound:g}" for sign, bound in (("<=", at_most), (">=", at_least)) if bound is not None]
        numbers.append(Number(name, seen, " and ".join(bounds), held))
        if not held:
            pytest.fail(f"{name}: {seen:.3g} seen, {' and '.join(bounds)} asked", pytrace=False)

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    numbers = config.stash.get(_NUMBERS, [])
    if not numbers:
        return
    terminalreporter.section("numbers measured")
    width = max(len(number.name) for number in numbers)
    for number in numbers:
        mark = "" if number.held else "   FAILED"
        terminalreporter.line(f"{number.name:<{width}}  {number.seen:>10.3g}   asked {number.asked or '-'}{mark}")


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Oracle]:
    """A random base of a shape, on disk and in transformers; made once per session."""
    from tests.oracle.base_models import build_oracle  # importing transformers takes seconds that most tests save

    built: dict[str, Oracle] = {}

    def get(shape: Shape) -> Oracle:
        if shape.name not in built:
            built[shape.name] = build_oracle(shape, tmp_path_factory.mktemp("bases") / shape.name)
        return built[shape.name]

    return get
