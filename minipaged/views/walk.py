"""The attention walk: one query over its block table, entry by entry, with the running numbers of Eq. 4 (§4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import exp

from ..display import text_table
from ..errors import TraceError
from .frame import SLOTS_PER_ROW, visible
from .text import columns_of, cut

CELL = 12          # columns that the text of a token gets at most
MAX_SLOTS = 16     # of one block that are shown
MAX_ROWS = 12      # of slots that are shown, over all entries
MAX_WEIGHTS = 24   # tokens up to which each has its weight written beside it; of more, the heaviest
HEAVIEST = 12
COMPONENTS = 4     # of a vector that are written out
BAR = 40           # characters of a weight of 100 %


@dataclass(frozen=True)
class Entry:
    """One entry of the block table, and what reading it made of the running numbers.

    Attributes
    ----------
    block : int
        The physical block.
    tokens : list[str]
        Texts of the tokens in its slots, those after the query's position too.
    scores : list[float]
        q·k/sqrt(d) of the slots that the query sees; the rest is masked.
    largest : float
        The largest score so far: m.
    shrink : float
        exp(m before - m): what the sum and the accumulator so far were multiplied with; 0 at the first entry.
    total : float
        Sum of exp(score - m) so far: l, Eq. 4's denominator.
    weighted : list[float] [head_dim]
        Sum of exp(score - m) v so far: the accumulator, Eq. 4's numerator.
    """

    block: int
    tokens: list[str]
    scores: list[float]
    largest: float
    shrink: float
    total: float
    weighted: list[float]


@dataclass(frozen=True)
class Walk:
    """One query's attention in one layer and head; plain numbers, of which no engine needs to be there any more.

    Attributes
    ----------
    layer, head, kv_head : int
        Whose keys and values: query heads of one group share a KV head.
    seq_id, position : int
        Whose query: that of this position of this sequence.
    block_size : int
        Slots per block.
    entries : list[Entry]
        The block table as far as the query sees it, in order.
    later : list[int]
        The physical blocks of the entries behind, which hold later tokens alone and are not read.
    plain : list[float] [head_dim]
        The output by Eq. 3, from the same keys and values in one piece, with the whole softmax at once.
    """

    layer: int
    head: int
    kv_head: int
    seq_id: int
    position: int
    block_size: int
    entries: list[Entry]
    later: list[int]
    plain: list[float]

    @cached_property
    def output(self) -> list[float]:
        """The accumulator over the sum, once all is read. [head_dim]"""
        end = self.entries[-1]
        return [component / end.total for component in end.weighted]

    @property
    def difference(self) -> float:
        """The largest difference between a component of `output` and of `plain`."""
        return max(abs(a - b) for a, b in zip(self.output, self.plain, strict=True))

    def weights(self, at: int) -> list[float]:
        """exp(score - m) / l of every token read by entry ``at``; at the last entry Eq. 3's a_ij. [tokens]"""
        now = self.entries[at]
        return [exp(score - now.largest) / now.total for entry in self.entries[:at + 1] for score in entry.scores]

    def check(self, at: int | None) -> int:
        """The index of an entry; None is the last.

        Raises
        ------
        TraceError
            There is no such entry.
        """
        last = len(self.entries) - 1
        if at is not None and not 0 <= at <= last:
            raise TraceError(f"entry {at}: this walk has the entries 0 to {last}")
        return last if at is None else at


def text(walk: Walk, at: int) -> str:
    """The entries read so far, the weights, and at the end the output; of much, the first, present and last parts."""
    parts = [title(walk), _table(walk, at), _weights(walk, at)]
    if at == len(walk.entries) - 1:
        parts.append(f"output, accumulator / l: {vector(walk.output)}\n{verdict(walk)}")
    return "\n\n".join(parts)


def title(walk: Walk) -> str:
    """One line: which query, and where."""
    token = cut(visible(walk.entries[-1].tokens[len(walk.entries[-1].scores) - 1]), 2 * CELL)
    kv_head = f" (KV head {walk.kv_head})" if walk.kv_head != walk.head else ""
    return (f'sequence {walk.seq_id}, layer {walk.layer}, head {walk.head}{kv_head}: '
            f'the query of "{token}" at position {walk.position}')


def verdict(walk: Walk) -> str:
    """How far the output is from plain attention, the digits that differ from machine to machine left out."""
    size = "less than 1e-5" if walk.difference < 1e-5 else f"{walk.difference:.0e}"
    return f"largest difference to plain softmax attention (Eq. 3): {size}"


def number(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}".replace("-0.00", "0.00")


