"""The memory as plain text, in the shape of the paper's Figures 6 and 7; strict nbval compares it."""

from __future__ import annotations

import unicodedata

from ..display import text_table
from .frame import (NUMBERED, SLOTS_PER_ROW, Block, Frame, Slot, is_combining, is_small, labels, next_token,
                    physical_blocks, slots_of, waiting)

CELL = 14      # columns that the text of a token gets at most
MAX_SEQS = 16  # block tables listed below a compact map
MAX_MAP_ROWS = 32
NO_TABLE = "no sequence holds a block"
MAX_NUMBERS = 24  # block numbers listed per sequence there


def render(frame: Frame) -> str:
    """Block tables and physical blocks with the token in each slot, or, of a big pool, one cell per block."""
    state = frame.state
    parts = [summary(frame)]
    if is_small(state):
        parts += [block_table(frame, seq) for seq in state.tables] or [NO_TABLE]
        parts += [_pool(frame, host) for host in pools(frame)]
        parts += [_written(frame)]
    else:
        parts += [*(_map(frame, host) for host in pools(frame)), _tables(frame)]
    parts += ["waiting: " + ", ".join(waiting_names(frame))] * bool(waiting(state))
    return "\n\n".join(part for part in parts if part)


def summary(frame: Frame) -> str:
    """One line: when this is, and how full the pools are."""
    state = frame.state
    used = [f"{sum(map(bool, counts))} of {len(counts)} {name} blocks"
            for name, counts in (("physical", state.ref_counts), ("host", state.host_ref_counts)) if counts]
    shown = used if any(state.host_ref_counts) else used[:1]
    when = f"after iteration {state.step}" if state.step else "before the first iteration"
    return f"{when}: {' and '.join(shown)} in use, {state.start.block_size} slots each"


def block_table(frame: Frame, seq: int) -> str:
    """The block table of one sequence: logical block, physical block, # filled (Figure 6), and the tokens."""
    state, size = frame.state, frame.state.start.block_size
    rows: list[tuple[str, ...]] = []
    width = _cell_width(frame)
    for logical, block in enumerate(state.tables[seq]):
        first, *more = _slot_rows(slots_of(frame, seq, logical), width)
        rows.append((f"{logical:>13}", f"{block:>14}", f"{state.filled(seq, logical)}/{size}".rjust(6), first))
        rows += [("", "", "", row) for row in more]
    physical = "host block" if state.on_host(seq) else "physical block"
    return text_table(["logical block", physical, "filled", "slots"], rows, describe(frame, seq))


def describe(frame: Frame, seq: int) -> str:
    """One line on a sequence: its name, its length, and the token that it has sampled but not yet cached."""
    state = frame.state
    then = next_token(state, seq)
    return (f"sequence {labels(state)[seq]}{' (swapped out)' if state.on_host(seq) else ''}: "
            f"{_count(state.num_tokens[seq], 'token')} in {_count(len(state.tables[seq]), 'block')}"
            + (f', next token "{cut(then, CELL)}"' if then and not state.on_host(seq) else ""))


def readers_of(frame: Frame, block: Block) -> str:
    """The reference count of a physical block if it is above 1 (§4.4), and its readers as sequence:logical block."""
    names, count = labels(frame.state), len(block.readers)
    readers = [f"{names[seq]}:{logical}" for seq, logical in block.readers]
    return " ".join([f"×{count}"] * (count > 1) + readers) or "free"


def waiting_names(frame: Frame) -> list[str]:
    """The sequences without blocks and how many tokens they bring, the first `MAX_SEQS` of them."""
    state, names, seqs = frame.state, labels(frame.state), waiting(frame.state)
    shown = [f"{names[seq]} ({_count(len(state.tokens[seq]), 'token')})" for seq in seqs[:MAX_SEQS]]
    return shown + [f"{len(seqs) - MAX_SEQS} more"] * (len(seqs) > MAX_SEQS)


def pools(frame: Frame) -> list[bool]:
    """Which pools are shown: the device's, and the host's (True) while it is in use (§4.5)."""
    return [False, True] if any(frame.state.host_ref_counts) else [False]


def cut(text: str, columns: int) -> str:
    """At most so many columns of a terminal, with an ellipsis for the rest."""
    if columns_of(text) <= columns:
        return text
    while columns_of(text) > columns - 1:
        text = text[:-1]
    return text + "…"


