"""The attention walk to step through: in a notebook, and as one HTML file that loads nothing, from nowhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from . import png
from .frame import visible
from .html import style
from .page import page
from .walk import Walk, text, title, verdict
from .walk_svg import render
from .widget import keep

_STATIC = Path(__file__).parent / "static"

@cache
def script() -> str:
    """The JavaScript of the view, one ES module."""
    fixed, dom, view = ((_STATIC / name).read_text("utf-8") for name in ("walk.html", "dom.js", "walk.js"))
    return f"const FIXED = {json.dumps(fixed)};\n\n{dom}\n{view}"


@cache
def styles() -> str:
    """The style sheet: the microscope's, and what is this view's own."""
    return style() + (_STATIC / "walk.css").read_text("utf-8")


def encode(walk: Walk) -> dict[str, Any]:
    """A walk as `static/walk.js` reads it: token texts made visible, numbers to six digits."""
    def short(value: float) -> float:
        """A number to six digits."""
        return float(f"{value:.6g}")

    entries = [dict(block=entry.block, tokens=list(map(visible, entry.tokens)), scores=list(map(short, entry.scores)),
                    largest=short(entry.largest), shrink=short(entry.shrink), total=short(entry.total),
                    weighted=list(map(short, entry.weighted))) for entry in walk.entries]
    return dict(title=title(walk), verdict=verdict(walk), size=walk.block_size, later=walk.later, entries=entries)


class AttentionWalk(anywidget.AnyWidget):
    """A walk to step through; make one with `attention_walk`.

    Attributes
    ----------
    record : Walk
        What is shown.
    at : int
        The entry of the block table that is read. It may be set; one that is not there is a `TraceError`.
    """

    _esm, _css = script(), styles()  # as text: of a path, anywidget would keep every view alive
    walk = traitlets.Dict().tag(sync=True)
    at = traitlets.Int(0).tag(sync=True, echo_update=False)  # the browser need not be told what it said

    def __init__(self, record: Walk, at: int | None = None) -> None:
        self.record = record
        super().__init__(walk=encode(record), at=record.check(at))

    @traitlets.validate("at")
    def _exists(self, proposal: dict[str, Any]) -> int:
        return self.record.check(proposal["value"])

    def to_html(self, path: str | Path) -> None:
        """Write the view, at this entry, as one file that works from the disk without any request."""
        whole = page(f"Attention walk: {title(self.record)}", {"walk": self.walk, "at": self.at},
                     render(self.record, self.at), script(), styles())
        Path(path).write_text(whole, encoding="utf-8")

    def close(self) -> None:
        """Take the view out of the notebook."""
        self.layout.close()  # a widget of its own, which would stay
        super().close()

    def __repr__(self) -> str:
        return text(self.record, self.at)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**data, **png.bundle(repr(self), render(self.record, self.at))}, metadata


def attention_walk(record: Walk, at: int | None = None, name: str | None = None) -> AttentionWalk:
    """Step through a walk that `minipaged.walk.walk_of` recorded.

    Views that this one replaces are closed, as in `views.microscope`.

    Parameters
    ----------
    at : int or None
        The entry to begin at; None: the last.
    name : str or None
        For one view that moves from cell to cell.

    Raises
    ------
    TraceError
        There is no such entry.
    """
    return keep(AttentionWalk(record, at), record, name)
