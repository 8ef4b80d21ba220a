"""What the engine does to memory, as one stream of small typed events; replayed here without torch.

Every picture is drawn from this stream. A trace in a file is JSON Lines: one event a line, the first of them
`Start`, which names the schema version.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TextIO

from .display import Shown
from .errors import TraceError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; ``step`` counts iterations of the engine, 0 before the first."""

    kind: ClassVar[str] = ""
    step: int


@dataclass(frozen=True, slots=True)
class Start(Event):
    """The engine was made: the sizes of its pools and what computes its attention, and why."""

    kind: ClassVar[str] = "start"
    schema: int
    model: str
    block_size: int
    num_blocks: int
    num_host_blocks: int
    max_model_len: int
    bytes_per_token: int
    attention: str
    attention_reason: str


@dataclass(frozen=True, slots=True)
class Add(Event):
    """A request arrived and waits; ``texts[i]`` is the text of token ``token_ids[i]`` of its prompt."""

    kind: ClassVar[str] = "add"
    request: int
    seq: int
    token_ids: list[int]
    texts: list[str]


@dataclass(frozen=True, slots=True)
class Begin(Event):
    """An iteration begins."""

    kind: ClassVar[str] = "begin"


@dataclass(frozen=True, slots=True)
class Admit(Event):
    """A waiting request joins the running ones."""

    kind: ClassVar[str] = "admit"
    request: int


@dataclass(frozen=True, slots=True)
class Allocate(Event):
    """A free physical block becomes logical block ``logical`` of a sequence."""

    kind: ClassVar[str] = "allocate"
    seq: int
    logical: int
    block: int


@dataclass(frozen=True, slots=True)
class Share(Event):
    """A block that is in use becomes logical block ``logical`` of one more sequence."""

    kind: ClassVar[str] = "share"
    seq: int
    logical: int
    block: int


@dataclass(frozen=True, slots=True)
class Fork(Event):
    """Sequence ``seq`` of a request begins as a copy of ``parent``'s tokens; its blocks follow as `Share`."""

    kind: ClassVar[str] = "fork"
    request: int
    parent: int
    seq: int


@dataclass(frozen=True, slots=True)
class Copy(Event):
    """Copy-on-write (§4.4): logical block ``logical`` of a sequence moves from block ``src`` to the new ``dst``."""

    kind: ClassVar[str] = "copy"
    seq: int
    logical: int
    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class Write(Event):
    """Keys and values of positions ``start`` to ``end - 1`` of a sequence are written to their slots."""

    kind: ClassVar[str] = "write"
    seq: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Sample(Event):
    """A token was generated; its keys and values are not in the cache before the next iteration."""

    kind: ClassVar[str] = "sample"
    seq: int
    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class SwapOut(Event):
    """All blocks of a request move to host memory (§4.5); ``blocks`` pairs device and host numbers."""

    kind: ClassVar[str] = "swap_out"
    request: int
    blocks: list[list[int]]


@dataclass(frozen=True, slots=True)
class SwapIn(Event):
    """All blocks of a request come back from host memory; ``blocks`` pairs host and device numbers."""

    kind: ClassVar[str] = "swap_in"
    request: int
    blocks: list[list[int]]


@dataclass(frozen=True, slots=True)
class Preempt(Event):
    """A request gives up all its blocks (§4.5), by "recompute" or "swap"."""

    kind: ClassVar[str] = "preempt"
    request: int
    why: str
    how: str


@dataclass(frozen=True, slots=True)
class Free(Event):
    """A sequence gives up its blocks, of the device or the host pool; one without any other reader is free again."""

    kind: ClassVar[str] = "free"
    seq: int
    blocks: list[int]
    host: bool


@dataclass(frozen=True, slots=True)
class Finish(Event):
    """A sequence ends, with finish reason "stop", "length" or "abort", or "dropped" if better beams replaced it."""

    kind: ClassVar[str] = "finish"
    request: int
    seq: int
    reason: str


KINDS: dict[str, type[Event]] = {event.kind: event for event in Event.__subclasses__()}


