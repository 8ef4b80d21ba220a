"""The paper's own numbers, to be drawn beside ours; `minipaged/data/paper.json` says where each comes from."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

Point = tuple[float, float]


@cache
def _paper() -> dict[str, Any]:
    return json.loads((files("minipaged") / "data" / "paper.json").read_text(encoding="utf-8"))


def curves(figure: str) -> dict[str, list[Point]]:
    """The points of each series of a figure's panel, such as ``fig12a``, read off the drawing."""
    return {name: [(x, y) for x, y in points] for name, points in _paper()["curves"][figure].items()}


def printed(figure: str) -> dict[str, Any]:
    """The numbers that a figure or table prints."""
    return _paper()["printed"][figure]


def next_rate(figure: str, system: str) -> float | None:
    """Requests/s of the point beyond the picture to which a line goes on, as the artifact has it, or None."""
    return _paper()["next rate"].get(figure, {}).get(system)


def crossing(points: list[Point], level: float) -> float | None:
    """Where a rising curve reaches a level, by straight lines between its points, as the paper's figures draw them.

    None if it ends below the level or starts above it.
    """
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in zip(ordered, ordered[1:]):
        if y0 < level <= y1:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None