def columns_of(text: str) -> int:
    """Columns in a terminal: a wide character takes two, a combining one none."""
    return sum(0 if is_combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def elided(numbers: list[int]) -> str:
    """Numbers of blocks in logical order, those in the middle left out if they are many."""
    if len(numbers) <= MAX_NUMBERS:
        return " ".join(map(str, numbers))
    half = MAX_NUMBERS // 2
    return f"{' '.join(map(str, numbers[:half]))} … {' '.join(map(str, numbers[-half:]))}"


def map_rows(blocks: list[Block]) -> tuple[list[list[Block]], str]:
    """Rows of the compact map, and a line on the blocks that are left out of it.

    Of a pool that would be too long, rows of free blocks are left out, and after them what is beyond the last row.
    """
    columns = 16 if len(blocks) <= NUMBERED else 32
    rows = [blocks[i:i + columns] for i in range(0, len(blocks), columns)]
    if len(rows) > MAX_MAP_ROWS:
        rows = [row for row in rows if any(block.readers for block in row)][:MAX_MAP_ROWS]
    left_out = len(blocks) - sum(map(len, rows))
    in_use = sum(bool(b.readers) for b in blocks) - sum(bool(b.readers) for row in rows for b in row)
    return rows, f"{left_out} blocks are not shown, {in_use} of them in use" if left_out else ""


def _pool(frame: Frame, host: bool) -> str:
    width, rows = _cell_width(frame), []
    for block in physical_blocks(frame, host):
        first, *more = _slot_rows(block.slots, width) if block.readers else [""]
        rows.append((f"{block.number:>5}", readers_of(frame, block), first))
        rows += [("", "", row) for row in more]
    return text_table(["block", "reader", "slots"], rows, _pool_name(host))


def _slot_rows(slots: list[Slot], width: int) -> list[str]:
    texts = [cut(slot.text, CELL) for slot in slots]
    cells = [text + " " * (width - columns_of(text)) for text in texts]
    return ["| " + " | ".join(cells[i:i + SLOTS_PER_ROW]) + " |" for i in range(0, len(cells), SLOTS_PER_ROW)]


def _written(frame: Frame) -> str:
    """Where the last iteration wrote keys and values, by position: what a block table translates (§4.2)."""
    names, state = labels(frame.state), frame.state
    lines = []
    for seq in [seq for seq in frame.written if seq in state.tables][:MAX_SEQS]:
        new = [(block, offset) for logical, block in enumerate(state.tables[seq])
               for offset, slot in enumerate(slots_of(frame, seq, logical)) if slot.new]
        if new:
            places = [f"block {block} slot {offset}" for block, offset in (new[0], new[-1])[:len(new)]]
            first, last = frame.written[seq][0], frame.written[seq][-1]
            lines.append(f"{names[seq]} position {first} to {places[0]}" if len(new) == 1 else
                         f"{names[seq]} positions {first}-{last} to {' … '.join(places)}")
    return "written: " + "; ".join(lines) if lines else ""


def _cell_width(frame: Frame) -> int:
    texts = [slot.text for seq, table in frame.state.tables.items()
             for logical in range(len(table)) for slot in slots_of(frame, seq, logical)]
    return max((columns_of(cut(text, CELL)) for text in texts), default=1)


def _tables(frame: Frame) -> str:
    state = frame.state
    lines = [f"{describe(frame, seq)}\n  {elided(table)}" for seq, table in list(state.tables.items())[:MAX_SEQS]]
    more = len(state.tables) - len(lines)
    return "\n".join(lines + [f"… and {more} more sequences"] * (more > 0))


def _map(frame: Frame, host: bool) -> str:
    names, size = labels(frame.state), frame.state.start.block_size
    rows, note = map_rows(physical_blocks(frame, host))

    def cell(block: Block) -> str:
        """A block: its first reader, its filled slots if not all, its readers if several."""
        if not block.readers:
            return "."
        return (names[block.readers[0][0]] + (f"({block.filled})" if block.filled < size else "")
                + (f"×{len(block.readers)}" if len(block.readers) > 1 else ""))

    width = max((len(cell(block)) for row in rows for block in row), default=1)
    lines = [f"{row[0].number:>6}  " + " ".join(cell(block).ljust(width) for block in row).rstrip() for row in rows]
    title = f"{_pool_name(host)}, one cell each (. free, A full, A(3) 3 of {size} slots filled, A×2 read by two)"
    return "\n".join([title, *lines, *([note] if note else [])])


def _pool_name(host: bool) -> str:
    return "host blocks" if host else "physical blocks"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