class Trace(Shown):
    """The events of one engine, in memory and, if a path is given, written to a file as they come.

    Parameters
    ----------
    path : str or Path or None
        A JSON Lines file to write.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.events: list[Event] = []
        self.step = 0
        self._file: TextIO | None = None if path is None else open(path, "w", encoding="utf-8")

    def emit(self, event: type[Event], **what: Any) -> None:
        """Append an event of the present step."""
        self.events.append(event(step=self.step, **what))
        if self._file is not None:
            try:
                self._file.write(to_json(self.events[-1]) + "\n")
            except OSError as error:  # a full disk must not stop the engine in the middle of an iteration
                warnings.warn(f"the trace file ends here, the engine goes on: {error}", stacklevel=2)
                self._file = None

    def begin_step(self) -> None:
        """Count an iteration and tell that it begins."""
        self.step += 1
        self.emit(Begin)

    def close(self) -> None:
        """Close the file, if there is one; the events stay."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self, step: int | None = None) -> "MemoryState":
        """The memory after ``step`` iterations (None: after all of them)."""
        return replay(self.events, step)

    def __len__(self) -> int:
        return len(self.events)

    def _rows(self) -> tuple[list[str], list[tuple[str, int]], str]:
        counts = Counter(event.kind for event in self.events)
        return ["event", "times"], list(counts.items()), f"{len(self.events)} events in {self.step} iterations"


class _NoTrace(Trace):
    """Takes events and keeps none."""

    def emit(self, event: type[Event], **what: Any) -> None:
        """Do nothing."""


NO_TRACE = _NoTrace()


def to_json(event: Event) -> str:
    """One line of a trace file."""
    return json.dumps({"kind": event.kind, **asdict(event)}, ensure_ascii=False)


def load(path: str | Path) -> list[Event]:
    """Read a trace file.

    Raises
    ------
    TraceError
        With the line: it is no trace, of another schema version, or was cut off.
    """
    # A byte that is no UTF-8 becomes a character that no JSON begins with, and so an error with its line.
    with open(path, encoding="utf-8", errors="replace") as lines:
        events = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if not events or not isinstance(events[0], Start):
        raise TraceError(f"{path}, line 1: not a minipaged trace; its first event must be 'start'")
    return events


def _parse(line: str, where: str) -> Event:
    try:
        record = json.loads(line)
        kind = KINDS[record.pop("kind")]
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}: cut off or not JSON ({error}); write the trace again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{where}: not an event of a minipaged trace") from error
    if kind is Start and record.get("schema") != SCHEMA:
        raise TraceError(f"{where}: schema version {record.get('schema')}; this minipaged reads {SCHEMA}")
    if set(record) != {field.name for field in fields(kind)}:
        raise TraceError(f"{where}: a {kind.kind!r} event does not have the fields {sorted(record)}")
    return kind(**record)


