"""What the text and the SVG rendering both show: labels, slots and physical blocks of one `MemoryState`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import TraceError
from ..replay import MemoryState, states
from ..trace import Event, Write

SLOTS_PER_ROW = 4  # as in the paper's figures; a bigger block takes several rows
MAX_ROWS = 36      # of slots: beyond, a picture would not fit a screen and the compact map takes over
NUMBERED = 256     # blocks up to which each cell of the compact map has room for its number


@dataclass(frozen=True)
class Frame:
    """One moment: the state, and the positions written in its last iteration.

    Attributes
    ----------
    state : MemoryState
        Is only read.
    written : dict[int, range]
        Sequence to the positions whose keys and values the last iteration wrote; empty if that is not known.
    """

    state: MemoryState
    written: dict[int, range]


@dataclass(frozen=True)
class Slot:
    """Room for one token's keys and values.

    Attributes
    ----------
    text : str
        The token as `visible` shows it; empty if the slot is.
    kind : str
        "prompt", "generated" or "empty" (the two shadings of Figure 7, and white).
    new : bool
        Whether the last iteration wrote it.
    """

    text: str
    kind: str
    new: bool


@dataclass(frozen=True)
class Block:
    """One physical block.

    Attributes
    ----------
    number : int
        In its pool.
    readers : list[(sequence, logical block)]
        Empty if it is free.
    slots : list[Slot] [block_size]
        What is in it.
    """

    number: int
    readers: list[tuple[int, int]]
    slots: list[Slot]

    @property
    def filled(self) -> int:
        """Slots that hold keys and values."""
        return sum(slot.kind != "empty" for slot in self.slots)


def frame_of(source: MemoryState | Iterable[Event], step: int | None = None) -> Frame:
    """The moment after ``step`` iterations (None: after all).

    Raises
    ------
    TraceError
        There is no event, the first is not `Start`, or one state is asked for another step than its own.
    """
    if isinstance(source, MemoryState):
        if step not in (None, source.step):
            raise TraceError(f"this state is that of step {source.step}, not {step}; give the trace instead")
        return Frame(source, {})
    state, writes = None, []
    for event, state in states(event for event in source if step is None or event.step <= step):
        if isinstance(event, Write):
            writes.append(event)
    if state is None:
        raise TraceError("an empty trace has no state; run a request first")
    return Frame(state, {w.seq: range(w.start, w.end) for w in writes if w.step == state.step})


def is_small(state: MemoryState) -> bool:
    """Whether every slot of every block can be shown; else the compact map is drawn."""
    rows = -(-state.start.block_size // SLOTS_PER_ROW)
    blocks = state.start.num_blocks + (state.start.num_host_blocks if any(state.host_ref_counts) else 0)
    logical = sum(map(len, state.tables.values()))
    return max(blocks, logical) * rows <= MAX_ROWS


def slots_of(frame: Frame, seq: int, logical: int) -> list[Slot]:
    """All slots of a logical block, the empty ones too. [block_size]"""
    state, size = frame.state, frame.state.start.block_size
    first, written = logical * size, frame.written.get(seq, range(0))
    slots = [Slot(visible(text), "prompt" if position < state.prompt_len[seq] else "generated", position in written)
             for position, text in enumerate(state.slots(seq, logical), first)]
    return slots + [Slot("", "empty", False)] * (size - len(slots))


def physical_blocks(frame: Frame, host: bool = False) -> list[Block]:
    """Every block of the device or the host pool, in the order of their numbers."""
    state, owners = frame.state, frame.state.owners(host)
    empty = [Slot("", "empty", False)] * state.start.block_size
    blocks = []
    for number in range(state.start.num_host_blocks if host else state.start.num_blocks):
        readers = owners.get(number, [])
        # The readers of a shared block may have come to different lengths; who has filled most knows all its tokens.
        fullest = max(readers, key=lambda reader: state.filled(*reader), default=None)
        blocks.append(Block(number, readers, slots_of(frame, *fullest) if fullest else empty))
    return blocks


def labels(state: MemoryState) -> dict[int, str]:
    """Sequence to its name: A, B, … by request as in Figure 7; A1, A2, … if a request has several (Figure 8)."""
    of_request: dict[int, list[int]] = {}
    for seq, request in state.request_of.items():
        of_request.setdefault(request, []).append(seq)
    return {seq: letters(request) + (str(index) if len(seqs) > 1 else "")
            for request, seqs in of_request.items() for index, seq in enumerate(seqs, 1)}


def letters(number: int) -> str:
    """A … Z, AA, AB, … as a spreadsheet names its columns."""
    rest, last = divmod(number, 26)
    return (letters(rest - 1) if rest else "") + chr(ord("A") + last)


def next_token(state: MemoryState, seq: int) -> str:
    """The token sampled last, whose keys and values the next iteration computes; empty if there is none."""
    if state.status[state.request_of[seq]] == "finished":
        return ""  # it is a registered prefix, to which no token is added
    rest = state.tokens[seq][state.num_tokens[seq]:]
    return visible(rest[0]) if len(rest) == 1 else ""


def waiting(state: MemoryState) -> list[int]:
    """Sequences that wait for their first block, or for blocks again after recomputation was chosen."""
    return [seq for seq, request in state.request_of.items()
            if state.status[request] == "waiting" and seq in state.unfinished[request]]


def visible(text: str) -> str:
    """Token text on one line: a space as a middle dot, and as escapes what cannot be seen or would break lines."""
    def show(char: str) -> str:
        """A character, or what stands for it."""
        if char == " ":
            return "·"
        if char == "\\":
            return r"\\"
        if is_combining(char):
            return "◌" + char  # else it would sit on the character before, which is another token's or ours
        return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")

    return "".join(map(show, text)) or '""'


def is_combining(char: str) -> bool:
    """Whether a character has no column of its own but is drawn over the one before it."""
    return unicodedata.category(char) in ("Mn", "Me")
