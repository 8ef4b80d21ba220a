"""A trace as the browser gets it, and the microscope as one HTML file that loads nothing, from nowhere."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..errors import TraceError
from ..replay import states
from ..trace import Add, Event, Sample, Start, Trace, load
from . import sharing, sharing_svg, svg, text, timeline
from .frame import frame_of, visible
from .page import page

_STATIC = Path(__file__).parent / "static"

# The views behind the tabs: what each shows of a trace after a step where nothing can run, as (text, SVG).
STILLS: dict[str, Callable[[list[Event], int | None], tuple[str, str]]] = {
    "memory": lambda events, step: (text.render(frame_of(events, step)), svg.render(frame_of(events, step))),
    "sharing": lambda events, step: (sharing.render(tree := sharing.sharing_of(events, step)), sharing_svg.render(tree)),
    "timeline": lambda events, step: timeline.render(timeline.timeline_of(events)),
}

@cache
def script() -> str:
    """The JavaScript of the view, one ES module."""
    fixed = f"const FIXED = {json.dumps((_STATIC / 'microscope.html').read_text('utf-8'))};\n"
    parts = ("dom.js", "replay.js", "live.js", "panes.js", "sharing.js", "timeline.js", "compare.js", "microscope.js")
    return "\n".join([fixed, *((_STATIC / name).read_text("utf-8") for name in parts)])


@cache
def style() -> str:
    """The style sheet of the view; all of its names begin with ``mp``."""
    return "".join((_STATIC / name).read_text("utf-8") for name in ("microscope.css", "panes.css"))


def events_of(source: Trace | Iterable[Event] | str | Path) -> list[Event]:
    """The events of a trace, as it is now, of a list or of a file, iteration by iteration.

    Raises
    ------
    TraceError
        The file is no whole trace, or there are two traces, or none.
    """
    if source is None:
        raise TraceError("there is no trace: make the model with LLM(..., trace=Trace())")
    events = load(source) if isinstance(source, (str, Path)) else source.events if isinstance(source, Trace) else source
    events = list(events)
    for number, (before, event) in enumerate(pairwise(events), 2):
        if isinstance(event, Start) and event.step < before.step:
            raise TraceError(f"event {number}: another trace begins here; give one at a time")
    return sorted(events, key=attrgetter("step"))


def check(events: list[Event]) -> tuple[int, int]:
    """Replay all events once.

    Returns
    -------
    (last, busy) : the last step, and the last after which a block was in use, or the last if there is none

    Raises
    ------
    TraceError
        There is no event, or one that cannot follow those before it.
    """
    held = {event.step: bool(state.tables) for event, state in states(events)}
    if not held:
        raise TraceError("an empty trace has no state; run a request first")
    return max(held), max((step for step, busy in held.items() if busy), default=max(held))


def check_pane(pane: str) -> None:
    """Refuse a view that there is not.

    Raises
    ------
    TraceError
        With those that there are.
    """
    if pane not in STILLS:
        raise TraceError(f"there is no view {pane!r}; choose one of {', '.join(STILLS)}")


class Encoder:
    """Turns events into what `static/replay.js` reads, piece by piece as they come.

    A piece is ``{"texts": […], "first": n, "steps": [[[kind, …], …], …]}``, compressed. ``steps[i]`` are those of
    iteration ``n + i``, their fields in the order of the class, without the step. Token texts are made visible and
    listed once, in the piece that first has them; `Add` and `Sample` name them by number. What no picture shows, such
    as token ids, is left out.
    """

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}

    def piece(self, events: Iterable[Event]) -> bytes:
        """The events that follow those of the last piece."""
        known, first, steps = len(self._texts), None, []
        for event in events:
            first = event.step if first is None else first
            while first + len(steps) <= event.step:
                steps.append([])
            if event.kind != "begin":
                steps[event.step - first].append(self._fields(event))
        piece = {"texts": list(self._texts)[known:], "first": first or 0, "steps": steps}
        packed = json.dumps(piece, ensure_ascii=False, separators=(",", ":"))
        return zlib.compress(packed.encode("utf-8"), 9)

    def _fields(self, event: Event) -> list[Any]:
        match event:
            case Start():
                fields = [event.block_size, event.num_blocks, event.num_host_blocks, event.model, event.bytes_per_token]
            case Add():
                fields = [event.request, event.seq, [self._number(text) for text in event.texts]]
            case Sample():
                fields = [event.seq, self._number(event.text)]
            case _:
                fields = [getattr(event, field.name) for field in dataclasses.fields(event) if field.name != "step"]
        return [event.kind, *fields]

    def _number(self, text: str) -> int:
        return self._texts.setdefault(visible(text), len(self._texts))


def packed(events: list[Event]) -> bytes:
    """A whole trace, in one piece."""
    return Encoder().piece(events)


def save(source: Trace | Iterable[Event] | str | Path, path: str | Path, step: int | None = None,
         pane: str = "memory") -> None:
    """Write the microscope as one file that works from the disk; parameters and errors as in `microscope`."""
    events = events_of(source)
    last, busy = check(events)
    check_pane(pane)
    if step is not None and not 0 <= step <= last:
        raise TraceError(f"step {step}: this trace has the steps 0 to {last}")
    step = busy if step is None else step
    values = {"step": step, "pane": pane, "data": packed(events)}
    write(path, events[0].model, values, STILLS[pane](events, step)[1])


def write(path: str | Path, title: str, values: dict[str, Any], still: str) -> None:
    """Write the file; parameters as of `page`."""
    whole = page(f"{title} under the microscope", values, still, script(), style())
    Path(path).write_text(whole, encoding="utf-8")
