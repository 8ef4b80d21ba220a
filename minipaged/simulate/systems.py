"""The five systems of §6.1 behind one interface: requests go in, iterations come out, tokens are zeros.

vLLM and the three Orcas are the real scheduler over their memory; FasterTransformer has batches of a fixed size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from itertools import count
from typing import Protocol

from ..admission import check_room
from ..errors import InvalidConfig
from ..memory.manager import BlockSpaceManager
from ..params import BeamSearchParams, SamplingParams
from ..scheduler import PreemptionMode, Scheduler
from ..sequence import Sequence, SequenceGroup, Status
from ..trace import NO_TRACE, Trace
from .contiguous import ContiguousSpaceManager
from .cost import FASTER_TRANSFORMER, VLLM, Engine, Work
from .workloads import Request

SYSTEMS = ("FasterTransformer", "Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "vLLM")
ESTIMATES = {"Orca (Max)": "max", "Orca (Pow2)": "pow2", "Orca (Oracle)": "oracle"}


class Beams(Protocol):
    """Which beams go on: what a model would have decided."""

    def __call__(self, request: int, step: int) -> Items[int]:
        """The parent of each new beam, the best first, as an index into the beams before; all 0 at step 0."""


class System(Protocol):
    """What `clock.run` drives: `add`, then again and again `schedule` and `commit`."""

    engine: Engine

    @property
    def has_unfinished(self) -> bool:
        """Whether anything is left to do."""

    def add(self, number: int, request: Request) -> None:
        """A request arrives."""

    def schedule(self) -> tuple[Work, list[int]]:
        """Decide one iteration; returns its work, and the requests that it will complete."""

    def commit(self) -> None:
        """The iteration is over: each of its sequences has one more token."""


class ContinuousBatching:
    """Requests join and leave at every iteration (§2.3): the real scheduler over a memory.

    Parameters
    ----------
    scheduler : Scheduler
        Over a `BlockSpaceManager` or a `ContiguousSpaceManager`.
    width : int
        Sequences of each request: samples, or beams if there are ``beams``.
    beams : Beams or None
        How beams fork and die; the first tokens come from one sequence, the prompt.
    prefix : int
        So many leading tokens of all prompts are the same, and a paged memory keeps them for all (§4.4).
    """

    engine = VLLM

    def __init__(self, scheduler: Scheduler, width: int = 1, beams: Beams | None = None, prefix: int = 0) -> None:
        self.scheduler, self.manager, self.width, self.beams = scheduler, scheduler.manager, width, beams
        self.paged = isinstance(self.manager, BlockSpaceManager)
        self._ids = count()
        self._scheduled: list[tuple[SequenceGroup, list[Sequence]]] = []
        self._copied = 0
        if prefix and self.paged:
            self._register(prefix)

    def _register(self, tokens: int) -> None:
        """Pin the blocks of a prefix whose keys and values the provider computed beforehand."""
        reader = Sequence(next(self._ids), [0] * tokens, tokens)
        self.manager.allocate(SequenceGroup(-1, [reader], SamplingParams(), None, tokens + 1, 0))
        self.manager.prefixes[reader.seq_id] = reader.token_ids

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits, runs or is swapped out."""
        return self.scheduler.has_unfinished

    def add(self, number: int, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        RequestTooLarge
            The pool could not hold it even alone.
        """
        params = (BeamSearchParams(self.width, request.output) if self.beams
                  else SamplingParams(n=self.width, max_tokens=request.output))
        seq = Sequence(next(self._ids), [0] * request.prompt, request.prompt)
        group = SequenceGroup(number, [seq], params, None, request.prompt + request.output, 0)
        if self.paged:
            manager = self.manager
            check_room(request.prompt, group.max_len, params, manager.block_size,
                       manager.num_pinned_full(seq.token_ids), manager.device.num_blocks - manager.num_pinned)
        self.scheduler.add(group)

    def schedule(self) -> tuple[Work, list[int]]:
        """One iteration of the scheduler; its blocks are allocated and exchanged."""
        self.manager.trace.begin_step()
        out = self.scheduler.schedule()
        self._scheduled = out.scheduled
        seqs = tokens = context = 0
        completed = []
        for group, running in out.scheduled:
            length = len(running[0].token_ids)  # the same for all sequences of a request
            seqs += len(running)
            for seq in running:
                if (new := length - seq.num_computed) == 1 and length > 1:
                    context += length
                tokens += new
            if length + 1 == group.max_len:
                completed.append(group.request_id)
        copied, self._copied = self._copied + len(out.blocks_to_copy) * self.manager.block_size, 0
        return Work(seqs, tokens, context, copied, len(out.blocks_to_swap_in), len(out.blocks_to_swap_out)), completed

    def commit(self) -> None:
        """Each sequence that ran has one more token; what this ends, gives its blocks back."""
        if self.width > 1 and self.beams is None:
            self._fork_samples()
        ended = []
        for group, seqs in self._scheduled:
            length = len(seqs[0].token_ids)
            for seq in seqs:
                seq.num_computed = length
            if self.beams is not None:
                self._beam_step(group, seqs)
            for token, seq in enumerate(group.seqs):
                seq.token_ids.append(token)  # differs between them, so that what follows is never taken for shared
            if length + 1 == group.max_len:
                self._finish(group.seqs)
                ended.append(group)
        for group in ended:
            self.scheduler.remove(group)

    def _fork_samples(self) -> None:
        for group, seqs in self._scheduled:
            if len(group.seqs) < self.width:  # the prompt has just been computed
                seqs[0].num_computed = len(seqs[0].token_ids)
                group.seqs += [self._fork(seqs[0]) for _ in range(self.width - 1)]

    def _fork(self, parent: Sequence) -> Sequence:
        child = parent.fork(next(self._ids))
        self.manager.fork(parent, child)
        if not self.paged:
            self._copied += len(parent.token_ids)
        return child

    def _beam_step(self, group: SequenceGroup, seqs: list[Sequence]) -> None:
        """As in the engine: its first child continues a beam, further ones fork it, one without any is dropped."""
        if len(seqs[0].token_ids) + 1 == group.max_len:
            return
        parents = self.beams(group.request_id, seqs[0].num_generated)
        if not self.paged and len(seqs) == self.width:  # a dropped beam's reservation gets a copy of the forked one
            self._copied += (len(parents) - len(set(parents))) * len(seqs[0].token_ids)
            return
        continued: set[int] = set()
        children = []
        for parent in parents:
            children.append(self._fork(seqs[parent]) if parent in continued else seqs[parent])
            continued.add(parent)
        self._finish([seq for index, seq in enumerate(seqs) if index not in continued])
        group.seqs = children

    def _finish(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self.manager.free(seq)
            seq.status = Status.FINISHED


class StaticBatching:
    """FasterTransformer under a scheduler of its own: the earliest requests in one batch, padded to the longest prompt,
    until the longest output ends; all answers leave together.

    Parameters
    ----------
    size : int
        Requests in a batch at most: what the memory holds.

    Source: §6.1 "Baseline 1"; the artifact cuts a batch where longest prompt and longest output exceed 2040 together.
    """

    engine = FASTER_TRANSFORMER

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InvalidConfig(f"a batch of {size} requests; give 1 or more")
        self.size = size
        self.waiting: deque[tuple[int, Request]] = deque()
        self.batch: list[tuple[int, Request]] = []
        self._step = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.batch or self.waiting)

    def add(self, number: int, request: Request) -> None:
        """Queue a request."""
        self.waiting.append((number, request))

    def schedule(self) -> tuple[Work, list[int]]:
        """One step of the batch; a new batch is made of what waits."""
        if not self.batch:
            self._step = 0
            self._fill()
        requests = [request for _, request in self.batch]
        count, width = len(requests), max(request.prompt for request in requests)
        last = self._step + 1 == max(request.output for request in requests)
        work = Work(count, count, count * (width + self._step)) if self._step else Work(count, count * width, 0)
        return work, [number for number, _ in self.batch] if last else []

    def _fill(self) -> None:
        prompt = output = 0
        while self.waiting and len(self.batch) < self.size:
            request = self.waiting[0][1]
            prompt, output = max(prompt, request.prompt), max(output, request.output)
            if self.batch and prompt + output > 2040:
                return
            self.batch.append(self.waiting.popleft())

    def commit(self) -> None:
        """The batch has one more token, or is done."""
        self._step += 1
        if self._step == max(request.output for _, request in self.batch):
            self.batch = []


# FasterTransformer's batches by server and workload: what the memory holds, as the artifact has it.
BATCHES = {("OPT-13B", "ShareGPT"): 5, ("OPT-13B", "Alpaca"): 14, ("OPT-66B", "ShareGPT"): 2, ("OPT-66B", "Alpaca"): 8,
           ("OPT-175B", "ShareGPT"): 24, ("OPT-175B", "Alpaca"): 80}


def make_system(name: str, blocks: int, block_size: int = 16, width: int = 1, beams: Beams | None = None,
                prefix: int = 0, preemption: PreemptionMode | None = None, max_num_seqs: int | None = None,
                batch: int = 1, trace: Trace = NO_TRACE) -> System:
    """One of `SYSTEMS` with an empty pool.

    Parameters
    ----------
    blocks, block_size : int
        The pool; of no meaning to FasterTransformer.
    width, beams, prefix
        As in `ContinuousBatching`.
    preemption : "swap", "recompute" or None
        As in `Scheduler`; vLLM's alone. The host pool is as large as the GPU's, which always suffices (§4.5).
    max_num_seqs : int or None
        Sequences at a time; None: the artifact's, 2048 for vLLM and 256 for the Orcas.
    batch : int
        FasterTransformer's; `BATCHES` has the paper's.
    trace : Trace
        Told what vLLM's block manager does.

    Raises
    ------
    InvalidConfig
        The system is unknown, or so few sequences may run that no request ever does.
    """
    if name == "FasterTransformer":
        return StaticBatching(batch)
    if name == "vLLM":
        manager, most = BlockSpaceManager(block_size, blocks, blocks, trace=trace), 2048
    elif name in ESTIMATES:
        manager, most = ContiguousSpaceManager(ESTIMATES[name], block_size, blocks), 256
    else:
        raise InvalidConfig(f"the system is {name!r}; give one of {', '.join(SYSTEMS)}")
    most = most if max_num_seqs is None else max_num_seqs
    if width > most:
        raise InvalidConfig(f"requests of {width} sequences, and {most} run at a time; let more run")
    return ContinuousBatching(Scheduler(manager, most, 2560, preemption), width, beams, prefix)