class MemoryState:
    """The whole memory at one moment, as plain Python values.

    Attributes
    ----------
    start : Start
        The sizes of the pools.
    step : int
        Iterations done.
    tables : dict[int, list[int]]
        Sequence to physical block numbers, in logical order; host block numbers while it is swapped out.
    num_tokens : dict[int, int]
        Sequence to slots of its table that hold keys and values.
    tokens, token_ids : dict[int, list]
        Sequence to the texts and ids of its tokens, prompt and output.
    prompt_len : dict[int, int]
        Sequence to the number of its tokens that are the prompt's.
    request_of : dict[int, int]
        Sequence to request.
    status : dict[int, str]
        Request to "waiting", "running", "swapped" or "finished".
    unfinished : dict[int, set[int]]
        Request to those of its sequences that still generate.
    ref_counts, host_ref_counts : list[int]
        Readers per physical block of each pool.
    """

    def __init__(self, start: Start) -> None:
        self.start, self.step = start, 0
        self.tables: dict[int, list[int]] = {}
        self.num_tokens: dict[int, int] = {}
        self.tokens: dict[int, list[str]] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.prompt_len: dict[int, int] = {}
        self.request_of: dict[int, int] = {}
        self.status: dict[int, str] = {}
        self.ref_counts = [0] * start.num_blocks
        self.host_ref_counts = [0] * start.num_host_blocks
        self.unfinished: dict[int, set[int]] = {}

    def sequences(self, request: int) -> list[int]:
        """The sequences of a request that hold blocks."""
        return [seq for seq in self.tables if self.request_of[seq] == request]

    def on_host(self, seq: int) -> bool:
        """Whether a sequence is swapped out."""
        return self.status[self.request_of[seq]] == "swapped"

    def filled(self, seq: int, logical: int) -> int:
        """Slots of a logical block that hold keys and values."""
        size = self.start.block_size
        return min(max(self.num_tokens[seq] - logical * size, 0), size)

    def owners(self, host: bool = False) -> dict[int, list[tuple[int, int]]]:
        """Physical block to its readers, as (sequence, logical block), for the device or the host pool."""
        found: dict[int, list[tuple[int, int]]] = {}
        for seq, blocks in self.tables.items():
            if self.on_host(seq) == host:
                for logical, block in enumerate(blocks):
                    found.setdefault(block, []).append((seq, logical))
        return found

    def slots(self, seq: int, logical: int) -> list[str]:
        """The texts of the tokens in a block's filled slots."""
        first = logical * self.start.block_size
        return self.tokens[seq][first:first + self.filled(seq, logical)]

    def apply(self, event: Event) -> None:
        """Do to this state what the event says."""
        self.step = event.step
        getattr(self, f"_{event.kind}", lambda event: None)(event)

    def _add(self, e: Add) -> None:
        self.request_of[e.seq], self.status[e.request] = e.request, "waiting"
        self.unfinished[e.request] = {e.seq}
        self.tokens[e.seq], self.token_ids[e.seq] = list(e.texts), list(e.token_ids)
        self.prompt_len[e.seq] = len(e.token_ids)

    def _admit(self, e: Admit) -> None:
        self.status[e.request] = "running"

    def _allocate(self, e: Allocate) -> None:
        self.tables.setdefault(e.seq, []).append(e.block)
        self.num_tokens.setdefault(e.seq, 0)
        self.ref_counts[e.block] += 1

    def _share(self, e: Share) -> None:
        self._allocate(e)

    def _fork(self, e: Fork) -> None:
        self.request_of[e.seq], self.prompt_len[e.seq] = e.request, self.prompt_len[e.parent]
        self.tokens[e.seq], self.token_ids[e.seq] = list(self.tokens[e.parent]), list(self.token_ids[e.parent])
        self.num_tokens[e.seq] = self.num_tokens[e.parent]
        self.unfinished[e.request].add(e.seq)

    def _copy(self, e: Copy) -> None:
        self.tables[e.seq][e.logical] = e.dst
        self.ref_counts[e.src] -= 1
        self.ref_counts[e.dst] += 1

    def _write(self, e: Write) -> None:
        self.num_tokens[e.seq] = e.end

    def _sample(self, e: Sample) -> None:
        self.tokens[e.seq].append(e.text)
        self.token_ids[e.seq].append(e.token_id)

    def _free(self, e: Free) -> None:
        counts = self.host_ref_counts if e.host else self.ref_counts
        for block in e.blocks:
            counts[block] -= 1
        del self.tables[e.seq], self.num_tokens[e.seq]

    def _swap_out(self, e: SwapOut) -> None:
        self._move(e, self.ref_counts, self.host_ref_counts, "swapped")

    def _swap_in(self, e: SwapIn) -> None:
        self._move(e, self.host_ref_counts, self.ref_counts, "running")

    def _move(self, e: SwapOut | SwapIn, source: list[int], target: list[int], status: str) -> None:
        moved = dict(e.blocks)
        for seq in self.sequences(e.request):
            for logical, block in enumerate(self.tables[seq]):
                source[block] -= 1
                target[moved[block]] += 1
                self.tables[seq][logical] = moved[block]
        self.status[e.request] = status

    def _preempt(self, e: Preempt) -> None:
        if e.how == "recompute":
            self.status[e.request] = "waiting"

    def _finish(self, e: Finish) -> None:
        self.unfinished[e.request].discard(e.seq)
        if not self.unfinished[e.request]:
            self.status[e.request] = "finished"


def states(events: Iterable[Event]) -> Iterator[tuple[Event, MemoryState]]:
    """Each event with the (one, changing) state after it.

    Raises
    ------
    TraceError
        The events do not begin with `Start`.
    """
    state = None
    for event in events:
        if isinstance(event, Start):
            state = MemoryState(event)
        elif state is None:
            raise TraceError("a trace begins with its 'start' event; give all of its events")
        state.apply(event)
        yield event, state


def replay(events: Iterable[Event], step: int | None = None) -> MemoryState:
    """The state after ``step`` iterations (None: after all events).

    Raises
    ------
    TraceError
        There is no event, or the first is not `Start`.
    """
    state = None
    for event, state in states(event for event in events if step is None or event.step <= step):
        pass
    if state is None:
        raise TraceError("an empty trace has no state; run a request first")
    return state
