"""Correct pictures: of 200 random runs, text and drawing say after each iteration what the engine itself holds.

The browser's renderings are held to the same in tests/browser/test_pictures_in_browser.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from witness import TRACES, Truth, witnessed

from minipaged.views import memory_view
from minipaged.views.canvas import GENERATED, PROMPT, WIDTH, colour_of, tint
from minipaged.views.frame import SLOTS_PER_ROW
from minipaged.views.svg import FILLED, LOGICAL, PHYSICAL, READERS, ROW, SLOT, TABLE, TABLE_END
from minipaged.views.text import MAX_MAP_ROWS, MAX_SEQS

CHUNKS = 8
SEEN: Counter[str] = Counter()
Names = dict[int, str]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_text_and_drawing_show_what_the_engine_holds(chunk: int, checkpoint: Callable[[str], str]) -> None:
    for seed in range(chunk, TRACES, CHUNKS):
        witness = witnessed(seed, checkpoint)
        assert len(witness.truths) == witness.step + 1
        for step, (truth, names) in enumerate(zip(witness.truths, witness.names(), strict=True)):
            view = memory_view(witness, step)
            truth = as_listed(truth, view.text, names)
            try:
                check_text(view.text, truth, names)
                check_svg(view.svg, truth, names)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, step {step}:\n{view.text}\n{truth}") from error
    SEEN["chunks"] += 1
    if SEEN["chunks"] == CHUNKS:
        print(SEEN)
        assert min(SEEN[what] for what in ("slots", "map", "host", "shared")) > 200, f"too little was seen: {SEEN}"


def as_listed(truth: Truth, text: str, names: Names) -> Truth:
    """The same, its tables in the order in which the text lists them; that order says nothing of the memory."""
    numbers = {name: seq for seq, name in names.items()}
    listed = [numbers[name] for name in re.findall(r"^sequence (\w+)(?: \(swapped out\))?: \d+ token", text, re.M)]
    rest = [seq for seq in truth.blocks if seq not in listed]
    return replace(truth, blocks={seq: truth.blocks[seq] for seq in listed + rest})


# ---- text ------------------------------------------------------------------------------------------------------------

def check_text(text: str, truth: Truth, names: Names) -> None:
    """Every number and every token in the text is the engine's."""
    parts = text.split("\n\n")
    for host, pool in ((False, "physical"), (True, "host")):
        used = re.search(rf"(\d+) of (\d+) {pool} blocks", parts[0])
        counts = truth.refs[host]
        assert (used is None) == (host and not any(counts))
        assert used is None or used.groups() == (str(sum(map(bool, counts))), str(len(counts)))
        SEEN["host"] += host and used is not None
        SEEN["shared"] += max(counts, default=0) > 1
    assert f"{truth.size} slots each" in parts[0]
    detailed = not any("one cell each" in part for part in parts)
    SEEN["slots" if detailed else "map"] += 1
    tables = [part for part in parts if part.startswith("sequence ")]
    if detailed:
        assert len(tables) == len(truth.blocks)
        for part, seq in zip(tables, truth.blocks):
            _check_table(part, seq, truth, names)
    elif tables:
        _check_list(tables[0].splitlines(), truth, names)
    for host, title in ((False, "physical blocks"), (True, "host blocks")):
        pool = [part for part in parts if part.startswith(title)]
        assert len(pool) == (not host or any(truth.refs[True]))
        for part in pool:
            (_check_pool if detailed else _check_map)(part, host, truth, names)
    waiting = [part for part in parts if part.startswith("waiting: ")]
    _check_waiting(waiting[0] if waiting else None, truth, names)


def _check_title(title: str, seq: int, truth: Truth, names: Names) -> None:
    out = " (swapped out)" if seq in truth.swapped else ""
    assert re.match(re.escape(f"sequence {names[seq]}{out}: {truth.stored[seq]} token") + r"s? in "
                    + str(len(truth.blocks[seq])), title), title
    then = truth.tokens[seq][truth.stored[seq]:]
    shown = re.search(r'next token "(.*)"$', title)
    if out or len(then) != 1 or seq in truth.queues["prefix"]:
        assert out == "" or shown is None
    else:
        assert shown and _is_shown(then[0], shown[1]), (title, then)


