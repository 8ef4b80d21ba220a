"""The microscope over a trace that is still being written.

The browser gets the events in pieces, as messages, and appends them to those that it has; so it can be scrubbed while
the kernel is busy. When all is over, the view holds the whole trace like any other.
"""

from __future__ import annotations

import time
from collections import deque
from threading import Event as Flag, Lock
from typing import Any

import traitlets
from IPython import get_ipython
from IPython.display import display
from ipywidgets import Box

from ..trace import Sample, Trace
from . import html
from .widget import Microscope, keep

RUNNING = "running"
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS_PER_PIECE = 0.1  # at least; faster steps share a piece, as nobody could tell their pictures apart
WINDOW = 2.0             # seconds over which tokens per second are counted


class LiveMicroscope(Microscope):
    """A trace that goes on, under the microscope; `show` makes and displays one.

    Parameters
    ----------
    trace : Trace
        What has happened so far may be much or little, but not nothing.

    Attributes
    ----------
    live : str
        "running", or how it ended.
    following : bool
        Whether the latest step is shown; not, while someone looks at an earlier one, who is left there in the end.
    stop_asked : threading.Event
        Set by the view's stop button, in a thread of Jupyter's; who runs the engine looks at it between iterations.
    """

    live = traitlets.Unicode(RUNNING).tag(sync=True)
    following = traitlets.Bool(True).tag(sync=True, echo_update=False)

    def __init__(self, trace: Trace) -> None:
        super().__init__(list(trace.events), trace.step)
        self.trace, self.stop_asked = trace, Flag()
        self._began = self._pushed = time.monotonic()
        self._pieces, self._tokens, self._lock = 0, 0, Lock()
        self._pace = deque([(self._began, 0)])
        self._end_mark = Box(layout={"display": "none"})
        self.on_msg(self._on_message)
        # JupyterLab asks that messages be handled in a thread of their own (a subshell), so that the button is heard
        # while a cell runs. ipykernel would rather have them handled where the widget spoke last: in the cell's.
        self.comm._reply_subshell_for = lambda data, asked: asked

    def _on_message(self, _: object, content: dict[str, Any], buffers: object) -> None:
        if content == {"stop": True}:
            self.stop_asked.set()

    def push(self, at_once: bool = False) -> None:
        """Send the browser what has happened since the last time, unless that was just now and may wait."""
        now = time.monotonic()
        with self._lock:
            if not at_once and now - self._pushed < SECONDS_PER_PIECE:
                return
            new = self.trace.events[len(self.events):]
            if not new:
                return
            self.events += new
            self.last, self._pushed = new[-1].step, now
            self._tokens += sum(isinstance(event, Sample) for event in new)
            self.send({"number": self._pieces, "pace": self._tokens_per_second(now)}, [self._encoder.piece(new)])
            self._pieces += 1

    def _tokens_per_second(self, now: float) -> str:
        self._pace.append((now, self._tokens))
        while len(self._pace) > 2 and now - self._pace[0][0] > WINDOW:
            self._pace.popleft()
        then, tokens = self._pace[0]
        return f"{(self._tokens - tokens) / (now - then):.0f} tokens/s"

    def finish(self) -> None:
        """Send the rest, and the whole trace for whoever opens the view from now on; display the still."""
        self.push(at_once=True)
        seconds, how = time.monotonic() - self._began, "stopped" if self.stop_asked.is_set() else "finished"
        self.last, busy = html.check(self.events)
        with self.hold_sync():
            self.data = html.Encoder().piece(self.events)
            self.live = f"{how}: {self._tokens} tokens in {seconds:.1f} s, {self._tokens / seconds:.0f} tokens/s"
            if self.following:
                self.step = busy
        if get_ipython() is None:
            print(self)
        else:  # where the widget is, in JupyterLab, a second one would be too much: there this output is empty
            data, metadata = self._repr_mimebundle_()
            display({**data, **_mime(self._end_mark)}, metadata=metadata, raw=True)

    def close(self) -> None:
        """Take the view out of the notebook."""
        self._end_mark.layout.close()
        self._end_mark.close()
        super().close()


def show(trace: Trace) -> LiveMicroscope:
    """Display a view of a trace that is about to go on; it replaces older ones as `microscope` says.

    The output has no still yet, so that a notebook stores only that of the end.
    """
    view = keep(LiveMicroscope(trace), trace)
    if get_ipython() is not None:
        display(_mime(view), raw=True)
    return view


def _mime(widget: Any) -> dict[str, Any]:
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    return {WIDGET: data[WIDGET]}
