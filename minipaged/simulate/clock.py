"""Runs a workload against a clock instead of a model, and looks at the memory on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from ..params import SamplingParams
from ..sequence import Sequence, SequenceGroup
from .usage import Usage, usage

if TYPE_CHECKING:
    from ..scheduler import Scheduler


class Moment(NamedTuple):
    """What `play` saw: seconds on its clock, requests running and waiting, and the use of the pool."""

    time: float
    running: int
    waiting: int
    usage: Usage


def opt_13b_step(batch: int, prompt_tokens: int) -> float:
    """Seconds of one iteration of OPT-13B on an A100: 25.6 ms + 0.44 ms per sequence + 0.13 ms per prompt token.

    The first two are a fit to the decoding rates of Figure 1; the third is a guess (Figure 19a's prefill of 256 tokens
    in about 39 ms is near it). Where memory is always full the shares hardly depend on them.
    """
    return (25.6 + 0.44 * batch + 0.13 * prompt_tokens) / 1000


def mean_usage(moments: Iterable[Moment], since: float = 0.0) -> Usage:
    """The mean use of the pool from ``since`` seconds on; Figure 2 takes it from 300 to 900 s."""
    return Usage(*map(fmean, zip(*(moment.usage for moment in moments if moment.time >= since))))


class Iteration(NamedTuple):
    """One iteration on the clock: its seconds, what was scheduled, and those of it that this iteration completes."""

    begin: float
    end: float
    scheduled: list[tuple[SequenceGroup, list[Sequence]]]
    completed: list[SequenceGroup]


def request(number: int, prompt: int, output: int) -> SequenceGroup:
    """A request of so many prompt and output tokens, for a run without a model."""
    return SequenceGroup(number, [Sequence(number, [0] * prompt, prompt)], SamplingParams(), None, prompt + output, 0)


def iterations(scheduler: Scheduler, arrivals: Iterable[tuple[float, SequenceGroup]],
               step_seconds: Callable[[int, int], float] = opt_13b_step, until: float = inf) -> Iterator[Iteration]:
    """Run requests without a model until the clock says ``until``; each iteration is given before it adds its tokens.

    Parameters
    ----------
    arrivals : iterable of (seconds, request of one sequence)
        In order. A request generates until it has ``max_len`` tokens.
    step_seconds : function of (sequences in the batch, prompt tokens in it)
        How long an iteration takes.
    """
    queue, clock = list(arrivals)[::-1], 0.0
    while clock < until and (queue or scheduler.has_unfinished):
        if not scheduler.has_unfinished:
            clock = max(clock, queue[-1][0])
        while queue and queue[-1][0] <= clock:
            scheduler.add(queue.pop()[1])
        scheduled = scheduler.schedule().scheduled
        prompt_tokens = sum(seq.num_new for _, (seq,) in scheduled if not seq.num_computed)
        begin, clock = clock, clock + step_seconds(len(scheduled), prompt_tokens)
        completed = [group for group, (seq,) in scheduled if len(seq.token_ids) + 1 == group.max_len]
        yield Iteration(begin, clock, scheduled, completed)
        for _, (seq,) in scheduled:
            seq.num_computed = len(seq.token_ids)
            seq.token_ids.append(0)
        for group in completed:
            scheduler.remove(group)


def play(scheduler: Scheduler, arrivals: Iterable[tuple[float, SequenceGroup]], until: float, every: int = 20,
         step_seconds: Callable[[int, int], float] = opt_13b_step) -> list[Moment]:
    """Run `iterations` until the clock says ``until``; returns every so many of them a `Moment`."""
    return [Moment(iteration.begin, len(iteration.scheduled), len(scheduler.waiting), usage(scheduler.manager))
            for step, iteration in enumerate(iterations(scheduler, arrivals, step_seconds, until)) if step % every == 0]
