"""The attention walk as a drawing: the block table, the slots with their scores, the running numbers, the weights."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp

from .canvas import FAINT, INK, WIDTH, box, document, fit, path, rect, tint
from .canvas import text as label
from .frame import SLOTS_PER_ROW, visible
from .walk import Walk, heaviest, number, rescaled, shown_entries, shown_slots, slot, title, unread, vector, verdict

LEFT, RIGHT = 12, WIDTH - 12
BLOCK, SLOTS, SLOT = 70, 122, 108            # where the block's number and the slots are; width of a slot
LARGEST, SHRINK, TOTAL, SUMS = 606, 672, 736, 752  # right ends of the columns of numbers; left end of the accumulator
ROW, GAP, BARS = 26, 8, 72                   # height of a row of slots, between entries, and of the weights
BINS = 96                                    # bars of the weights at most
COMPONENTS = 48                              # bars of a vector at most
SHADE = tint("#0072B2", 0.3)


def render(walk: Walk, at: int) -> str:
    """The same facts as the text."""
    entries, y = _entries(walk, at, 84)
    weights, y = _weights(walk, at, y + 34)
    body = [label(LEFT, 24, fit(title(walk), RIGHT - LEFT, bold=True), font_weight="bold"),
            label(LEFT, 46, "score = q·k/√d; shaded as far as exp(score - m); thick border: the entry read last", fill=FAINT)]
    count = len(walk.plain)
    sums = "accumulator" if count <= COMPONENTS else f"accumulator, {COMPONENTS} of {count}"
    for x, head, anchor in ((LEFT, "entry", "start"), (BLOCK, "block", "start"), (SLOTS, "slots: token, score", "start"),
                            (LARGEST, "m", "end"), (SHRINK, "rescale", "end"), (TOTAL, "l", "end"), (SUMS, sums, "start")):
        body.append(label(x, 74, head, fill=FAINT, text_anchor=anchor))
    body += entries + weights
    if at == len(walk.entries) - 1:
        body += [label(LEFT, y + 30, "output = accumulator / l", font_weight="bold"),
                 *_vector(walk.output, max(map(abs, walk.output)), 200, y + 25, RIGHT - 200, 40),
                 label(LEFT, y + 50, vector(walk.output)), label(LEFT, y + 72, verdict(walk))]
        y += 76
    return document(y + 14, f"{title(walk)}; {at + 1} of {len(walk.entries)} entries read", body)


def _entries(walk: Walk, at: int, y: float) -> tuple[list[str], float]:
    """One row of slots or several for each entry read."""
    body, largest = [], max(abs(x) for entry in walk.entries[:at + 1] for x in entry.weighted)
    for index in shown_entries(walk, at):
        if index is None:
            body.append(label(LEFT, y + 12, "…"))
            y += 22
            continue
        entry, slots = walk.entries[index], shown_slots(walk, index)
        height = ROW * -(-len(slots) // SLOTS_PER_ROW)
        middle = y + 18
        body += [label(LEFT + 24, middle, str(index), text_anchor="end"),
                 path(f"M{LEFT + 30} {y + 13:.0f}h22m-6 -4l6 4l-6 4", fill="none", stroke=INK),
                 label(BLOCK + 36, middle, str(entry.block), text_anchor="end", font_weight="bold"),
                 *_slots(walk, index, slots, y, thick=index == at)]
        body += [label(x, middle, value, text_anchor="end") for x, value in (
            (LARGEST, number(entry.largest)), (TOTAL, number(entry.total)))]
        body.append(label(SHRINK, middle, rescaled(walk, index), text_anchor="end",
                          **({"font_weight": "bold"} if index and entry.shrink < 1 else {})))
        body += _vector(entry.weighted, largest, SUMS, y + ROW / 2, RIGHT - SUMS, ROW)
        y += height + GAP
    if rest := unread(walk, at):
        body.append(label(LEFT, y + 12, rest, fill=FAINT))
        y += 22
    return body, y


def _slots(walk: Walk, index: int, slots: list[int | None], y: float, thick: bool) -> list[str]:
    """A block: what is in its slots, their scores, and how much each counts beside the largest score so far."""
    entry = walk.entries[index]
    places = [(SLOTS + SLOT * (i % SLOTS_PER_ROW), y + ROW * (i // SLOTS_PER_ROW), offset)
              for i, offset in enumerate(slots)]
    shares = [(x, top, exp(entry.scores[offset] - entry.largest)) for x, top, offset in places
              if offset is not None and offset < len(entry.scores)]
    columns = min(len(slots), SLOTS_PER_ROW)
    body = [path("".join(box(x, top, SLOT * share, ROW) for x, top, share in shares), fill=SHADE),
            path("".join(box(x, top, SLOT, ROW) for x, top, _ in places), fill="none", stroke="#8c8c8c"),
            *[rect(SLOTS, y, SLOT * columns, ROW * -(-len(slots) // columns), fill="none", stroke=INK,
                   stroke_width=3)] * thick]
    for x, top, offset in places:
        token, score = slot(walk, index, offset) if offset is not None else ("…", "")
        room = SLOT - 10 - 8 * len(score)
        body += [label(x + 5, top + 18, fit(token, room))] * bool(token)
        body += [label(x + SLOT - 5, top + 18, score, text_anchor="end",
                       **({"fill": FAINT} if score in ("masked", "empty") else {}))] * bool(score)
    return body


def _vector(components: list[float], largest: float, x: float, middle: float, width: float, height: float) -> list[str]:
    """The first components as bars up and down, the longest as long as ``largest``."""
    shown, pitch = components[:COMPONENTS], width / COMPONENTS
    bars = "".join(f"M{x + (i + 0.5) * pitch:.1f} {middle:.0f}v{-value / largest * height / 2:.1f}"
                   for i, value in enumerate(shown))
    return [path(bars, fill="none", stroke="#0072B2", stroke_width=max(1.5, round(pitch * 0.6, 1))),
            path(f"M{x:.0f} {middle:.0f}h{pitch * len(shown):.0f}", fill="none", stroke=FAINT, stroke_width=0.7)]


def _weights(walk: Walk, at: int, y: float) -> tuple[list[str], float]:
    """A bar for each token read, or, of many, for so many neighbours; the heaviest with their text."""
    weights, tokens = walk.weights(at), [token for entry in walk.entries[:at + 1] for token in entry.tokens]
    end = at == len(walk.entries) - 1
    each = -(-len(weights) // BINS)
    if walk.block_size * 24 < len(weights):  # whole blocks, if that leaves enough bars
        each = -(-each // walk.block_size) * walk.block_size
    bars = [sum(weights[i:i + each]) for i in range(0, len(weights), each)]
    pitch, top = min(120.0, (RIGHT - LEFT) / len(bars)), max(bars)
    name = "weights a_ij = exp(score - m) / l" if end else "weights so far, exp(score - m) / l"
    of = f", a bar for each {each} tokens" if each > 1 else ", token by token"
    base = y + 12 + BARS
    body = [label(LEFT, y, name + of, font_weight="bold"),
            path("".join(box(LEFT + i * pitch + pitch * 0.15, base - BARS * bar / top, pitch * 0.7, BARS * bar / top)
                         for i, bar in enumerate(bars)), fill="#0072B2"),
            path(f"M{LEFT} {base:.0f}h{pitch * len(bars):.0f}" + "".join(_edges(walk, len(weights), pitch / each, base)),
                 fill="none", stroke=INK)]
    shown = heaviest(weights)
    if len(shown) == len(weights):
        wide = pitch >= 38  # else every other text a line lower
        for i in shown:
            x, low = LEFT + (i + 0.5) * pitch, 0 if wide else 38 * (i % 2)
            room = pitch - 4 if wide else 2 * pitch - 4
            body += [label(x, base + 18 + low, fit(visible(tokens[i]), room), text_anchor="middle"),
                     label(x, base + 36 + low, f"{weights[i]:.1%}" if pitch >= 46 else f"{weights[i]:.0%}",
                           text_anchor="middle", fill=FAINT)]
        return body, base + (40 if wide else 78)
    for line, found in enumerate(shown[i:i + 6] for i in range(0, len(shown), 6)):
        body += [label(LEFT + 156 * i, base + 22 + 20 * line, f"{position} {fit(visible(tokens[position]), 70)} "
                       f"{weights[position]:.1%}") for i, position in enumerate(found)]
    return body, base + 48


def _edges(walk: Walk, count: int, pitch: float, base: float) -> Iterable[str]:
    """Where a block ends, a tick below the line, as far as there is room for them."""
    if walk.block_size * pitch >= 6:
        for i in range(0, count + 1, walk.block_size):
            yield f"M{LEFT + i * pitch:.1f} {base:.0f}v5"
