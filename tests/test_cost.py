"""What scheduling and block management cost a step: little, and no more for longer sequences."""

from __future__ import annotations

import time
from itertools import count
from statistics import median

import pytest

from minipaged import SamplingParams
from minipaged.memory.manager import BlockSpaceManager
from minipaged.scheduler import Scheduler
from minipaged.sequence import Sequence, SequenceGroup


def milliseconds_per_step(num_seqs: int, length: int, steps: int = 33, **options: bool) -> float:
    """Median over steps of ``num_seqs`` decoding sequences of that length; the model is left out."""
    manager = BlockSpaceManager(16, num_seqs * (length // 16 + 8), 0, watermark=0, **options)
    scheduler = Scheduler(manager, max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs * length)
    ids = count()
    for _ in range(num_seqs):
        number = next(ids)
        seq = Sequence(number, [(number * 7919 + i) % 5000 for i in range(length)], length)
        scheduler.add(SequenceGroup(number, [seq], SamplingParams(), None, length + 100, 0))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        out = scheduler.schedule()
        for _, seqs in out.scheduled:
            for seq in seqs:
                manager.mark_computed(seq)
        times.append(time.perf_counter() - start)
        assert len(out.seqs) == num_seqs
        for seq in out.seqs:
            seq.num_computed = len(seq.token_ids)
            seq.token_ids.append(5)
    return 1000 * median(times[1:])


@pytest.mark.parametrize("caching", [False, True])
def test_256_sequences_take_less_than_a_millisecond_and_a_half(caching):
    best = min(milliseconds_per_step(256, 200, enable_prefix_caching=caching) for _ in range(5))
    print(f"{best:.2f} ms a step")
    assert best < 1.5


def test_linear_in_sequences_and_constant_in_their_length():
    few, many, longer = (min(milliseconds_per_step(*shape) for _ in range(5))
                         for shape in ((64, 200), (512, 200), (64, 1600)))
    assert many < 8 * few * 2
    assert longer < 2 * few
