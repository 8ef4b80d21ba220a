"""Which sequences run in the next iteration, and who gives way when blocks run out (§4.5)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from . import trace as ev
from .chaos import Chaos
from .errors import InvalidConfig
from .memory.manager import BlockSpaceManager
from .sequence import Sequence, SequenceGroup, Status

PreemptionMode = Literal["swap", "recompute"]
# Of the running requests, in order of arrival: which of them gives way, and how; None leaves the way to the engine.
PreemptionPolicy = Callable[[list[SequenceGroup]], tuple[SequenceGroup, PreemptionMode | None]]


def latest(running: list[SequenceGroup]) -> tuple[SequenceGroup, None]:
    """The policy of first come, first served (§4.5): the request that came last is preempted first."""
    return running[-1], None


@dataclass
class SchedulerOutputs:
    """One iteration: what to run, and which blocks to move before it.

    Attributes
    ----------
    scheduled : list[tuple[SequenceGroup, list[Sequence]]]
        Requests, and those of their sequences whose tokens without keys and values go through the model: whole
        prompts and single tokens, mixed (§4.3).
    blocks_to_swap_out, blocks_to_swap_in : list[tuple[int, int]]
        (device, host) and (host, device) blocks; never both in one iteration.
    blocks_to_copy : list[tuple[int, int]]
        Copy-on-write, (source, destination) in the device pool.
    """

    scheduled: list[tuple[SequenceGroup, list[Sequence]]] = field(default_factory=list)
    blocks_to_swap_out: list[tuple[int, int]] = field(default_factory=list)
    blocks_to_swap_in: list[tuple[int, int]] = field(default_factory=list)
    blocks_to_copy: list[tuple[int, int]] = field(default_factory=list)

    @property
    def seqs(self) -> list[Sequence]:
        """All scheduled sequences, in the order of their tokens in the batch."""
        return [seq for _, seqs in self.scheduled for seq in seqs]


class Scheduler:
    """First come, first served; who is preempted gives up all of its blocks (§4.5).

    Parameters
    ----------
    manager : BlockSpaceManager
        Asked whether blocks suffice, and told what to do.
    max_num_seqs : int
        Sequences in one iteration at most.
    max_num_batched_tokens : int
        Tokens in one iteration at most; a request that needs more by itself, when several long sequences are
        recomputed, runs alone.
    preemption_mode : "swap", "recompute" or None
        How requests give way. None is vLLM v0.1's rule: one with a single sequence is recomputed, others are swapped.
    chaos : Chaos or None
        Preempts besides, for tests and demonstrations.
    policy : PreemptionPolicy or None
        Chooses who gives way when blocks run out, and how. Whatever it chooses, all requests are served, with the
        same tokens; but only `latest`, which None stands for, keeps later ones from overtaking earlier ones.

    Attributes
    ----------
    waiting, running, swapped : list[SequenceGroup]
        The queues, each in order of arrival.
    """

    def __init__(self, manager: BlockSpaceManager, max_num_seqs: int, max_num_batched_tokens: int,
                 preemption_mode: PreemptionMode | None = None, chaos: Chaos | None = None,
                 policy: PreemptionPolicy | None = None) -> None:
        self.manager = manager
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.preemption_mode, self.chaos, self.policy = preemption_mode, chaos, policy or latest
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self.iteration = 0
        self._unmoved: list[SequenceGroup] = []  # swapped out by the present iteration

    @property
    def unfinished(self) -> list[SequenceGroup]:
        """All requests that run, are swapped out, or wait."""
        return self.running + self.swapped + self.waiting

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits, runs or is swapped out."""
        return bool(self.waiting or self.running or self.swapped)

    def add(self, group: SequenceGroup) -> None:
        """Queue a new request behind all others."""
        self.waiting.append(group)

    def remove(self, group: SequenceGroup) -> None:
        """Drop a request from its queue and free its blocks; one that has left the queues stays out."""
        for seq in group.seqs:
            self.manager.free(seq)
        self._take(group)

    def schedule(self) -> SchedulerOutputs:
        """Decide one iteration; blocks are allocated, freed and exchanged on the way.

        Running requests come first; while there are too few blocks for the next token of each, one is preempted. Only
        an iteration that preempted nobody takes requests in: what was just pushed out would otherwise come straight
        back.
        """
        out = SchedulerOutputs()
        self.iteration += 1
        self._unmoved = []
        victims = self.chaos.victims(self.iteration, self.running) if self.chaos else []
        for group, how in victims:
            self._preempt(group, out, "chaos", how)
        if not self._grow_running(out) and not victims:
            while self._take_in_next(out):
                pass
        return out

    def _grow_running(self, out: SchedulerOutputs) -> bool:
        """Give every running sequence a slot for its newest token; returns whether a request was preempted."""
        preempted = False
        while not self.manager.can_append_slots(self.running):
            group, how = self.policy(list(self.running))
            if group not in self.running or how not in ("swap", "recompute", None):
                raise InvalidConfig(f"the preemption policy chose {group!r} and {how!r}; give one of the running "
                                    "requests, and 'swap', 'recompute' or None")
            self._preempt(group, out, "no free block", how)
            preempted = True
        for group in self.running:
            self._append_slots(group, out)
        return preempted

    def _append_slots(self, group: SequenceGroup, out: SchedulerOutputs) -> None:
        seqs = group.unfinished
        for seq in seqs:
            out.blocks_to_copy += self.manager.append_slot(seq)
        out.scheduled.append((group, seqs))

    def _take_in_next(self, out: SchedulerOutputs) -> bool:
        """Swap in or admit the earliest request that does not run, if blocks, tokens and sequences suffice.

        Nobody overtakes (FCFS): behind one that does not fit all others wait, so new requests wait while any is
        swapped out (§4.5). vLLM v0.1 takes all swapped requests before any waiting one, so that with both ways of
        preemption in use a later request may pass an earlier one.
        """
        group = min(self.swapped[:1] + self.waiting[:1], key=attrgetter("request_id"), default=None)
        if group is None:
            return False
        if not self._has_turn(group, out):
            if self.running or group not in self.swapped[:1]:
                return False
            # Alone and still too large: its own copy of a registered prefix is. Recomputed, it shares it again.
            self._recompute_later(group, "no room for a copy of the prefix")
        elif group in self.swapped[:1]:
            out.blocks_to_swap_in += self.manager.swap_in(group)
            self._move(group, self.running, Status.RUNNING)
            self._append_slots(group, out)
        else:
            out.blocks_to_copy += self.manager.allocate(group)
            self._move(group, self.running, Status.RUNNING)
            self.manager.trace.emit(ev.Admit, request=group.request_id)
            out.scheduled.append((group, group.unfinished))
        return True

    def _has_turn(self, group: SequenceGroup, out: SchedulerOutputs) -> bool:
        fits = self.manager.can_swap_in if group in self.swapped[:1] else self.manager.can_allocate
        if not fits(group, beside_others=bool(self.running)):
            return False
        num_seqs = group.width + sum(other.width for other, _ in out.scheduled)
        tokens = sum(seq.num_new for seq in out.seqs + group.unfinished)
        return num_seqs <= self.max_num_seqs and (tokens <= self.max_num_batched_tokens or not out.scheduled)

    def _preempt(self, group: SequenceGroup, out: SchedulerOutputs, why: str, how: PreemptionMode | None = None) -> None:
        """All-or-nothing (§4.5): every block of every sequence of the request is given up.

        Swapping needs room in the host pool; without it the request is recomputed, and the trace says so.
        """
        how = how or self.preemption_mode or ("recompute" if len(group.unfinished) == 1 else "swap")
        if how == "swap" and not self.manager.can_swap_out(group):
            how, why = "recompute", f"{why}; the host pool is full"
        if how == "recompute":
            self._recompute_later(group, why)
        else:
            self.manager.trace.emit(ev.Preempt, request=group.request_id, why=why, how=how)
            out.blocks_to_swap_out += self.manager.swap_out(group)
            self._unmoved.append(group)
            self._move(group, self.swapped, Status.SWAPPED)

    def _recompute_later(self, group: SequenceGroup, why: str) -> None:
        """Free all blocks; the tokens are kept and join the prompt when the request is admitted again (§4.5)."""
        self.manager.trace.emit(ev.Preempt, request=group.request_id, why=why, how="recompute")
        self._drop_blocks(group)
        self._move(group, self.waiting, Status.WAITING)

    def recover(self) -> None:
        """After an iteration that failed anywhere: all requests that it may have touched are recomputed."""
        for group in self.running + [group for group in self.swapped if group in self._unmoved]:
            if group.finished:
                self.remove(group)
            else:
                self._recompute_later(group, "the iteration failed")
        for group in self.waiting:  # one of them may have been about to be admitted
            self._drop_blocks(group)
        self.manager.free_all_but({seq.seq_id for group in self.unfinished for seq in group.seqs})

    def _drop_blocks(self, group: SequenceGroup) -> None:
        for seq in group.unfinished:
            self.manager.free(seq)
            seq.num_computed = 0

    def _take(self, group: SequenceGroup) -> None:
        for queue in (self.running, self.swapped, self.waiting):  # the longest last
            if group in queue:
                queue.remove(group)
                return

    def _move(self, group: SequenceGroup, queue: list[SequenceGroup], status: Status) -> None:
        self._take(group)
        insort(queue, group, key=attrgetter("request_id"))
        for seq in group.unfinished:
            seq.status = status
