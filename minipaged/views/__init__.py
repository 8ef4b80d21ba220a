"""What the engine does to memory, to be looked at: renderings of one trace. Nothing here knows torch or the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..replay import MemoryState
from ..trace import Event, Trace
from . import compare as _compare
from . import png as _png
from . import svg as _svg
from . import text as _text
from .frame import frame_of
from .html import STILLS, check, events_of
from .reservation import Reservation, reservation_svg, reservation_text
from .walk import Walk
from .walk import text as _walk_text
from .walk_svg import render as _walk_svg

__all__ = ["AttentionWalk", "Microscope", "SideBySide", "View", "attention_walk", "compare_view", "memory_view",
           "microscope", "reservation_view", "sharing_view", "side_by_side", "timeline_view", "walk_view"]


def __getattr__(name: str) -> Any:
    """The widgets bring ipywidgets along, which takes a while; they are imported when first needed."""
    if name in ("Microscope", "SideBySide", "microscope", "side_by_side"):
        from . import widget

        return getattr(widget, name)
    if name in ("AttentionWalk", "attention_walk"):
        from . import walk_widget

        return getattr(walk_widget, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, repr=False)
class View:
    """One picture in two forms; in a notebook the drawing is shown, in a terminal the text.

    A notebook stores the drawing as an SVG and as a PNG: whoever has not trusted it yet is only shown the latter.

    Attributes
    ----------
    text, svg : str
        The same facts; both are the same in every run.
    """

    text: str
    svg: str = field(compare=False)

    def save(self, path: str | Path) -> None:
        """Write the drawing, or, if the name ends in ``.txt``, the text."""
        content = self.text + "\n" if Path(path).suffix == ".txt" else self.svg
        Path(path).write_text(content, encoding="utf-8")

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return _png.bundle(self.text, self.svg)


def memory_view(source: Trace | MemoryState | Iterable[Event], step: int | None = None) -> View:
    """Block tables and physical blocks with the token in each slot, as the paper's Figures 6 and 7 draw them.

    Parameters
    ----------
    source : Trace, MemoryState or events
        A trace that runs or one that was loaded. Of a single state it is not known what its last iteration wrote.
    step : int or None
        After so many iterations; None: now.

    Raises
    ------
    TraceError
        The trace is empty or has no beginning, or the state is of another step.
    """
    frame = frame_of(source if isinstance(source, MemoryState) else events_of(source), step)
    return View(_text.render(frame), _svg.render(frame))


def compare_view(a: Trace | Iterable[Event] | str | Path, b: Trace | Iterable[Event] | str | Path,
                 names: tuple[str, str] = ("left", "right"), step: int | None = None, pane: str = "timeline") -> View:
    """Two traces at the same step, one below the other, under a line that says where they part.

    Parameters
    ----------
    a, b : Trace, events, or the path of a trace file
        Of traces that go on, what has happened so far.
    names : (str, str)
        What stands above each.
    step : int or None
        After so many iterations; None: the first step at which they differ.
    pane : str
        What is shown of each: "memory", "sharing" or "timeline".

    Raises
    ------
    TraceError
        One of them is no whole trace, or there is no such step or view.
    """
    pair = events_of(a), events_of(b)
    _, step = _compare.check_pair(pair, step, pane)
    return View(*_compare.render(pair, names, step, pane))


def sharing_view(source: Trace | Iterable[Event] | str | Path, step: int | None = None) -> View:
    """The block tables as a tree: tables that begin with the same physical blocks have one branch (§4.4, Figure 9).

    With reference counts, what sharing saves (§6.3), and the blocks that the choices at the end of the iteration set
    free.

    Parameters
    ----------
    source : Trace, events, or the path of a trace file
        Of a trace that goes on, what has happened so far.
    step : int or None
        After so many iterations; None: now.

    Raises
    ------
    TraceError
        The file or the events are no whole trace, or have no such step.
    """
    events = events_of(source)
    check(events)
    return View(*STILLS["sharing"](events, step))


def timeline_view(source: Trace | Iterable[Event] | str | Path) -> View:
    """What each request does in each iteration (waits, prefill, decodes, swapped out, recomputed, §4.5), below the
    blocks in use while the model ran.

    Many iterations are put together to columns, and of many requests it is shown how many do what.

    Parameters
    ----------
    source : Trace, events, or the path of a trace file
        Of a trace that goes on, what has happened so far.

    Raises
    ------
    TraceError
        The file or the events are no whole trace.
    """
    events = events_of(source)
    check(events)
    return View(*STILLS["timeline"](events, events[-1].step))


def reservation_view(used: int, future: int, reserved: int, block_size: int, bytes_per_token: int) -> View:
    """One request in a contiguous reservation (Figure 3) beside its blocks, every slot to scale.

    Parameters
    ----------
    used : int
        Tokens whose keys and values are stored.
    future : int
        Tokens that the request will still store.
    reserved : int
        Slots of the reservation, the most that the request could become (§3.1).
    block_size : int
        Tokens per block.
    bytes_per_token : int
        Keys and values of all layers.
    """
    both = Reservation(used, future, reserved, block_size, bytes_per_token)
    return View(reservation_text(both), reservation_svg(both))


def walk_view(walk: Walk, at: int | None = None) -> View:
    """One query's walk over its block table (Eq. 4), as it stands once an entry is read.

    Parameters
    ----------
    walk : Walk
        As `minipaged.walk.walk_of` records it.
    at : int or None
        Index of that entry; None: the last.

    Raises
    ------
    TraceError
        There is no such entry.
    """
    at = walk.check(at)
    return View(_walk_text(walk, at), _walk_svg(walk, at))
