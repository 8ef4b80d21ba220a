"""Runs a workload against a clock instead of a model, and looks at the memory on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from .usage import Usage, usage

if TYPE_CHECKING:
    from ..scheduler import Scheduler
    from ..sequence import SequenceGroup


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


def play(scheduler: Scheduler, arrivals: Iterable[tuple[float, SequenceGroup]], until: float, every: int = 20,
         step_seconds: Callable[[int, int], float] = opt_13b_step) -> list[Moment]:
    """Run requests without a model until the clock says ``until``; returns every so many iterations a `Moment`.

    Parameters
    ----------
    arrivals : iterable of (seconds, request of one sequence)
        In order. A request generates until it has ``max_len`` tokens.
    step_seconds : function of (sequences in the batch, prompt tokens in it)
        How long an iteration takes.
    """
    queue = list(arrivals)[::-1]
    clock, step, moments = 0.0, 0, []
    while clock < until and (queue or scheduler.has_unfinished):
        if not scheduler.has_unfinished:
            clock = max(clock, queue[-1][0])
        while queue and queue[-1][0] <= clock:
            scheduler.add(queue.pop()[1])
        scheduled = scheduler.schedule().scheduled
        if step % every == 0:
            moments.append(Moment(clock, len(scheduled), len(scheduler.waiting), usage(scheduler.manager)))
        step += 1
        clock += step_seconds(len(scheduled), sum(seq.num_new for _, (seq,) in scheduled if not seq.num_computed))
        for group, (seq,) in scheduled:
            seq.num_computed = len(seq.token_ids)
            seq.token_ids.append(0)
            if len(seq.token_ids) == group.max_len:
                scheduler.remove(group)
    return moments