def rescaled(walk: Walk, index: int) -> str:
    """What an entry multiplied the sums before it with."""
    return f"×{number(walk.entries[index].shrink)}" if index else "–"


def vector(components: list[float]) -> str:
    """Its first components."""
    shown = " ".join(map(number, components[:COMPONENTS]))
    return f"[{shown} …]" if len(components) > COMPONENTS else f"[{shown}]"


def elided(count: int, room: int, at: int) -> list[int | None]:
    """The numbers below ``count`` that fit: the first, those around ``at``, the last, and None for each gap."""
    if count <= room:
        return list(range(count))
    around = range(max(0, at - (room - 3) // 2), min(count, at + (room - 3) // 2 + 1))
    kept, found = sorted({0, count - 1, *around}), []
    for before, index in zip([-1, *kept], kept):
        found += [None] * (index > before + 1) + [index]
    return found


def shown_entries(walk: Walk, at: int) -> list[int | None]:
    """The entries read so far that a picture has room for, and None for each gap."""
    rows = -(-min(walk.block_size, MAX_SLOTS) // SLOTS_PER_ROW)
    return elided(at + 1, max(3, MAX_ROWS // rows), at)


def shown_slots(walk: Walk, index: int) -> list[int | None]:
    """The slots of an entry's block that a picture has room for: beside the first and the last the largest score."""
    scores = walk.entries[index].scores
    return elided(walk.block_size, MAX_SLOTS, scores.index(max(scores)))


def slot(walk: Walk, index: int, offset: int) -> tuple[str, str]:
    """What is in a slot, and its score or why it has none."""
    entry = walk.entries[index]
    token = visible(entry.tokens[offset]) if offset < len(entry.tokens) else ""
    return token, number(entry.scores[offset]) if offset < len(entry.scores) else "masked" if token else "empty"


def heaviest(weights: list[float]) -> list[int]:
    """The positions whose weights are written out, in order."""
    if len(weights) <= MAX_WEIGHTS:
        return list(range(len(weights)))
    return sorted(sorted(range(len(weights)), key=lambda i: -weights[i])[:HEAVIEST])


def unread(walk: Walk, at: int) -> str:
    """What of the block table was not read, and why; empty if nothing."""
    left, parts = len(walk.entries) - 1 - at, []
    if left:
        parts.append(f"{left} more to read")
    if walk.later:
        parts.append(f"{len(walk.later)} behind the query's position, never read")
    return "entries: " + ", ".join(parts) if parts else ""


def _table(walk: Walk, at: int) -> str:
    rows: list[tuple[str, ...]] = []
    shown = shown_entries(walk, at)
    slots = {index: _slots(walk, index) for index in shown if index is not None}
    width = max(columns_of(token) for found in slots.values() for token, _ in found)
    for index in shown:
        if index is None:
            rows.append(("…", *[""] * 6))
            continue
        entry, cells = walk.entries[index], [token + " " * (width - columns_of(token)) + f" {score:>6}"
                                             for token, score in slots[index]]
        first, *more = [f"| {' | '.join(cells[i:i + SLOTS_PER_ROW])} |" for i in range(0, len(cells), SLOTS_PER_ROW)]
        numbers = number(entry.largest), rescaled(walk, index), number(entry.total)
        rows.append((f"{index:>5}", f"{entry.block:>5}", first, *(f"{n:>7}" for n in numbers), vector(entry.weighted)))
        rows += [("", "", row, "", "", "", "") for row in more]
    header = ["entry", "block", "slots: token, score q·k/√d", "      m", "rescale", "      l", "accumulator"]
    return "\n".join([text_table(header, rows), *filter(None, [unread(walk, at)])])


def _slots(walk: Walk, index: int) -> list[tuple[str, str]]:
    slots = [slot(walk, index, offset) if offset is not None else ("…", "") for offset in shown_slots(walk, index)]
    return [(cut(token, CELL), score) for token, score in slots]


def _weights(walk: Walk, at: int) -> str:
    weights = walk.weights(at)
    tokens = [token for entry in walk.entries[:at + 1] for token in entry.tokens]
    shown = heaviest(weights)
    rows = [(i, cut(visible(tokens[i]), CELL), f"{weights[i]:6.1%}", "#" * round(BAR * weights[i])) for i in shown]
    rest = len(weights) - len(shown)
    others = f"the other {rest} together {sum(weights) - sum(weights[i] for i in shown):.1%}"
    name = "weights a_ij = exp(score - m) / l" if at == len(walk.entries) - 1 else "weights so far, exp(score - m) / l"
    return "\n".join([text_table(["position", "token", "weight", ""], rows, name), *[others] * (rest > 0)])
