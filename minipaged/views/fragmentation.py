"""Where memory goes (§3.1): slots of a pool by what they are used for, as the paper's Figures 1 to 3 draw it.

Every use has a colour and its own kind of line, so that colour is never the only cue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence as Items

from ..display import text_table
from ..errors import InvalidConfig
from . import View
from .canvas import FAINT, INK, WIDTH, box, document, fit, path, rect, text, tint

LEFT, RIGHT = 12, WIDTH - 12
ROW, GAP, CELL = 16, 2, 30    # height of a row of slots, between rows, and of a slot that shows its token
LEGEND = 3                    # entries of the legend in a row
COLUMNS = 64                  # characters of a row in the text
MANY = 256                    # pieces beyond which the blocks' edges are drawn, not each piece's own
HALO = {"stroke": "#ffffff", "stroke_width": 3, "paint_order": "stroke"}

# What a slot is used for: colour as in Figure 2 (Okabe and Ito's), dashes of the line, letter in the text, name.
USES = {
    "tokens": (tint("#009E73", 0.8), None, "T", "token states"),
    "reserved": (tint("#E69F00", 0.75), "", "r", "reserved: used later"),
    "internal": (tint("#D55E00", 0.8), "7 4", "i", "internal fragmentation: never used"),
    "rounding": ("#bdbdbd", "1.5 3", "x", "rounded up by the allocator"),
    "free": ("#f2f2f2", None, ".", "free"),
}
ORDER = ("tokens", "reserved", "internal", "rounding")  # within a piece
Piece = tuple[int, int, int, int, int, int]  # owner, first slot, then slots for each of ORDER
Run = tuple[int, int]                        # first slot, and the one behind the last


def fragmentation_view(pools: Mapping[str, Iterable[Piece]], num_slots: int, block_size: int,
                       row_slots: int = 2048) -> View:
    """Several layouts of the same pool below each other, every slot to scale.

    The request that is in all of them and came first has a thick border.

    Parameters
    ----------
    pools : name to pieces
        Each piece is (request, first slot, token states, reserved, internal, rounding); what no piece covers is free.
    num_slots : int
        Of the pool.
    block_size : int
        Slots per block.
    row_slots : int
        Slots in a row of the picture: the longest sequence, so that the largest reservation is one row.

    Raises
    ------
    InvalidConfig
        Pieces overlap or leave the pool.
    """
    sorted_pools = {name: sorted(pieces, key=lambda piece: piece[1]) for name, pieces in pools.items()}
    runs = {name: _runs(pieces, num_slots) for name, pieces in sorted_pools.items()}
    owners = [{piece[0] for piece in pieces} for pieces in sorted_pools.values()]
    marked = min(set.intersection(*owners), default=None) if owners else None
    title = f"one pool of {num_slots // block_size} blocks of {block_size} slots, used in {len(pools)} ways"
    y, body, lines = 92, [text(LEFT, 24, title, font_weight="bold"), *_legend(40, list(USES))], []
    for (name, pieces), held in zip(sorted_pools.items(), owners):
        summary = f"{len(held)} requests, {_total(runs[name]['tokens']) / num_slots:.1%} of the slots hold token states"
        body += [text(LEFT, y + 14, name, font_weight="bold"), text(150, y + 14, summary),
                 *_pool(pieces, runs[name], num_slots, block_size, row_slots, y + 22, marked)]
        y += 22 + -(-num_slots // row_slots) * (ROW + GAP) + 12
        lines += ["", f"{name}: {summary}", *_map(runs[name], num_slots, row_slots)]
    if marked is not None:
        body.append(text(RIGHT, 24, f"thick border: request {marked}", text_anchor="end"))
    rows = [(name, len(held), *(f"{_total(runs[name][use]) / num_slots:.1%}" for use in USES))
            for name, held in zip(runs, owners)]
    key = [f"a character is {_step(row_slots)} slots:", *(f"  {letter} {name}" for *_, letter, name in USES.values())]
    table = text_table(["", "requests", *USES], rows, title)
    return View("\n".join([table, "", *key, *lines]), document(y, title, body))


def bars_view(title: str, uses: Mapping[str, str], rows: Items[tuple[str, Items[float]]], unit: str = "%") -> View:
    """Stacked bars, one per row, as in Figures 1 and 2.

    Parameters
    ----------
    uses : use to name
        Which of `USES` the numbers of a row are, in their order, and what to call them here.
    rows : list of (label, numbers)
        The longest bar takes the full width.
    unit : str
        Behind each number.
    """
    left, y = 190, 44 + 24 * -(-len(uses) // LEGEND)
    scale = (RIGHT - left) / max(sum(values) for _, values in rows)
    body = [text(LEFT, 24, title, font_weight="bold"), *_legend(40, list(uses), uses)]
    for label, values in rows:
        body.append(text(LEFT, y + 19, fit(label, left - LEFT - 8)))
        x = float(left)
        for use, value in zip(uses, values):
            width = value * scale
            body += _bar(use, x, y, width, 28) if value else []
            if width >= 46:
                body.append(text(x + width / 2, y + 18, f"{value:.1f}", text_anchor="middle", **HALO))
            x += width
        y += 38
    table = text_table(["", *uses.values()], [(label, *(f"{v:.1f}{unit}" for v in values)) for label, values in rows],
                       title)
    return View(table, document(y + 6, title, body))


def slots_view(title: str, parts: Items[tuple[str, str, Items[str], int]]) -> View:
    """A row of slots with what is in them, as Figure 3 draws it; long runs are cut short.

    Parameters
    ----------
    parts : list of (use, description, texts, number of slots)
        From left to right; if there are more slots than texts, the rest is one cell with "…".
    """
    body, rows, x, y = [text(LEFT, 24, title, font_weight="bold")], [], float(LEFT), 62
    for number, (use, description, texts, slots) in enumerate(parts, 1):
        cells = [*texts, *(["…"] if slots > len(texts) else [])]
        for index, content in enumerate(cells):
            width = max(24.0, 8.2 * len(content) + 12)
            if x + width > RIGHT:
                x, y = float(LEFT), y + 66
            if index == 0:
                body.append(text(x + 1, y - 6, str(number), fill=FAINT))
            body += [*_bar(use, x, y, width, CELL), text(x + width / 2, y + 19, content, text_anchor="middle", **HALO)]
            x += width
        x += 4
        rows.append((number, description, USES[use][3], slots, " ".join(cells)))
    for number, (_, description, name, slots, _) in enumerate(rows):
        at = y + 62 + 24 * number
        plural = "slot" if slots == 1 else "slots"
        body += [*_bar(parts[number][0], LEFT + 24, at, 22, 16), text(LEFT, at + 13, str(number + 1), fill=FAINT),
                 text(LEFT + 56, at + 13, f"{slots} {plural}: {description} ({name})")]
    header = ["part", "what", "use", "slots", "content"]
    return View(text_table(header, rows, title), document(y + 68 + 24 * len(rows), title, body))


def _runs(pieces: list[Piece], num_slots: int) -> dict[str, list[Run]]:
    """For each use its slots, neighbours joined."""
    found: dict[str, list[Run]] = {use: [] for use in USES}

    def add(use: str, first: int, end: int) -> None:
        """These slots; a run of the same use that ends where they begin grows by them."""
        if found[use] and found[use][-1][1] == first:
            first = found[use].pop()[0]
        if end > first:
            found[use].append((first, end))

    at = 0
    for owner, start, *slots in pieces:
        if start < at or start + sum(slots) > num_slots or min(slots) < 0:
            raise InvalidConfig(f"the piece of request {owner} at slot {start} overlaps another or leaves the pool of "
                                f"{num_slots} slots")
        add("free", at, start)
        at = start
        for use, number in zip(ORDER, slots):
            add(use, at, at + number)
            at += number
    add("free", at, num_slots)
    return found


def _total(runs: list[Run]) -> int:
    return sum(end - first for first, end in runs)


def _rows(run: Run, row_slots: int) -> Iterator[tuple[int, int, int]]:
    """A run as (row, first column, column behind the last), cut at the ends of the rows."""
    first, end = run
    while first < end:
        row, column = divmod(first, row_slots)
        upto = min(end, (row + 1) * row_slots)
        yield row, column, upto - row * row_slots
        first = upto


def _pool(pieces: list[Piece], runs: dict[str, list[Run]], num_slots: int, block_size: int, row_slots: int, top: int,
          marked: int | None) -> list[str]:
    """One layout: the runs, the edges of the pieces, and the numbers of the requests where there is room."""
    scale = (RIGHT - LEFT) / row_slots

    def boxes(run: Run) -> str:
        """A run's outline, a box in each row that it has slots in."""
        return "".join(box(LEFT + a * scale, top + row * (ROW + GAP), (b - a) * scale, ROW)
                       for row, a, b in _rows(run, row_slots))

    body = []
    for use, (fill, dash, *_) in USES.items():
        body += [path("".join(map(boxes, runs[use])), fill=fill)] * bool(runs[use])
        if dash is not None:
            body += _lines([(LEFT + a * scale, top + row * (ROW + GAP) + ROW / 2, (b - a) * scale)
                             for run in runs[use] for row, a, b in _rows(run, row_slots)], dash)
    spans = [(piece[0], (piece[1], piece[1] + sum(piece[2:]))) for piece in pieces]
    if len(pieces) <= MANY:
        body.append(path("".join(boxes(span) for _, span in spans), fill="none", stroke=INK, stroke_width=0.7))
    else:
        body.append(_edges(num_slots, block_size, row_slots, top))
    body.append(path("".join(boxes(span) for owner, span in spans if owner == marked), fill="none", stroke=INK,
                     stroke_width=2))
    body.append('<g stroke="#ffffff" stroke-width="3" paint-order="stroke">')
    for owner, span in spans:
        row, a, b = next(_rows(span, row_slots))
        if (b - a) * scale >= 9 * len(str(owner)) + 8:
            body.append(text(LEFT + a * scale + 4, top + row * (ROW + GAP) + 13, str(owner)))
    return [*body, "</g>"]


