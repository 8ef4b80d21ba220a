"""The microscope: one trace to step through, click and ask, in a notebook.

The browser gets the events once and replays them itself (`static/replay.js`), so scrubbing needs no kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import anywidget
import traitlets
from IPython import get_ipython

from ..errors import TraceError
from ..trace import Event, Trace
from . import compare, html, png

# Where views were made -> in which run, the views, and their source, so that no other object gets its id.
_open: dict[object, tuple[str | None, list[anywidget.AnyWidget], object]] = {}


class Microscope(anywidget.AnyWidget):
    """A trace under the microscope; make one with `microscope`.

    Parameters
    ----------
    events : list[Event]
        A whole trace, as far as it has come, in the order of its steps.
    step, pane : int or None, str
        As in `microscope`.

    Attributes
    ----------
    step : int
        The iteration that is shown. It may be set; a step that the trace does not have is a `TraceError`.
    last : int
        The last one.
    pane : str
        The view that is open. It may be set.
    """

    _esm, _css = html.script(), html.style()  # as text: of a path, anywidget would keep every view alive
    data = traitlets.Bytes().tag(sync=True)
    step = traitlets.Int(0).tag(sync=True, echo_update=False)  # the browser need not be told what it said

    pane = traitlets.Unicode("memory").tag(sync=True, echo_update=False)

    def __init__(self, events: list[Event], step: int | None = None, pane: str = "memory") -> None:
        self.events = events
        self.last, busy = html.check(events)
        self._encoder = html.Encoder()
        super().__init__(data=self._encoder.piece(events), step=busy if step is None else step, pane=pane)

    @traitlets.validate("step")
    def _exists(self, proposal: dict[str, Any]) -> int:
        step = proposal["value"]
        if not 0 <= step <= self.last:
            raise TraceError(f"step {step}: this trace has the steps 0 to {self.last}")
        return step

    @traitlets.validate("pane")
    def _is_drawn(self, proposal: dict[str, Any]) -> str:
        html.check_pane(proposal["value"])
        return proposal["value"]

    def to_html(self, path: str | Path) -> None:
        """Write the view, at this step, as one file that works from the disk without any request."""
        html.save(self.events, path, self.step, self.pane)

    def close(self) -> None:
        """Take the view out of the notebook."""
        self.layout.close()  # a widget of its own, which would stay
        super().close()

    def __repr__(self) -> str:
        return self._still()[0]

    def _still(self) -> tuple[str, str]:
        return html.STILLS[self.pane](self.events, self.step)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**data, **png.bundle(*self._still())}, metadata


def microscope(source: Trace | Iterable[Event] | str | Path, step: int | None = None,
               name: str | None = None, pane: str = "memory") -> Microscope:
    """Look at a trace: step, scrub and jump through it, and ask each block and each sequence.

    A view that this one replaces is closed: that of the same name; without a name, those that an earlier run of the
    same notebook cell made; outside of a notebook, that of the same source.

    Parameters
    ----------
    source : Trace, events, or the path of a trace file
        Of a trace that goes on, what has happened so far.
    step : int or None
        Where to begin; None: the last iteration after which a block was in use.
    name : str or None
        For one view that moves from cell to cell.
    pane : str
        The view that is open at first: "memory", "sharing" or "timeline".

    Raises
    ------
    TraceError
        The file or the events are no whole trace, or have no such step, or there is no such view.
    """
    return keep(Microscope(html.events_of(source), step, pane), source, name)


class SideBySide(Microscope):
    """Two traces, stepped together; make one with `side_by_side`.

    Parameters
    ----------
    pair : (list[Event], list[Event])
        Two whole traces.
    names : (str, str)
        What they are called.
    step, pane : int or None, str
        As in `side_by_side`.
    """

    other = traitlets.Bytes().tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)

    def __init__(self, pair: compare.Pair, names: tuple[str, str], step: int | None, pane: str) -> None:
        self.pair = pair
        last, step = compare.check_pair(pair, step, pane)
        self.set_trait("names", list(names))
        super().__init__(pair[0], min(step, pair[0][-1].step), pane)
        self.last, self.other, self.step = last, html.Encoder().piece(pair[1]), step

    def to_html(self, path: str | Path) -> None:
        """Write both, at this step, as one file that works from the disk without any request."""
        compare.save(self.pair, self.names, path, self.step, self.pane)

    def _still(self) -> tuple[str, str]:
        return compare.render(self.pair, self.names, self.step, self.pane)


def side_by_side(a: Trace | Iterable[Event] | str | Path, b: Trace | Iterable[Event] | str | Path,
                 names: tuple[str, str] = ("left", "right"), step: int | None = None, pane: str = "timeline",
                 ) -> SideBySide:
    """Look at two traces at once: both are stepped together, and the first step at which they differ is marked.

    Views that this one replaces are closed, as `microscope` does.

    Parameters
    ----------
    a, b, names : Trace, events or the path of a trace file; (str, str)
        As in `compare_view`.
    step : int or None
        Where to begin; None: the first step at which they differ.
    pane : str
        The view that is open at first, as in `microscope`.

    Raises
    ------
    TraceError
        One of them is no whole trace, or there is no such step or view.
    """
    return keep(SideBySide((html.events_of(a), html.events_of(b)), names, step, pane), a)


Kept = TypeVar("Kept", bound=anywidget.AnyWidget)


def keep(view: Kept, source: object, name: str | None = None) -> Kept:
    """Remember a new view and close those that it replaces; parameters as in `microscope`."""
    where, run = _place(source, name)
    before, views, _ = _open.pop(where, (None, [], None))
    if before is None or before != run:
        for old in views:
            old.close()
        views = []
    _open[where] = (run, [*views, view], source)
    return view


def _place(source: object, name: str | None) -> tuple[object, str | None]:
    """Where a view is made, and in which run of that cell, if it is one."""
    if name is not None:
        return ("name", name), None
    request = getattr(get_ipython(), "get_parent", dict)()
    if cell := request.get("metadata", {}).get("cellId"):
        return ("cell", cell), request["header"]["msg_id"]
    return ("source", str(source) if isinstance(source, (str, Path)) else id(source)), None
