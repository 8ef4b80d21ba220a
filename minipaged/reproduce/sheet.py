"""What a figure consists of: panels to draw, and the numbers in which ours and the paper's are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..display import text_table
from .paper import Point

Row = tuple[str, str, object, float | None, float | None, str]  # panel, series, x, ours, the paper's, basis
GIVEN = "given: from the paper"
COUNTED = "predicted: counted by the block manager"


class Job(NamedTuple):
    """A call that another process may make; its result can be pickled, and is the same every time."""

    call: Callable[..., Any]
    args: tuple[Any, ...] = ()


class Number(NamedTuple):
    """One number that is compared.

    Attributes
    ----------
    paper : float, (low, high), or None
        A range where the paper gives no more; None where it says nothing.
    basis : str
        Whether ours was predicted, or fitted, or given, and to what.
    """

    what: str
    ours: float | None
    paper: float | tuple[float, float] | None
    basis: str

    @property
    def ratio(self) -> str:
        """Ours to the paper's, or how ours lies to the paper's range."""
        if self.ours is None or self.paper is None:
            return "-"
        if isinstance(self.paper, tuple):
            return "inside" if self.paper[0] <= self.ours <= self.paper[1] else "outside"
        return f"{self.ours / self.paper:.2f}" if self.paper else "-"


@dataclass(frozen=True)
class Curves:
    """Lines: ours drawn, the paper's points marked, or only every so many-th of them if there are too many."""

    title: str
    x: str
    y: str
    ours: Mapping[str, list[Point]]
    paper: Mapping[str, list[Point]]
    basis: str
    top: float | None = None
    log: bool = False
    mark_every: int = 1

    def rows(self) -> Iterator[Row]:
        """The points, for the CSV file."""
        for series in [*self.ours, *(name for name in self.paper if name not in self.ours)]:
            ours, paper = dict(self.ours.get(series, [])), dict(self.paper.get(series, []))
            for x in sorted(ours | paper):
                yield self.title, series, x, ours.get(x), paper.get(x), self.basis


@dataclass(frozen=True)
class Bars:
    """Pairs of bars: ours, and the paper's number or range."""

    title: str
    y: str
    numbers: Mapping[str, Number]

    def rows(self) -> Iterator[Row]:
        """The bars, for the CSV file; a range is two rows."""
        for name, number in self.numbers.items():
            ends = number.paper if isinstance(number.paper, tuple) else (number.paper,)
            for end in ends:
                yield self.title, name, "", number.ours, end, number.basis


@dataclass(frozen=True)
class Stacks:
    """Bars made of parts: each label has our parts and the paper's."""

    title: str
    unit: str
    parts: tuple[str, ...]
    bars: Mapping[str, tuple[tuple[float, ...] | None, tuple[float, ...] | None]]
    basis: str

    def rows(self) -> Iterator[Row]:
        """The parts, for the CSV file."""
        for label, both in self.bars.items():
            ours, paper = (values or (None,) * len(self.parts) for values in both)
            for part, mine, theirs in zip(self.parts, ours, paper):
                yield self.title, label, part, mine, theirs, self.basis


@dataclass(frozen=True)
class Tables:
    """Block tables of sequences, and how many readers each physical block has; `paper` are the paper's tables."""

    title: str
    ours: Mapping[str, list[int]]
    readers: Mapping[int, int]
    paper: Mapping[str, list[int]]
    basis: str

    def rows(self) -> Iterator[Row]:
        """The entries, for the CSV file."""
        for name, blocks in self.ours.items():
            for logical, (mine, theirs) in enumerate(zip(blocks, self.paper[name], strict=True)):
                yield self.title, name, logical, mine, theirs, self.basis


Panel = Curves | Bars | Stacks | Tables


@dataclass
class Sheet:
    """A whole figure.

    Attributes
    ----------
    notes : list[str]
        What must be known to read it; printed below the numbers.
    """

    title: str
    panels: list[Panel]
    numbers: list[Number] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        shown = [(n.what, _show(n.ours), _show(n.paper), n.ratio, n.basis) for n in self.numbers]
        table = text_table(["", "ours", "paper", "ours/paper", "how we have it"], shown, self.title)
        return "\n".join([table, *self.notes])


class Figure(NamedTuple):
    """How a figure is made.

    Attributes
    ----------
    about : str
        One line.
    plan : function of minutes
        The jobs by name; minutes are those of the simulated arrivals, for figures that have any.
    sheet : function of what the jobs returned
        By name; the results of jobs that were not done are missing.
    """

    about: str
    plan: Callable[[float], dict[Any, Job]]
    sheet: Callable[[dict[Any, Any]], Sheet]


def _show(value: float | tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return f"{value[0]:g} to {value[1]:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