def _edges(num_slots: int, block_size: int, row_slots: int, top: int) -> str:
    """The edges of the blocks, thin lines from top to bottom."""
    pitch, scale = ROW + GAP, (RIGHT - LEFT) / row_slots
    columns = [(column, -(-(num_slots - column) // row_slots)) for column in range(0, row_slots + 1, block_size)]
    return path("".join(f"M{LEFT + column * scale:.1f} {top}v{rows * pitch - GAP}" for column, rows in columns if rows > 0),
                fill="none", stroke="#ffffff", stroke_width=0.8)


def _bar(use: str, x: float, y: float, width: float, height: float) -> list[str]:
    """A box in the style of a use."""
    fill, dash, *_ = USES[use]
    below = y + (height / 2 if height <= ROW else height - 5)  # where there is room for a text, below it
    line = [] if dash is None else _lines([(x, below, width)], dash)
    return [rect(x, y, width, height, fill=fill, stroke=INK, stroke_width=0.7), *line]


def _lines(lines: list[tuple[float, float, float]], dash: str) -> list[str]:
    """Lines (x, y, width) in boxes: solid if ``dash`` is empty."""
    kind = {"stroke_dasharray": dash} if dash else {}
    d = "".join(f"M{x:.1f} {y:.1f}h{width:.1f}" for x, y, width in lines)
    return [path(d, fill="none", stroke=INK, stroke_width=1.6, **kind)] if lines else []


def _legend(y: int, uses: list[str], names: Mapping[str, str] | None = None) -> list[str]:
    """Swatches with names, `LEGEND` in a row."""
    body = []
    for i, use in enumerate(uses):
        x, at = LEFT + i % LEGEND * 312, y + i // LEGEND * 24
        body += [*_bar(use, x, at, 32, 16), text(x + 40, at + 13, names[use] if names else USES[use][3])]
    return body


def _map(runs: dict[str, list[Run]], num_slots: int, row_slots: int) -> Iterator[str]:
    """A letter for every so many slots: the use that most of them have."""
    step = _step(row_slots)
    counts: list[dict[str, int]] = [{} for _ in range(-(-num_slots // step))]
    for use, found in runs.items():
        for first, end in found:
            for cell in range(first // step, -(-end // step)):
                counts[cell][use] = counts[cell].get(use, 0) + min(end, (cell + 1) * step) - max(first, cell * step)
    letters = "".join(USES[max(count, key=lambda use: count[use])][2] for count in counts)
    for first in range(0, len(letters), row_slots // step):
        yield "  " + letters[first:first + row_slots // step]


def _step(row_slots: int) -> int:
    """Slots per character of the text."""
    return max(1, row_slots // COLUMNS)
