"""What the engine does to memory, as one stream of small typed events; `minipaged.replay` reads it back.

Every picture is drawn from this stream. A trace in a file is JSON Lines: one event a line, the first of them
`Start`, which names the schema version.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from .display import Shown
from .errors import TraceError

if TYPE_CHECKING:
    from .replay import MemoryState

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
        from .replay import replay  # which reads events, and so imports this

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
    events, last = [], 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            event = _parse(line, f"{path}, line {number}")
            if event.step > last + 1:
                raise TraceError(f"{path}, line {number}: step {event.step} after step {last}: lines are missing")
            last = event.step if isinstance(event, Start) else max(last, event.step)
            events.append(event)
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
    for field in fields(kind):
        if not _is(record[field.name], field.type):
            raise TraceError(f"{where}: {field.name} is {repr(record[field.name])[:80]}, not {field.type} (from 0 on)")
    return kind(**record)


def _is(value: Any, annotation: str) -> bool:
    """Whether a value is of the type that a field is annotated with; all whole numbers here count from 0."""
    if annotation.startswith("list["):
        return isinstance(value, list) and all(_is(item, annotation[len("list["):-1]) for item in value)
    if annotation == "int":
        return type(value) is int and value >= 0
    return isinstance(value, {"str": str, "bool": bool, "float": (int, float)}[annotation])
