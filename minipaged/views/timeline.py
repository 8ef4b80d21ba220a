"""Requests over iterations: who waits, who runs, who was pushed out (§4.5), and how full the pools are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from ..display import text_table
from ..replay import MemoryState, until_run
from ..trace import Add, Admit, Event, Start, Write
from .canvas import EMPTY, FAINT, INK, WIDTH, box, document, path, rect, text
from .frame import letters

MEANING = {"P": "prefill", "D": "decode", "w": "waiting", "S": "swapped out", "R": "recomputed"}
RAREST = "RSPwD"     # of several iterations in one column, the first of these that occurs is shown
MAX_ROWS = 24        # requests with a row of their own; of more, only how many do what
TEXT_COLUMNS, DRAWN_COLUMNS, TABLE_ROWS = 100, 400, 24


@dataclass(frozen=True)
class Timeline:
    """What a trace says of each iteration.

    Attributes
    ----------
    start : Start
        The sizes of the pools.
    rows : dict[int, str]
        Request to one letter per iteration, of `MEANING`, or a space before it came and after it ended. [iterations]
    device, host : list[int]
        Blocks in use while the model ran in each iteration, before those of ended sequences were freed. [iterations]
    """

    start: Start
    rows: dict[int, str]
    device: list[int]
    host: list[int]

    @property
    def iterations(self) -> int:
        """How many there were."""
        return len(self.device)


def timeline_of(events: list[Event]) -> Timeline:
    """Follow every request through a whole trace, whose events are in the order of their steps."""
    state = MemoryState(events[0])
    line, steps = Timeline(events[0], {}, [], []), [[] for _ in range(events[-1].step + 1)]
    for event in events[1:]:
        steps[event.step].append(event)
    known: set[int] = set()
    for step, here in enumerate(steps):
        ran = until_run(here)
        for event in here[:ran]:
            state.apply(event)
        if step:
            line.device.append(sum(map(bool, state.ref_counts)))
            line.host.append(sum(map(bool, state.host_ref_counts)))
        for event in here[ran:]:
            state.apply(event)
        did = _did(state, here, known)
        for request in line.rows:
            line.rows[request] += {"waiting": "w", "swapped": "S"}.get(state.status[request]) or did.get(request, " ")
        # One that comes after an iteration waits from the next one on.
        line.rows.update({event.request: " " * step for event in here if isinstance(event, Add)})
    return line


def _did(state: MemoryState, here: list[Event], known: set[int]) -> dict[int, str]:
    """Request to the letter for what the model did for it; those that are admitted become known."""
    did = {state.request_of[event.seq]: "D" for event in here if isinstance(event, Write)}
    admitted = [event.request for event in here if isinstance(event, Admit)]
    did |= {request: "R" if request in known else "P" for request in admitted}  # computes its prompt, or does so again
    known.update(admitted)
    return did


def render(line: Timeline) -> tuple[str, str]:
    """As text and as SVG."""
    return render_text(line), render_svg(line)


# ---- iterations put together to columns, if they are many ------------------------------------------------------------

def width_of(iterations: int, columns: int) -> int:
    """Iterations per column, so that there are at most so many columns."""
    return max(1, -(-iterations // columns))


def gathered(row: str, width: int) -> str:
    """One letter per column of ``width`` iterations: the first of `RAREST` that occurs in it."""
    chunks = (row[i:i + width] for i in range(0, len(row), width))
    return "".join(next((letter for letter in RAREST if letter in chunk), " ") for chunk in chunks)


def at_most(numbers: list[int], width: int) -> list[int]:
    """The largest number of each column of ``width`` iterations."""
    return [max(numbers[i:i + width]) for i in range(0, len(numbers), width)]


def counts(line: Timeline) -> dict[str, list[int]]:
    """Letter to how many requests do that in each iteration. [iterations]"""
    columns = [Counter(column) for column in zip(*line.rows.values())]
    return {letter: [column[letter] for column in columns] for letter in occurring(line)}


def occurring(line: Timeline) -> dict[str, str]:
    """Those of `MEANING` that some request does in some iteration."""
    found = set().union(*line.rows.values())
    return {letter: meaning for letter, meaning in MEANING.items() if letter in found}


def summary(line: Timeline) -> str:
    """One line: how much there is, and how full the pools ever were."""
    pools = [("physical", line.device, line.start.num_blocks), ("host", line.host, line.start.num_host_blocks)]
    most = " and ".join(f"{max(used, default=0)} of {size} {name} blocks" for name, used, size in pools
                        if name == "physical" or any(used))
    return (f"{len(line.rows)} request{'s' * (len(line.rows) != 1)} over {line.iterations} "
            f"iteration{'s' * (line.iterations != 1)}; at most {most} in use")


# ---- as text ---------------------------------------------------------------------------------------------------------

def render_text(line: Timeline) -> str:
    """A row of letters per request above the blocks in use; of many requests, a table of how many do what."""
    if len(line.rows) > MAX_ROWS:
        return f"{summary(line)}\n\n{_table(line)}"
    width = width_of(line.iterations, TEXT_COLUMNS)
    rows = [("iteration", _upright(range(1, line.iterations + 1, width)))]
    rows += [(letters(request), [gathered(row, width)]) for request, row in line.rows.items()]
    rows += [(f"{name} blocks", _upright(at_most(used, width)))
             for name, used in (("device", line.device), ("host", line.host)) if name == "device" or any(used)]
    lines = [f"{name if i == len(block) - 1 else '':14}{part}".rstrip()
             for name, block in rows for i, part in enumerate(block)]
    notes = ["  ".join(f"{letter} {meaning}" for letter, meaning in occurring(line).items())]
    notes += [f"a column is {width} iterations: the first of {' '.join(RAREST)} that occurs in them, and the most "
              "blocks in use"] * (width > 1)
    return "\n".join([summary(line), "", *lines, "", *notes])


def _upright(numbers: range | list[int]) -> list[str]:
    """Numbers written from top to bottom, one to a column."""
    digits = len(str(max(numbers, default=0)))
    return ["".join(column) for column in zip(*(str(number).rjust(digits) for number in numbers))] or [""]


def _table(line: Timeline) -> str:
    width, many = width_of(line.iterations, TABLE_ROWS), counts(line)
    columns = [line.device, line.host, *many.values()]
    firsts = range(1, line.iterations + 1, width)
    rows = [(f"{first}-{min(first + width - 1, line.iterations)}", *numbers)
            for first, *numbers in zip(firsts, *(at_most(column, width) for column in columns))]
    title = "blocks in use, and how many requests do this at once, at most"
    return text_table(["iterations", "device", "host", *(MEANING[letter] for letter in many)], rows, title)


# ---- as a drawing ----------------------------------------------------------------------------------------------------

LEFT, RIGHT, POOL, ROW, LANE = 84, WIDTH - 20, 96, 24, 44
# A state is told by its shape as well as by its colour: how high its bar is, where it stands, and how it is striped.
LOOK = {"D": ("#bfe3f7", 0, 18), "P": ("#0072b2", 0, 18), "w": (EMPTY, 7, 4), "S": ("#e69f00", 9, 9),
        "R": ("#d55e00", 0, 18)}
STRIPED = {"S": 6, "R": 3}  # units between stripes


def render_svg(line: Timeline) -> str:
    """The blocks in use, and below them a bar per request, or of many requests how many do what."""
    width = width_of(line.iterations, DRAWN_COLUMNS)
    scale = (RIGHT - LEFT) / max(-(-line.iterations // width), 1)
    body, y = _pools(line, width, scale, 52.0)
    drawn, y = _bars(line, width, scale, y + 14) if len(line.rows) <= MAX_ROWS else _lanes(line, width, scale, y + 14)
    axis, y = _axis(line, width, scale, y)
    legend, y = _legend(line, y + 14)
    note = f"; a column is {width} iterations, of which it shows the rarest" if width > 1 else ""
    head = [text(12, 24, summary(line) + note, font_weight="bold")]
    return document(y, _title(line), head + body + drawn + axis + legend)


def _title(line: Timeline) -> str:
    """For a screen reader: the summary, and what each request did when."""
    rows = list(line.rows.items())[:MAX_ROWS] if len(line.rows) <= MAX_ROWS else []
    told = (f"{letters(request)}: " + ", ".join(_said(run) for run in _runs(row)) for request, row in rows)
    return "; ".join([summary(line), *told])[:2000]


def _said(run: tuple[str, int, int]) -> str:
    letter, first, end = run
    return f"{MEANING[letter]} {first + 1}" + (f"-{end}" if end > first + 1 else "")


def _runs(row: str) -> Iterator[tuple[str, int, int]]:
    """Columns in which a request does the same: (letter, first, end)."""
    at = 0
    for letter, group in groupby(row):
        first, at = at, at + len(list(group))
        if letter != " ":
            yield letter, first, at


def _pools(line: Timeline, width: int, scale: float, y: float) -> tuple[list[str], float]:
    """Blocks in use after each iteration: of the device an area, of the host a dashed line."""
    most, bottom = max(line.start.num_blocks, *line.host, 1), y + POOL
    full = bottom - POOL * line.start.num_blocks / most

    def outline(used: list[int]) -> str:
        """The steps of a line through these numbers of blocks, for a path."""
        return "".join(f"V{bottom - POOL * number / most:.1f}h{scale:.2f}" for number in at_most(used, width))

    elements = [path(f"M{LEFT} {bottom}{outline(line.device)}V{bottom}z", fill="#c9c9c9", stroke=INK),
                path(f"M{LEFT} {full:.1f}H{RIGHT}", stroke=INK, stroke_dasharray="2 4"),
                text(LEFT - 8, full + 5, str(line.start.num_blocks), text_anchor="end"),
                text(LEFT - 8, bottom, "0", text_anchor="end"), text(12, y + POOL / 2 + 5, "blocks")]
    if any(line.host):
        elements.append(path(f"M{LEFT} {bottom}{outline(line.host)}", fill="none", stroke="#a34400", stroke_width=2.5,
                             stroke_dasharray="7 3"))
    return elements, bottom


def _bars(line: Timeline, width: int, scale: float, y: float) -> tuple[list[str], float]:
    bars: dict[str, list[str]] = {letter: [] for letter in LOOK}
    names, marks = [], []
    for request, row in line.rows.items():
        names.append(text(12, y + 14, letters(request), font_weight="bold"))
        places: dict[str, list[str]] = {EMPTY: [], INK: []}
        for letter, first, end in _runs(gathered(row, width)):
            x, wide = LEFT + first * scale, (end - first) * scale
            bars[letter].append((x, y, wide))
            if wide >= 14 and letter != "w":
                places[EMPTY if letter == "P" else INK].append((f"{x + wide / 2:.0f}", letter))
        for ink, spots in places.items():
            if spots:  # one element for a whole row: a letter for each x
                xs, word = zip(*spots)
                marks.append(f'<text x="{" ".join(xs)}" y="{y + 14:.0f}" text-anchor="middle" fill="{ink}" '
                             f'stroke="{EMPTY if ink == INK else "none"}" stroke-width="3" paint-order="stroke">'
                             f'{"".join(word)}</text>')
        y += ROW
    return [*(part for letter, places in bars.items() for part in _painted(letter, places)), *names, *marks], y


def _painted(letter: str, places: list[tuple[float, float, float]]) -> list[str]:
    """Bars of one state, as (x, y, width) of their rows."""
    colour, down, height = LOOK[letter]
    if not places:
        return []
    shapes = [path("".join(box(x, y + down, wide, height) for x, y, wide in places), fill=colour, stroke=INK,
                   stroke_width=0.7)]
    if gap := STRIPED.get(letter):
        lines = (f"M{x + at:.1f} {y + down}v{height}" for x, y, wide in places for at in range(gap, int(wide), gap))
        shapes.append(path("".join(lines), stroke=INK, stroke_width=0.8))
    return shapes


def _lanes(line: Timeline, width: int, scale: float, y: float) -> tuple[list[str], float]:
    """One lane per state, as high as requests are in it."""
    elements = []
    for letter, numbers in counts(line).items():
        bottom, most = y + LANE - 6, max(numbers)
        outline = "".join(f"V{bottom - (LANE - 12) * number / most:.1f}h{scale:.2f}"
                          for number in at_most(numbers, width))
        elements += [path(f"M{LEFT} {bottom}{outline}V{bottom}z", fill=LOOK[letter][0], stroke=INK, stroke_width=0.7),
                     text(12, bottom - 14, MEANING[letter]), text(12, bottom + 2, f"at most {most}", fill=FAINT)]
        y += LANE
    return elements, y


def _axis(line: Timeline, width: int, scale: float, y: float) -> tuple[list[str], float]:
    """Numbers of iterations, about a dozen."""
    every = next(size for power in range(9) for size in (10**power, 2 * 10**power, 5 * 10**power)
                 if size * 16 >= line.iterations)
    ticks = [number for number in range(every, line.iterations + 1, every)] or [1]
    return [text(12, y + 16, "iteration"),
            *(text(LEFT + ((number - 1) // width + 0.5) * scale, y + 16, str(number), text_anchor="middle")
              for number in ticks)], y + 20


def _legend(line: Timeline, y: float) -> tuple[list[str], float]:
    elements, x = [], 12.0
    for letter, meaning in occurring(line).items():
        elements += [*_painted(letter, [(x, y, 30)]), text(x + 38, y + 14, f"{letter} {meaning}")]
        x += 60 + 8 * (len(meaning) + 2)
    elements += [rect(x, y, 22, 16, fill="#c9c9c9", stroke=INK), text(x + 30, y + 14, "device blocks in use")]
    if any(line.host):
        elements += [path(f"M{x + 190} {y + 8}h22", stroke="#a34400", stroke_width=2.5, stroke_dasharray="7 3"),
                     text(x + 220, y + 14, "host")]
    return elements, y + 28
