"""Two traces side by side, at the same step of both, and where they part."""

from __future__ import annotations

import re
from collections.abc import Sequence as Rows
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from ..errors import TraceError
from ..trace import Add, Begin, Event, Sample, Start
from . import canvas
from .html import STILLS, check, check_pane, packed, write

Pair = tuple[list[Event], list[Event]]


def first_difference(pair: Pair) -> int | None:
    """The first step in which different things happened to requests and memory; None if there is none.

    Sizes of pools, settings and log probabilities are not compared.
    """
    steps = [[_happened(events, step) for step in range(events[-1].step + 1)] for events in pair]
    return next((step for step, (a, b) in enumerate(zip_longest(*steps)) if a != b), None)


def _happened(events: list[Event], step: int) -> list[Event]:
    here = [event for event in events if event.step == step and not isinstance(event, (Start, Begin))]
    return [replace(event, token_id=0, logprob=0.0) if isinstance(event, Sample) else
            replace(event, token_ids=[]) if isinstance(event, Add) else event for event in here]


def verdict(first: int | None, step: int) -> str:
    """How the two stand to each other at a step."""
    if first is None:
        return "The two traces are the same in every step."
    if step < first:
        return f"The same so far; the first difference is in step {first}."
    return f"The first difference is in this step, {first}." if step == first else f"Different since step {first}."


def check_pair(pair: Pair, step: int | None, pane: str) -> tuple[int, int]:
    """The last step of the longer trace, and the step to open at: the first that differs, or as `html.check` says.

    Raises
    ------
    TraceError
        One of them is no whole trace, or there is no such step or view.
    """
    (last_a, busy), (last_b, _) = check(pair[0]), check(pair[1])
    check_pane(pane)
    last, first = max(last_a, last_b), first_difference(pair)
    if step is not None and not 0 <= step <= last:
        raise TraceError(f"step {step}: these traces have the steps 0 to {last}")
    return last, step if step is not None else busy if first is None else first


def render(pair: Pair, names: Rows[str], step: int, pane: str) -> tuple[str, str]:
    """Both at a step, one below the other, as text and as SVG, under a line that says where they part."""
    said = verdict(first_difference(pair), step)
    stills = [STILLS[pane](events, min(step, events[-1].step)) for events in pair]
    texts = [f"== {name} ==\n{text}" for name, (text, _) in zip(names, stills)]
    body, y = [canvas.text(12, 24, said, font_weight="bold")], 40.0
    for name, (_, drawing) in zip(names, stills):
        height = float(re.search(r'viewBox="0 0 \d+ ([\d.]+)"', drawing)[1])
        body += [canvas.rect(0, y, canvas.WIDTH, 28, fill=canvas.INK),
                 canvas.text(12, y + 19, canvas.fit(name, canvas.WIDTH - 24), fill=canvas.EMPTY, font_weight="bold"),
                 drawing.replace("<svg ", f'<svg y="{y + 28}" height="{height}" ', 1)]
        y += height + 40
    return "\n\n".join([said, *texts]), canvas.document(y, said, body)


def save(pair: Pair, names: Rows[str], path: str | Path, step: int | None = None, pane: str = "timeline") -> None:
    """Write both as one file that works from the disk; parameters and errors as in `side_by_side`."""
    _, step = check_pair(pair, step, pane)
    values = {"step": step, "pane": pane, "names": list(names), "data": packed(pair[0]), "other": packed(pair[1])}
    write(path, " and ".join(names), values, render(pair, names, step, pane)[1])