def _check_table(part: str, seq: int, truth: Truth, names: Names) -> None:
    title, header, rule, *lines = part.splitlines()
    _check_title(title, seq, truth, names)
    assert header.split()[2] == ("host" if seq in truth.swapped else "physical")
    slots_at = [match.start() for match in re.finditer("-+", rule)][-1]
    rows = -(-truth.size // SLOTS_PER_ROW)
    assert len(lines) == rows * len(truth.blocks[seq])
    for logical, block in enumerate(truth.blocks[seq]):
        entry = lines[logical * rows:(logical + 1) * rows]
        filled = truth.filled(seq, logical)
        assert entry[0][:slots_at].split() == [str(logical), str(block), f"{filled}/{truth.size}"]
        _check_cells([line[slots_at:] for line in entry], truth.slots(seq, logical), truth.size)


def _check_cells(lines: list[str], texts: list[str], size: int) -> None:
    texts = texts + [""] * (size - len(texts))
    for row, line in enumerate(lines):
        at = 0
        for text in texts[row * SLOTS_PER_ROW:(row + 1) * SLOTS_PER_ROW]:
            shown = text if line.startswith(f"| {text} ", at) else _cut(text, line[at + 2:])
            assert line.startswith(f"| {shown} ", at), (line, text)
            at += 2 + len(shown)
            at += len(line[at:]) - len(line[at:].lstrip(" "))
        assert line[at:] == "|", line


def _cut(text: str, line: str) -> str:
    """As much of a long text as the line begins with, and an ellipsis."""
    same = next((i for i, (a, b) in enumerate(zip(text, line)) if a != b), min(len(text), len(line)))
    assert len(text) > 6 and same >= 5, (text, line)
    return text[:same] + "…"


def _is_shown(text: str, shown: str) -> bool:
    return shown == text or (shown.endswith("…") and len(shown) > 5 and text.startswith(shown[:-1]))


def _check_pool(part: str, host: bool, truth: Truth, names: Names) -> None:
    _, _, rule, *lines = part.splitlines()
    reader_at, slots_at = [match.start() for match in re.finditer("-+", rule)][1:]
    rows, at = -(-truth.size // SLOTS_PER_ROW), 0
    for block, count in enumerate(truth.refs[host]):
        readers = truth.readers(host, block)
        assert len(readers) == count, "the engine's own books"
        number, who = lines[at][:reader_at], lines[at][reader_at:slots_at] if count else lines[at][reader_at:]
        assert int(number) == block and _is_readers(who.split(), readers, names), lines[at]
        if count:
            _check_cells([line[slots_at:] for line in lines[at:at + rows]], truth.slots(*readers[0]), truth.size)
        at += rows if count else 1
    assert at == len(lines)


def _is_readers(words: list[str], readers: list[tuple[int, int]], names: Names) -> bool:
    """"×2 A1:0 A2:0" or "free", as the table order has them."""
    counted = [f"×{len(readers)}"] * (len(readers) > 1)
    return sorted(words) == sorted(counted + ([f"{names[seq]}:{logical}" for seq, logical in readers] or ["free"]))


def _check_map(part: str, host: bool, truth: Truth, names: Names) -> None:
    cells: dict[int, str] = {}
    for line in part.splitlines()[1:]:
        if re.match(r" *\d+  ", line):
            number, *row = line.split()
            cells.update(enumerate(row, int(number)))
    left_out = truth.refs[host][:] if len(cells) < len(truth.refs[host]) else []
    for block, cell in cells.items():
        readers = truth.readers(host, block)
        if left_out:
            left_out[block] = 0
        if not readers:
            assert cell == ".", (block, cell)
            continue
        filled = truth.filled(*readers[0])
        rest = (f"({filled})" if filled < truth.size else "") + (f"×{len(readers)}" if len(readers) > 1 else "")
        assert cell in {names[seq] + rest for seq, _ in readers}, (block, cell, readers)
    hidden = re.search(r"not shown, (\d+) of them in use", part)
    assert sum(map(bool, left_out)) == (int(hidden[1]) if hidden else 0)
    assert len(part.splitlines()) <= MAX_MAP_ROWS + 2


def _check_list(lines: list[str], truth: Truth, names: Names) -> None:
    for (title, numbers), seq in zip(_pairs(lines), truth.blocks):
        _check_title(title, seq, truth, names)
        _check_numbers(numbers.split(), truth.blocks[seq])
    assert sum(line.startswith("sequence") for line in lines) == min(len(truth.blocks), MAX_SEQS)


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    return zip(lines[::2], lines[1::2])


def _check_numbers(words: list[str], blocks: list[int]) -> None:
    wanted = list(map(str, blocks))
    if "…" in words:
        at = words.index("…")
        assert words[:at] == wanted[:at] and words[at + 1:] == wanted[-len(words) + at + 1:] and len(wanted) > 20
    else:
        assert words == wanted


def _check_waiting(part: str | None, truth: Truth, names: Names) -> None:
    seqs = truth.queues["waiting"]
    assert (part is None) == (not seqs), (part, seqs)
    shown = re.findall(r"([A-Z]+\d*) \((\d+) tokens?\)", part or "")
    assert sorted(shown) == sorted((names[seq], str(len(truth.tokens[seq]))) for seq in seqs)[:MAX_SEQS]


# ---- the drawing -----------------------------------------------------------------------------------------------------

class Drawing:
    """Texts by the place they stand at, and the boxes painted in each colour."""

    def __init__(self, svg: str) -> None:
        root = ElementTree.fromstring(svg)
        name = "{http://www.w3.org/2000/svg}"
        self.texts = [(float(t.get("x")), float(t.get("y")), t.text or "", t.get("text-anchor"), t.get("font-weight"))
                      for t in root.iter(name + "text")]
        self.at = {(round(x), round(y)): text for x, y, text, *_ in self.texts}
        self.links, self.boxes = set(), {}
        for path in root.iter(name + "path"):
            if link := re.fullmatch(rf"M{TABLE_END} (\S+)C.* {PHYSICAL - 28} (\S+)m-6 -4l6 4l-6 4", path.get("d")):
                self.links.add(tuple(map(float, link.groups())))
            for x, y, width in re.findall(r"M(\S+) (\S+?)h(\S+?)v[\d.]+h-[\d.]+z", path.get("d")):
                self.boxes.setdefault(path.get("fill"), {})[round(float(x)), round(float(y))] = float(width)

    def text(self, x: float, y: float) -> str | None:
        """What stands at a place; places are written to a tenth."""
        return _near(self.at, x, y)

    def box(self, colour: str, x: float, y: float) -> float | None:
        """The width of the box of that colour whose corner is there."""
        return _near(self.boxes.get(colour, {}), x, y)

    def rows(self, x: float) -> list[tuple[float, str]]:
        """The texts of a column that end at its right, from the top: where each stands, and what it says."""
        return sorted((y, text) for right, y, text, anchor, _ in self.texts if right == x and anchor == "end")


def _near(found: dict[tuple[int, int], Any], x: float, y: float) -> Any:
    around = [(round(x) + i, round(y) + j) for i in (0, -1, 1) for j in (0, -1, 1)]
    return next((found[place] for place in around if place in found), None)


def check_svg(svg: str, truth: Truth, names: Names) -> None:
    """Every number, every token and every link in the drawing is the engine's."""
    drawing = Drawing(svg)
    if any(text == "+0" for *_, text, _, _ in drawing.texts):  # the head of a map's first column
        _check_drawn_map(drawing, truth, names)
    else:
        middles = _check_drawn_tables(drawing, truth)
        _check_drawn_pools(drawing, truth, names, middles)
    waiting = [text for text in drawing.at.values() if text.startswith("waiting: ")]
    assert not waiting or len(waiting) == 1
    if not (waiting and waiting[0].endswith("…")):  # which the text has in full
        _check_waiting(waiting[0] if waiting else None, truth, names)


def _check_slots(drawing: Drawing, left: float, middle: float, reader: tuple[int, int], truth: Truth) -> None:
    seq, logical = reader
    top = middle - ROW * -(-truth.size // SLOTS_PER_ROW) / 2
    for slot in range(truth.size):
        x, y = left + SLOT * (slot % SLOTS_PER_ROW), top + ROW * (slot // SLOTS_PER_ROW)
        shown = drawing.text(x + SLOT / 2, y + 18)
        position = logical * truth.size + slot
        if slot >= truth.filled(seq, logical):
            assert shown is None, (shown, "in an empty slot")
            continue
        text = truth.tokens[seq][position]
        assert shown is not None and (shown == text or shown.endswith("…") and text.startswith(shown[:-1])
                                      and len(text) > 3), (shown, text)
        share = PROMPT if position < truth.prompt_len[seq] else GENERATED
        assert drawing.box(tint(colour_of(seq), share), x, y) == SLOT, "the shading of Figure 7"


def _check_drawn_tables(drawing: Drawing, truth: Truth) -> dict[tuple[int, int], float]:
    """Returns where each entry's middle is."""
    entries = [(seq, logical) for seq, table in truth.blocks.items() for logical in range(len(table))]
    middles = {}
    for (seq, logical), (y, number) in zip(entries, drawing.rows(LOGICAL - 8), strict=True):
        middle = middles[seq, logical] = y - 5
        assert number == str(logical)
        assert drawing.text((TABLE + FILLED) / 2, y) == str(truth.blocks[seq][logical])
        assert drawing.text((FILLED + TABLE_END) / 2, y) == str(truth.filled(seq, logical))
        _check_slots(drawing, LOGICAL, middle, (seq, logical), truth)
    return middles


def _check_drawn_pools(drawing: Drawing, truth: Truth, names: Names, middles: dict[tuple[int, int], float]) -> None:
    places = [(False, block) for block in range(len(truth.refs[False]))]
    places += [(True, block) for block in range(len(truth.refs[True]))] if any(truth.refs[True]) else []
    links = set()
    for (host, block), (y, number) in zip(places, drawing.rows(PHYSICAL - 8), strict=True):
        readers, shown = truth.readers(host, block), drawing.text(READERS, y)
        assert number == str(block)
        if shown.endswith("…"):
            assert shown.startswith(f"×{len(readers)} ")
        else:
            assert _is_readers(shown.split(), readers, names), (shown, readers)
        if readers:
            _check_slots(drawing, PHYSICAL, y - 5, readers[0], truth)
        links |= {(round(middles[reader]), round(y - 5)) for reader in readers}
    assert {(round(a), round(b)) for a, b in drawing.links} == links


def _check_drawn_map(drawing: Drawing, truth: Truth, names: Names) -> None:
    titles = [y for x, y, text, *_ in drawing.texts if x == 12 and text in ("physical blocks", "host blocks")]
    assert len(titles) == 1 + any(truth.refs[True])
    for y, number in drawing.rows(56):
        host = len(titles) > 1 and y > titles[1]
        counts = truth.refs[host]
        columns = min(16 if len(counts) <= 256 else 32, len(counts))
        width, height = (WIDTH - 76) / columns, 40 if columns <= 16 else 26
        for block in range(int(number), min(int(number) + columns, len(counts))):
            x, readers = 64 + (block - int(number)) * width, truth.readers(host, block)
            shown = drawing.text(x + width / 2, y)
            if not readers:
                assert shown is None
                continue
            count = f"×{len(readers)}" if len(readers) > 1 else ""
            wanted = {names[seq] + count for seq, _ in readers}
            assert shown in wanted or shown.endswith("…") and any(w.startswith(shown[:-1]) for w in wanted), shown
            painted = [drawing.box(tint(colour_of(seq), GENERATED), x, y - 5 - height / 2) for seq, _ in readers]
            fill = width * truth.filled(*readers[0]) / truth.size
            assert any(found == pytest.approx(fill, abs=0.1) for found in painted if found), (block, painted, fill)
