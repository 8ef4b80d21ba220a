"""A drawing in pixels: an SVG is not shown where its notebook is not trusted, as one that was just downloaded."""

from __future__ import annotations

import base64
import io
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from .canvas import WIDTH

COLOURS = 64  # of the palette: tints, and text with smooth edges; a third of the size of all colours


@lru_cache(maxsize=32)
def render(svg: str) -> str:
    """One of our drawings as a PNG file in base64, `WIDTH` pixels wide, the same on every machine.

    The font is that which comes with matplotlib. It has no glyphs for Chinese, Japanese and Korean; the SVG, drawn
    with the fonts of the machine, shows those.
    """
    import resvg_py
    from PIL import Image

    pixels = resvg_py.svg_to_bytes(svg_string=svg, width=WIDTH, skip_system_fonts=True, font_files=_fonts(),
                                   font_family="DejaVu Sans", sans_serif_family="DejaVu Sans")
    image = Image.open(io.BytesIO(pixels)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def bundle(text: str, svg: str) -> dict[str, str]:
    """What a notebook keeps of a picture: its text, its drawing, and that as pixels for who has not trusted it yet."""
    return {"text/plain": text, "image/svg+xml": svg, "image/png": render(svg)}


@cache
def _fonts() -> list[str]:
    """Found without importing matplotlib, which takes a while."""
    folder = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
    return [str(folder / name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")]
