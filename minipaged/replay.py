"""The whole memory state at any step, from the events of a trace alone; without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .errors import TraceError
from .trace import (Add, Admit, Allocate, Copy, Event, Finish, Fork,
                    Free, Preempt, Sample, Share, Start, SwapIn, SwapOut, Write)


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
        if start.block_size < 1:
            raise TraceError("a block has no slot; block_size is at least 1")
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
        _require(len(e.texts) == len(e.token_ids))
        self.request_of[e.seq], self.status[e.request] = e.request, "waiting"
        self.unfinished[e.request] = {e.seq}
        self.tokens[e.seq], self.token_ids[e.seq] = list(e.texts), list(e.token_ids)
        self.prompt_len[e.seq] = len(e.token_ids)

    def _admit(self, e: Admit) -> None:
        _require(e.request in self.status)
        self.status[e.request] = "running"

    def _allocate(self, e: Allocate) -> None:
        _require(e.seq in self.request_of and e.logical == len(self.tables.get(e.seq, [])))
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
        _require(self.tables[e.seq][e.logical] == e.src)
        self.tables[e.seq][e.logical] = e.dst
        self.ref_counts[e.src] -= 1
        self.ref_counts[e.dst] += 1

    def _write(self, e: Write) -> None:
        _require(e.start <= e.end <= len(self.tables[e.seq]) * self.start.block_size)
        self.num_tokens[e.seq] = e.end

    def _sample(self, e: Sample) -> None:
        self.tokens[e.seq].append(e.text)
        self.token_ids[e.seq].append(e.token_id)

    def _free(self, e: Free) -> None:
        _require(self.tables[e.seq] == e.blocks)
        counts = self.host_ref_counts if e.host else self.ref_counts
        for block in e.blocks:
            counts[block] -= 1
        del self.tables[e.seq], self.num_tokens[e.seq]

    def _swap_out(self, e: SwapOut) -> None:
        self._move(e, self.ref_counts, self.host_ref_counts, "swapped")

    def _swap_in(self, e: SwapIn) -> None:
        self._move(e, self.host_ref_counts, self.ref_counts, "running")

    def _move(self, e: SwapOut | SwapIn, source: list[int], target: list[int], status: str) -> None:
        _require(e.request in self.status)
        moved = dict(e.blocks)
        for seq in self.sequences(e.request):
            for logical, block in enumerate(self.tables[seq]):
                source[block] -= 1
                target[moved[block]] += 1
                self.tables[seq][logical] = moved[block]
        self.status[e.request] = status

    def _preempt(self, e: Preempt) -> None:
        _require(e.request in self.status)
        if e.how == "recompute":
            self.status[e.request] = "waiting"

    def _finish(self, e: Finish) -> None:
        _require(e.seq in self.unfinished[e.request])
        self.unfinished[e.request].discard(e.seq)
        kept = e.reason == "abort" and self.status[e.request] == "running"  # what it leaves is a registered prefix
        if kept or not self.unfinished[e.request]:
            self.status[e.request] = "finished"


def _require(follows: bool) -> None:
    if not follows:
        raise LookupError("what the event speaks of is not there")


def states(events: Iterable[Event]) -> Iterator[tuple[Event, MemoryState]]:
    """Each event with the (one, changing) state after it.

    Raises
    ------
    TraceError
        The events do not begin with `Start`, or one cannot follow those before it.
    """
    state = None
    for number, event in enumerate(events, 1):
        if isinstance(event, Start):
            state = MemoryState(event)
        elif state is None:
            raise TraceError("a trace begins with its 'start' event; give all of its events")
        try:
            state.apply(event)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise TraceError(f"event {number} does not follow from those before it, {str(event)[:200]}; give all events "
                             "of one trace") from error
        yield event, state


def until_run(here: list[Event]) -> int:
    """How many of an iteration's events come before its new tokens: what the memory held while the model ran.

    After them, sequences fork, end and are freed.
    """
    for number, event in enumerate(here):
        if isinstance(event, (Fork, Sample, Finish)):
            before = here[number - 1] if number else None  # who ends has given up its blocks just before
            return number - (isinstance(event, Finish) and isinstance(before, Free) and before.seq == event.seq)
    return len(here)


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
