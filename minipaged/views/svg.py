"""The memory as a drawing: the paper's Figures 6 and 7, filled in by the engine."""

from __future__ import annotations

from .canvas import (EMPTY, FAINT, FONT, GENERATED, INK, PROMPT, WIDTH, box, colour_of, document, fit, path, rect, text,
                     tint)
from .frame import SLOTS_PER_ROW, Frame, Slot, is_small, labels, physical_blocks, slots_of
from .text import MAX_SEQS, NO_TABLE, describe, elided, map_rows, pools, readers_of, summary, waiting_names

# Columns of the detailed drawing, from the left: logical blocks, block table, links, physical blocks, readers.
SLOT, ROW, GAP = 76, 26, 7
LOGICAL, TABLE, FILLED, TABLE_END = 46, 358, 418, 474
PHYSICAL, READERS = 542, 542 + 4 * SLOT + 8


def render(frame: Frame) -> str:
    """Logical blocks, block tables and physical blocks with the token in each slot; of a big pool, a map."""
    state = frame.state
    detailed = is_small(state)
    if detailed:
        left, rows, bottom = _sequences(frame, 62)
        right, end = _pools(frame, rows)
        body, end = left + right, max(bottom, end)
    else:
        body, end = [], 22.0
        for host in pools(frame):
            cells, end = _map(frame, host, end + 32)
            body += cells
        lines, end = _table_list(frame, end + 30)
        body += lines
    body.insert(0, text(12, 24, summary(frame), font_weight="bold"))
    if queue := waiting_names(frame):
        body.append(text(12, end + 20, fit("waiting: " + ", ".join(queue), WIDTH - 24)))
        end += 24
    legend, end = _legend(end + 12, detailed, bool(frame.written))
    return document(end, _title(frame), body + legend)


def _title(frame: Frame) -> str:
    """For a screen reader: the summary and the block tables."""
    tables = list(frame.state.tables.items())[:MAX_SEQS]
    names = labels(frame.state)
    return "; ".join([summary(frame), *(f"sequence {names[seq]} in blocks {elided(table)}" for seq, table in tables)])


# ---- every slot ------------------------------------------------------------------------------------------------------

def _sequences(frame: Frame, y: float) -> tuple[list[str], dict[tuple[int, int], float], float]:
    """The left half: logical blocks and block tables.

    Returns
    -------
    (elements, rows, y) : rows maps (sequence, logical block) to the middle of its row, where its link begins
    """
    state, elements, rows = frame.state, [], {}
    if not state.tables:
        return [text(24, y, NO_TABLE, fill=FAINT)], rows, y
    for seq, table in state.tables.items():
        colour, top = colour_of(seq), y
        elements += [rect(12, top - 14, 6, 18, fill=colour, stroke=INK, stroke_width=0.5),
                     text(24, top, fit(describe(frame, seq), TABLE_END - 24), font_weight="bold")]
        y += 24
        elements += [text(LOGICAL, y, "logical blocks", fill=FAINT), text(TABLE, y, "physical", fill=FAINT),
                     text(FILLED + 4, y, "# filled", fill=FAINT)]
        y += 8
        for logical, block in enumerate(table):
            slots = slots_of(frame, seq, logical)
            height = _height(slots)
            middle = rows[seq, logical] = y + height / 2
            elements += [text(LOGICAL - 8, middle + 5, str(logical), text_anchor="end"),
                         *_slots(slots, LOGICAL, y, colour),
                         rect(TABLE, y, FILLED - TABLE, height, fill=EMPTY, stroke=INK),
                         rect(FILLED, y, TABLE_END - FILLED, height, fill=EMPTY, stroke=INK),
                         text((TABLE + FILLED) / 2, middle + 5, str(block), text_anchor="middle", font_weight="bold"),
                         text((FILLED + TABLE_END) / 2, middle + 5, str(state.filled(seq, logical)),
                              text_anchor="middle")]
            y += height + GAP
        y += 24
    return elements, rows, y - 24


def _pools(frame: Frame, rows: dict[tuple[int, int], float]) -> tuple[list[str], float]:
    """The right half: physical blocks, and the link from each entry of a block table to its block."""
    elements, y = [], 62.0
    for host in pools(frame):
        elements.append(text(PHYSICAL, y, "host blocks" if host else "physical blocks", font_weight="bold"))
        y += 12
        for block in physical_blocks(frame, host):
            height = _height(block.slots)
            colour = colour_of(block.readers[0][0]) if block.readers else FAINT
            elements += [text(PHYSICAL - 8, y + height / 2 + 5, str(block.number), text_anchor="end",
                              font_weight="bold" if block.readers else "normal"),
                         *_slots(block.slots, PHYSICAL, y, colour),
                         text(READERS, y + height / 2 + 5, fit(readers_of(frame, block), WIDTH - READERS - 4),
                              fill=INK if block.readers else FAINT)]
            elements += [_link(rows[reader], y + height / 2, colour_of(reader[0])) for reader in block.readers]
            y += height + GAP
        y += 28
    return elements, y - 28


