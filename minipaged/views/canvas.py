"""The few shapes that the SVG renderings are made of. Nothing here has an id or a style sheet: several drawings on one
page, as in a notebook saved as HTML, must not reach into each other."""

from __future__ import annotations

import html

WIDTH = 960        # of every drawing, in its own units
FONT = 14          # at JupyterLab's output width in a window of 1280 px this is still 12 px
INK, FAINT, EMPTY = "#1a1a1a", "#595959", "#ffffff"

# Okabe and Ito's colours for the colour-blind, without black, and without grey, which looks like the pink to some.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
PROMPT, GENERATED = 0.22, 0.6  # how much of a sequence's colour its prompt and its generated tokens have (Figure 7)

# Widths in em of a sans-serif font that runs wide; only used to decide where a text must be cut.
_NARROW, _WIDE = set("iljtfrI.,:;'|!()[]·/ "), set("mwMW@%—…")


def document(height: float, title: str, body: list[str]) -> str:
    """A whole drawing on its own white ground, so that it can be read in a dark theme too.

    Parameters
    ----------
    height : float
        In units of which `WIDTH` are the drawing's width.
    title : str
        What a screen reader says.
    body : list[str]
        SVG elements, escaped already.
    """
    name = escape(title)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(height)}" width="100%" role="img" '
            f'aria-label="{name}" font-family="Helvetica, Arial, sans-serif" font-size="{FONT}" fill="{INK}">'
            f'<title>{name}</title><rect width="100%" height="100%" fill="{EMPTY}"/>{"".join(body)}</svg>')


def text(x: float, y: float, content: str, **attributes: object) -> str:
    """A text with its baseline at ``y``; attributes as in SVG, with _ for -."""
    return f'<text x="{_n(x)}" y="{_n(y)}"{_attributes(attributes)}>{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, **attributes: object) -> str:
    """A rectangle; attributes as in SVG, with _ for -."""
    return f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"{_attributes(attributes)}/>'


def path(d: str, **attributes: object) -> str:
    """A path; attributes as in SVG, with _ for -."""
    return f'<path d="{d}"{_attributes(attributes)}/>'


def box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as a piece of a path: many of one colour make one element."""
    return f"M{_n(x)} {_n(y)}h{_n(width)}v{_n(height)}h{_n(-width)}z"


def escape(content: str) -> str:
    """Text as data, in an element or a quoted attribute; what XML does not allow at all becomes U+FFFD."""
    allowed = "".join(c if c in "\t\n\r" or "\x20" <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c >= "\U00010000"
                      else "\ufffd" for c in content)
    return html.escape(allowed)


def colour_of(seq: int) -> str:
    """The colour of a sequence; its label stands beside it wherever it is used."""
    return PALETTE[seq % len(PALETTE)]


def tint(colour: str, share: float) -> str:
    """A colour mixed with white, so that black text can be read on it."""
    parts = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)


def fit(content: str, width: float, bold: bool = False) -> str:
    """As much of a text as is sure to fit, with an ellipsis for the rest."""
    room = width / FONT / (1.07 if bold else 1)
    if sum(map(_em, content)) <= room:
        return content
    while content and sum(map(_em, content)) + _em("…") > room:
        content = content[:-1]
    return content + "…"


def _em(char: str) -> float:
    if char in _NARROW:
        return 0.36
    if char in _WIDE or char >= "\u2000":
        return 0.95
    return 0.72 if char.isupper() else 0.6


def _n(number: float) -> str:
    """A number as short as it can be written, to a tenth."""
    return f"{number:.1f}".removesuffix(".0")


def _attributes(attributes: dict[str, object]) -> str:
    return "".join(f' {name.rstrip("_").replace("_", "-")}="{value}"' for name, value in attributes.items())
