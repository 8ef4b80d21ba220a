"""One request's memory twice, to scale: reserved in one piece (Figure 3) and in blocks (Figure 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..display import text_table
from .canvas import INK, PALETTE, WIDTH, box, document, path, rect, text, tint

COLUMNS, CELL = 64, 9      # slots per row of the drawing, and the side of a slot
LEFT, TOP, PAGED = 12, 62, 640
USED, FUTURE, NEVER = PALETTE[0], PALETTE[1], "#d9d9d9"
LINES = {"stroke": "#8c8c8c", "stroke_width": 0.5}
Place = Callable[[int], tuple[float, float]]


@dataclass(frozen=True)
class Reservation:
    """A request at one moment of its life.

    Attributes
    ----------
    used : int
        Tokens whose keys and values are stored.
    future : int
        Tokens it will still store before it ends.
    reserved : int
        Slots of its contiguous reservation: the longest it could become (§3.1).
    block_size : int
        Tokens per block.
    bytes_per_token : int
        Of keys and values in all layers (§3: 800 KB for OPT-13B).
    """

    used: int
    future: int
    reserved: int
    block_size: int
    bytes_per_token: int

    @property
    def never(self) -> int:
        """Slots reserved and never used: internal fragmentation (§3.1)."""
        return self.reserved - self.used - self.future

    @property
    def blocks(self) -> int:
        """Blocks that hold the tokens stored so far."""
        return -(-self.used // self.block_size)

    @property
    def paged(self) -> int:
        """Slots of these blocks."""
        return self.blocks * self.block_size


def reservation_text(r: Reservation) -> str:
    """Slots and bytes of both, as a table."""
    def row(name: str, slots: int, used: int, future: int, never: int) -> tuple[object, ...]:
        """A layout with its slots, and those in use, used later and never used."""
        return name, slots, used, future, never, f"{used / slots:.1%}", size_of(slots * r.bytes_per_token)

    return text_table(["", "slots", "used", "used later", "never used", "in use", "memory"], [
        row("contiguous", r.reserved, r.used, r.future, r.never),
        row(f"{r.blocks} blocks of {r.block_size}", r.paged, r.used, *_empty_slots(r)),
    ])


def reservation_svg(r: Reservation) -> str:
    """Every slot as a square of the same size, contiguous on the left, paged on the right."""
    rows = -(-r.reserved // COLUMNS)
    bottom = TOP + rows * CELL
    kinds = [(USED, "used", 0, r.used), (FUTURE, "used later (reserved)", r.used, r.used + r.future),
             (NEVER, "never used (internal fragmentation)", r.used + r.future, r.reserved)]
    body = [text(LEFT, 24, f"Contiguous: {r.reserved} slots, {size_of(r.reserved * r.bytes_per_token)}",
                 font_weight="bold"),
            text(LEFT, 46, f"reserved for one request; {r.used / r.reserved:.1%} in use"),
            *(_squares(colour, first, end, lambda i: (LEFT + i % COLUMNS * CELL, TOP + i // COLUMNS * CELL))
              for colour, _, first, end in kinds),
            text(PAGED, 24, f"Paged: {r.paged} slots, {size_of(r.paged * r.bytes_per_token)}", font_weight="bold"),
            text(PAGED, 46, f"{r.blocks} blocks of {r.block_size}; {r.used / r.paged:.1%} in use")]
    body.append(_grid(r.reserved))
    later, _ = _empty_slots(r)
    for colour, first, end in ((USED, 0, r.used), (FUTURE, r.used, r.used + later), (NEVER, r.used + later, r.paged)):
        body.append(_squares(colour, first, end, lambda i: _paged_place(r, i)))
    body.append(path("".join(box(*_paged_place(r, i), CELL, CELL) for i in range(r.paged)), fill="none", **LINES))
    body.append(text(PAGED, bottom - 78, "Slots of the reservation", font_weight="bold"))
    for i, (colour, name, first, end) in enumerate(kinds):
        y = bottom - 66 + 26 * i
        body += [rect(PAGED, y, 16, 16, fill=_fill(colour), stroke=INK),
                 text(PAGED + 26, y + 13, f"{name}: {end - first}")]
    title = (f"{r.used} tokens in a contiguous reservation of {r.reserved} slots, and in {r.blocks} blocks "
             f"of {r.block_size} slots")
    return document(bottom + 14, title, body)


def size_of(count: int) -> str:
    """Bytes in decimal units, as the paper counts its 1.6 GB (§3)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _empty_slots(r: Reservation) -> tuple[int, int]:
    """Empty slots of the last block: (used later, never used)."""
    later = min(r.paged - r.used, r.future)
    return later, r.paged - r.used - later


def _paged_place(r: Reservation, slot: int) -> tuple[float, float]:
    """Blocks side by side with a gap between them, in as many rows as they take."""
    block, offset = divmod(slot, r.block_size)
    wide = min(r.block_size, 32)
    per_row = max(1, (WIDTH - LEFT - PAGED) // (wide * CELL + CELL))
    column = block % per_row * (wide + 1) + offset % wide
    high = -(-r.block_size // wide) * CELL + CELL
    return PAGED + column * CELL, TOP + block // per_row * high + offset // wide * CELL


def _squares(colour: str, first: int, end: int, place: Place) -> str:
    """Slots ``first`` to ``end - 1`` in one colour, neighbours in a row as one rectangle."""
    runs: list[list[float]] = []
    for x, y in map(place, range(first, end)):
        if runs and runs[-1][1] == y and runs[-1][0] + runs[-1][2] == x:
            runs[-1][2] += CELL
        else:
            runs.append([x, y, CELL])
    return path("".join(box(x, y, width, CELL) for x, y, width in runs), fill=_fill(colour)) if runs else ""


def _grid(slots: int) -> str:
    """The lines between the slots of the reservation: few long ones, as it has thousands of slots."""
    rows, rest = divmod(slots, COLUMNS)
    across = [f"M{LEFT} {TOP + i * CELL}h{CELL * (COLUMNS if i <= rows and rows else rest)}" for i in range(rows + 1)]
    last = [f"M{LEFT} {TOP + (rows + 1) * CELL}h{CELL * rest}"] * (rest > 0)
    down = [f"M{LEFT + i * CELL} {TOP}v{CELL * (rows + (i <= rest and rest > 0))}" for i in range(COLUMNS + 1)]
    return path("".join(across + last + down), fill="none", **LINES)


def _fill(colour: str) -> str:
    return colour if colour == NEVER else tint(colour, 0.85)
