"""What the engine itself holds after each iteration, written down while it runs: the truth that pictures are held to.

Nothing here reads events: blocks, readers and lengths come from the BlockSpaceManager, tokens and queues from the
sequences and the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import workloads
from traces import NASTY

from minipaged import Trace
from minipaged.replay import states
from minipaged.text import Tokens
from minipaged.views.frame import labels, visible

TRACES = 200
QUEUES = ("running", "swapped", "waiting")


@dataclass(frozen=True)
class Truth:
    """The engine between two iterations.

    Attributes
    ----------
    blocks : dict[int, list[int]]
        Sequence to its physical blocks, host blocks if it is in ``swapped``.
    stored : dict[int, int]
        Sequence to slots of its table given to tokens.
    tokens : dict[int, list[str]]
        Sequence to the texts of its tokens, made visible; of a registered prefix only those of the prefix.
    queues : dict[str, list[int]]
        The scheduler's lists, sequence by sequence, and "prefix": the readers of registered prefixes.
    refs : dict[bool, list[int]]
        Reference counts of the device pool (False) and the host pool (True).
    """

    size: int
    blocks: dict[int, list[int]]
    stored: dict[int, int]
    swapped: set[int]
    tokens: dict[int, list[str]]
    prompt_len: dict[int, int]
    queues: dict[str, list[int]]
    refs: dict[bool, list[int]]

    def filled(self, seq: int, logical: int) -> int:
        """Slots of a logical block that hold keys and values."""
        return max(0, min(self.stored[seq] - logical * self.size, self.size))

    def slots(self, seq: int, logical: int) -> list[str]:
        """The texts in a logical block's filled slots."""
        first = logical * self.size
        return self.tokens[seq][first:first + self.filled(seq, logical)]

    def readers(self, host: bool, block: int) -> list[tuple[int, int]]:
        """(sequence, logical block) of all whose table names the block, those that fill most of it first."""
        return sorted(self._readers.get((host, block), []), key=lambda reader: -self.filled(*reader))

    @cached_property
    def _readers(self) -> dict[tuple[bool, int], list[tuple[int, int]]]:
        found: dict[tuple[bool, int], list[tuple[int, int]]] = {}
        for seq, table in self.blocks.items():
            for logical, block in enumerate(table):
                found.setdefault((seq in self.swapped, block), []).append((seq, logical))
        return found


class Witness(Trace):
    """A trace that writes down the engine's state before each iteration, and so after the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: Any = None
        self.truths: list[Truth] = []

    def begin_step(self) -> None:
        """As in `Trace`."""
        self.look()
        super().begin_step()

    def names(self) -> list[dict[int, str]]:
        """By step, the name of each sequence; these are the views' own, the engine has only numbers."""
        found: list[dict[int, str]] = [{}] * (self.step + 1)
        for event, state in states(self.events):
            found[event.step] = labels(state)
        return found

    def look(self) -> None:
        """Write the present state down."""
        manager, scheduler, text_of = self.engine.manager, self.engine.scheduler, self.engine.tokens.text_of
        groups = {queue: list(getattr(scheduler, queue)) for queue in QUEUES}
        seqs = {seq.seq_id: seq for queue in groups.values() for group in queue for seq in group.unfinished}
        token_ids = {**{number: seq.token_ids for number, seq in seqs.items()}, **manager.prefixes}
        self.truths.append(Truth(
            manager.block_size, {seq: list(table.blocks) for seq, table in manager.block_tables.items()},
            {seq: table.num_tokens for seq, table in manager.block_tables.items()}, set(manager.swapped),
            {seq: [visible(text_of(token)) for token in ids] for seq, ids in token_ids.items()},
            {**{number: seq.prompt_len for number, seq in seqs.items()},
             **{number: len(ids) for number, ids in manager.prefixes.items()}},
            {**{queue: [seq.seq_id for group in held for seq in group.unfinished] for queue, held in groups.items()},
             "prefix": list(manager.prefixes)},
            {False: list(manager.device.ref_counts), True: list(manager.host.ref_counts)}))


def small(workload: workloads.Workload) -> workloads.Workload:
    """A workload of short requests, whose memory is drawn slot by slot."""
    requests = [replace(request, prompt=request.prompt[:1 + number * 3], params=replace(
        request.params, max_tokens=min(request.params.max_tokens, 7),
        **{name: min(getattr(request.params, name), 3) for name in ("n", "beam_width")
           if hasattr(request.params, name)})) for number, request in enumerate(workload.requests[:4])]
    settings = {**workload.settings, "block_size": 1 + len(workload.requests) % 5}
    prefix = workload.prefix and max((request.prompt for request in requests), key=len)[:3]
    return replace(workload, requests=requests, settings=settings, prefix=prefix, host_blocks=workload.host_blocks % 30,
                   spare_blocks=min(workload.spare_blocks, 3))


@cache
def witnessed(seed: int, checkpoint: Callable[[str], str]) -> Witness:
    """A random workload, served; every other is small, and in every other pair the texts of tokens are hard to show."""
    workload, witness, text_of = workloads.make_workload(seed, lambda name: 512), Witness(), Tokens.text_of
    workload = small(workload) if seed % 2 else workload
    if workload.name == "tiny-opt" and seed % 8 != 3:  # one of eight has real words; the others take less time
        workload = replace(workload, name="opt")
    if seed % 4 < 2:
        Tokens.text_of = lambda self, token: NASTY[token % len(NASTY)] + f"{token}"[:token % 3]
    try:
        workloads.run(workload, checkpoint(workload.name), witness, lambda engine: setattr(witness, "engine", engine))
        witness.look()
    finally:
        Tokens.text_of = text_of
    return witness
