"""Watching the engine at work: after each iteration a live view is told, slowed down for, and asked whether to stop."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from .errors import InvalidParams, NotIdle
from .trace import NO_TRACE, Trace

if TYPE_CHECKING:
    from .llm import LLM
    from .views.live import LiveMicroscope


class Watch:
    """A context manager: a live view of an LLM's engine, until the block ends.

    Parameters
    ----------
    llm : LLM
        If nothing records what its engine does, a trace does so meanwhile.
    steps_per_second : float or None
        As in `LLM.watch`, as are the errors.
    """

    def __init__(self, llm: "LLM", steps_per_second: float | None = None) -> None:
        if steps_per_second is not None and not (
                isinstance(steps_per_second, (int, float)) and 0 < steps_per_second < math.inf):
            raise InvalidParams(f"steps_per_second is {steps_per_second!r}; give a positive number, or None")
        self.llm, self.engine = llm, llm.engine
        self._seconds = 0.0 if steps_per_second is None else 1 / steps_per_second

    def __enter__(self) -> "LiveMicroscope":
        from .views import live  # brings Jupyter along, which takes a while

        if self.llm.watcher is not None:
            raise NotIdle("this LLM is watched already; leave that `with` block first")
        self._before = self.engine.manager.trace
        if self._before is NO_TRACE:
            self.engine.record(Trace())
        try:
            self.view = live.show(self.engine.manager.trace)
        except BaseException:
            self.engine.manager.trace = self._before
            raise
        self._stepped = time.monotonic()
        self.llm.watcher = self
        return self.view

    def after_step(self) -> None:
        """Draw; wait, if it goes too fast; end all requests, if the stop button was pressed."""
        scheduler, stop = self.engine.scheduler, self.view.stop_asked
        self.view.push(at_once=not scheduler.has_unfinished)
        stop.wait(max(0.0, self._stepped + self._seconds - time.monotonic()))
        self._stepped = time.monotonic()
        if stop.is_set():
            self.engine.abort(*scheduler.unfinished)

    def __exit__(self, *exc: object) -> None:
        self.llm.watcher, self.engine.manager.trace = None, self._before
        self.view.finish()
