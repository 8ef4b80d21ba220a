"""The simulator decides as the engine does: for the same arrivals and lengths, the same blocks at every step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import zip_longest

import pytest

from minipaged import BeamSearchParams, EngineConfig, SamplingParams
from minipaged.beam import Candidate
from minipaged.engine import LLMEngine
from minipaged.memory.manager import BlockSpaceManager
from minipaged.output_processor import OutputProcessor
from minipaged.scheduler import Scheduler
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.simulate.clock import run
from minipaged.simulate.systems import ContinuousBatching
from minipaged.simulate.workloads import Request
from minipaged.trace import Event, Trace

BLOCK_SIZE = 4
DECISIONS = {"admit", "allocate", "share", "copy", "write", "preempt", "swap_out", "swap_in", "free"}


def some_requests(seed: int, most: int = 30) -> list[Request]:
    """A dozen requests that come in bursts, one of them after all others are done."""
    draw = random.Random(seed)
    times = sorted(draw.randint(0, 12) for _ in range(11)) + [400]
    return [Request(float(time), draw.randint(1, most), draw.randint(1, most)) for time in times]


def decisions(events: list[Event]) -> Iterator[tuple[int, str, dict[str, object]]]:
    """What was decided, step by step; sequences and requests are numbered as they appear."""
    numbers = {"seq": {}, "request": {}}
    first = next(event.step for event in events if event.kind == "admit")
    for event in events:
        if event.kind in DECISIONS:
            what = asdict(event)
            step = what.pop("step") - first
            for name in what.keys() & numbers.keys():
                what[name] = numbers[name].setdefault(what[name], len(numbers[name]))
            yield step, event.kind, what


def real(engine: LLMEngine, requests: list[Request], width: int, beams: bool, prefix: int) -> list[Event]:
    """The events of the engine, with an iteration a second."""
    draw, shared = random.Random(0), [100 + i for i in range(prefix)]
    if prefix:
        engine.register_prefix(shared)
    begun, clock, arriving = len(engine.manager.trace.events), 0.0, list(requests)
    while arriving or engine.scheduler.has_unfinished:
        if not engine.scheduler.has_unfinished:
            clock = max(clock, arriving[0].time)
        while arriving and arriving[0].time <= clock:
            _, prompt, output = arriving.pop(0)
            # So hot that no two samples begin alike, which would be shared after a recomputation.
            params = (BeamSearchParams(width, output, ignore_eos=True) if beams else
                      SamplingParams(n=width, temperature=50.0, max_tokens=output, ignore_eos=True))
            engine.add_request(shared + [draw.randint(5, 3000) for _ in range(prompt - prefix)], params)
        engine.step()
        clock += 1.0
    return engine.manager.trace.events[begun:]


@pytest.fixture(scope="module")
def block_bytes() -> int:
    engine = LLMEngine(EngineConfig("tiny-opt", block_size=BLOCK_SIZE, num_gpu_blocks_override=1))
    return BLOCK_SIZE * engine.runner.bytes_per_token


@pytest.mark.parametrize(("mode", "blocks", "host_blocks", "width", "beams", "prefix"), [
    (None, 200, 0, 1, False, 0), ("recompute", 18, 0, 1, False, 0), ("swap", 18, 18, 1, False, 0),
    ("recompute", 28, 0, 3, False, 0), ("swap", 28, 28, 3, False, 0), (None, 28, 6, 3, False, 0),
    ("recompute", 28, 0, 3, True, 0), ("swap", 28, 28, 3, True, 0), (None, 32, 5, 4, True, 0),
    ("recompute", 28, 0, 2, False, 10), ("swap", 28, 28, 2, False, 10),
])
def test_the_simulator_decides_as_the_engine(mode: str | None, blocks: int, host_blocks: int, width: int, beams: bool,
                                             prefix: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parents: dict[tuple[int, int], list[int]] = {}
    advance = OutputProcessor.advance_beams

    def noted(self: OutputProcessor, group: SequenceGroup, seqs: list[Sequence], running: list[Candidate]) -> None:
        parents[group.request_id, seqs[0].num_generated] = [beam.parent for beam in running]
        advance(self, group, seqs, running)

    monkeypatch.setattr(OutputProcessor, "advance_beams", noted)
    most = 24 if width == 1 else 20
    requests = [request._replace(prompt=request.prompt + prefix) for request in some_requests(7 * width + blocks, most)]
    engine = LLMEngine(EngineConfig("tiny-opt", block_size=BLOCK_SIZE, num_gpu_blocks_override=blocks, max_num_seqs=16,
                                    preemption_mode=mode, swap_space=host_blocks * block_bytes / 2**30), Trace())
    assert engine.runner.num_cpu_blocks == host_blocks
    decided = list(decisions(real(engine, requests, width, beams, prefix)))

    scheduler = Scheduler(BlockSpaceManager(BLOCK_SIZE, blocks, host_blocks, trace=Trace()), 16,
                          engine.scheduler.max_num_batched_tokens, mode)
    simulated = ContinuousBatching(scheduler, width, (lambda *when: parents[when]) if beams else None, prefix)
    begun = len(scheduler.manager.trace.events)
    for _ in run(simulated, requests, lambda work: 1.0):
        pass
    for theirs, ours in zip_longest(decided, decisions(scheduler.manager.trace.events[begun:])):
        assert ours == theirs
    found = Counter(kind for _, kind, _ in decided)
    assert found["admit"] >= len(requests) and (found["copy"] > 0 or width == 1)
    how = Counter(what["how"] for _, kind, what in decided if kind == "preempt")
    assert bool(how) == (blocks < 100), "shortage"
    assert mode is None or not how or mode in how