def _slots(slots: list[Slot], x: float, y: float, colour: str) -> list[str]:
    """One block: its slots in rows of four, what the last iteration wrote with a thick border, and a frame."""
    fills = {"prompt": tint(colour, PROMPT), "generated": tint(colour, GENERATED), "empty": EMPTY}
    places = [(x + SLOT * (i % SLOTS_PER_ROW), y + ROW * (i // SLOTS_PER_ROW), slot) for i, slot in enumerate(slots)]
    elements = []
    for kind, fill in fills.items():
        if d := "".join(box(left, top, SLOT, ROW) for left, top, slot in places if slot.kind == kind):
            elements.append(path(d, fill=fill, stroke="#8c8c8c"))
    if d := "".join(box(left + 1.5, top + 1.5, SLOT - 3, ROW - 3) for left, top, slot in places if slot.new):
        elements.append(path(d, fill="none", stroke=INK, stroke_width=2.5))
    columns = min(len(slots), SLOTS_PER_ROW)
    if len(slots) % columns == 0:  # else the last row is shorter and the slots' own borders must do
        elements.append(rect(x, y, SLOT * columns, _height(slots), fill="none", stroke=INK))
    for left, top, slot in places:
        if slot.text:
            bold = slot.kind == "generated"
            elements.append(text(left + SLOT / 2, top + 18, fit(slot.text, SLOT - 8, bold), text_anchor="middle",
                                 **({"font_weight": "bold"} if bold else {})))
    return elements


def _height(slots: list[Slot]) -> float:
    return ROW * -(-len(slots) // SLOTS_PER_ROW)


def _link(y_from: float, y_to: float, colour: str) -> str:
    """From a block table's entry to the physical block, ending in an arrow."""
    start, end = TABLE_END, PHYSICAL - 28
    bend = (end - start) / 2
    return path(f"M{start} {y_from:.0f}C{start + bend:.0f} {y_from:.0f} {end - bend:.0f} {y_to:.0f} {end} {y_to:.0f}"
                f"m-6 -4l6 4l-6 4", fill="none", stroke=colour, stroke_width=2)


# ---- one cell per block ----------------------------------------------------------------------------------------------

def _table_list(frame: Frame, y: float) -> tuple[list[str], float]:
    """Each block table as two lines of text."""
    elements, seqs = [], list(frame.state.tables)
    for seq in seqs[:MAX_SEQS]:
        elements += [rect(12, y - 13, 14, 14, fill=colour_of(seq), stroke=INK),
                     text(34, y, fit(describe(frame, seq), WIDTH - 46), font_weight="bold"),
                     text(34, y + 19, fit(elided(frame.state.tables[seq]), WIDTH - 46))]
        y += 44
    if len(seqs) > MAX_SEQS:
        elements.append(text(34, y, f"… and {len(seqs) - MAX_SEQS} more sequences"))
        y += 24
    return elements, y - 20


def _map(frame: Frame, host: bool, y: float) -> tuple[list[str], float]:
    """All blocks as cells: who reads each, and how much of it is filled."""
    rows, note = map_rows(physical_blocks(frame, host))
    names, size = labels(frame.state), frame.state.start.block_size
    elements = [text(12, y, "host blocks" if host else "physical blocks", font_weight="bold")]
    columns = max(map(len, rows), default=1)
    cell, left, height = (WIDTH - 76) / columns, 64, 40 if columns <= 16 else 26
    y += 22
    elements += [text(left + (column + 0.5) * cell, y, f"+{column}", text_anchor="middle", fill=FAINT)
                 for column in range(columns)]
    y += 6
    grid, fills = [], {}
    for row in rows:
        elements.append(text(left - 8, y + height / 2 + 5, str(row[0].number), text_anchor="end", fill=FAINT))
        for column, block in enumerate(row):
            x = left + column * cell
            grid.append(box(x, y, cell, height))
            if block.readers:
                seq = block.readers[0][0]
                fills.setdefault(seq, []).append(box(x, y, cell * block.filled / size, height))
                label = names[seq] + (f"×{len(block.readers)}" if len(block.readers) > 1 else "")
                elements.append(text(x + cell / 2, y + height / 2 + 5, fit(label, cell), text_anchor="middle"))
        y += height
    painted = [path("".join(boxes), fill=tint(colour_of(seq), GENERATED)) for seq, boxes in fills.items()]
    if note:
        elements.append(text(left, y + 20, note, fill=FAINT))
        y += 24
    return [*painted, path("".join(grid), fill="none", stroke="#8c8c8c"), *elements], y


def _legend(y: float, detailed: bool, with_new: bool) -> tuple[list[str], float]:
    """What the shadings mean."""
    light, dark = tint(FAINT, PROMPT), tint(FAINT, GENERATED)
    entries = [("prompt token", light, 1), ("generated token (bold)", dark, 1), ("empty slot", EMPTY, 1)]
    entries += [("written in this iteration", EMPTY, 2.5)] * with_new
    if not detailed:
        entries = [("one block, coloured as far as it is filled; its reader's name in it", dark, 1),
                   ("free block", EMPTY, 1)]
    elements, x = [], 12.0
    for name, fill, border in entries:
        elements += [rect(x, y, 22, 16, fill=fill, stroke=INK, stroke_width=border), text(x + 30, y + 13, name)]
        x += 44 + len(name) * FONT * 0.5
    return elements, y + 28
