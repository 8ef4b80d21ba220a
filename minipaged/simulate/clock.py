"""Runs a system against a clock instead of a model, and looks at the memory on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf
from statistics import fmean
from typing import Any, NamedTuple

from ..errors import InvalidConfig, RequestTooLarge
from .cost import SERVERS, Cost, Work
from .systems import ContinuousBatching, System, make_system
from .usage import Usage, usage
from .workloads import MAX_LEN, Request


class Iteration(NamedTuple):
    """One iteration on the clock: its seconds, its work, and the numbers of the requests that it completes."""

    begin: float
    end: float
    work: Work
    completed: list[int]


def run(system: System, requests: Iterable[Request], seconds: Callable[[Work], float],
        until: float = inf) -> Iterator[Iteration]:
    """Serve requests until all are done or the clock says ``until``; each iteration is given before it adds its tokens.

    Parameters
    ----------
    requests : iterable of Request
        In order of arrival; their numbers count from 0.
    seconds : function of the work
        How long an iteration takes: `Cost.seconds`.
    """
    arriving = list(enumerate(requests))[::-1]
    clock = 0.0
    while clock < until and (arriving or system.has_unfinished):
        if not system.has_unfinished:
            clock = max(clock, arriving[-1][1].time)
        while arriving and arriving[-1][1].time <= clock:
            system.add(*arriving.pop())
        work, completed = system.schedule()
        begin, clock = clock, clock + seconds(work)
        yield Iteration(begin, clock, work, completed)
        system.commit()


class Outcome(NamedTuple):
    """What a run gave: mean of latency / output length in s/token, and the mean number of sequences running."""

    latency: float
    running: float


def serve(name: str, requests: list[Request], server: str = "OPT-13B", blocks: int | None = None, block_size: int = 16,
          **options: Any) -> Outcome:
    """Serve all requests with one of the five systems, and wait for the last of them.

    Parameters
    ----------
    name : str
        One of `systems.SYSTEMS`.
    server : str
        One of `cost.SERVERS`.
    blocks : int or None
        Of the pool; None: what the server has.
    options
        As in `systems.make_system`.

    Raises
    ------
    InvalidConfig
        An unknown name, a block size below 1, no request, or one without a prompt or an output.
    RequestTooLarge
        A request that the model does not take, or that the pool could never hold.
    """
    if server not in SERVERS or block_size < 1:
        raise InvalidConfig(f"server {server!r}, blocks of {block_size}; give one of {', '.join(SERVERS)}, and blocks "
                            "of 1 or more")
    _check(requests)
    machine = SERVERS[server]
    system = make_system(name, machine.blocks(block_size) if blocks is None else blocks, block_size, **options)
    return outcome(requests, run(system, requests, Cost(machine, system.engine, block_size).seconds))


def _check(requests: list[Request]) -> None:
    if not requests:
        raise InvalidConfig("there is no request to serve; give one or more")
    for _, prompt, output in requests:
        if min(prompt, output) < 1:
            raise InvalidConfig(f"a request has {prompt} prompt and {output} output tokens; give 1 or more of each")
        if prompt + output > MAX_LEN:
            raise RequestTooLarge(f"a request has {prompt} prompt and {output} output tokens; the models take "
                                  f"{MAX_LEN} together, give fewer")


def outcome(requests: list[Request], iterations: Iterable[Iteration]) -> Outcome:
    """Normalized latency of all requests; running ones are counted from a third of the arrivals to the last."""
    last, latencies, running = requests[-1].time, [], []
    for begin, end, work, completed in iterations:
        if last / 3 <= begin < last:
            running.append(work.seqs)
        for number in completed:
            latencies.append((end - requests[number].time) / requests[number].output)
    return Outcome(fmean(latencies), fmean(running) if running else 0.0)


class Moment(NamedTuple):
    """What `play` saw: seconds on its clock, sequences running, and the use of the pool."""

    time: float
    running: int
    usage: Usage


def play(system: ContinuousBatching, requests: Iterable[Request], until: float, every: int = 20,
         seconds: Callable[[Work], float] = Cost(SERVERS["OPT-13B"]).seconds) -> list[Moment]:
    """As `run`; returns every so many iterations a `Moment`."""
    return [Moment(iteration.begin, iteration.work.seqs, usage(system.manager))
            for step, iteration in enumerate(run(system, requests, seconds, until)) if step % every == 0]


def mean_usage(moments: Iterable[Moment], since: float = 0.0) -> Usage:
    """The mean use of the pool from ``since`` seconds on; Figure 2 takes it from 300 to 900 s."""
    return Usage(*map(fmean, zip(*(moment.usage for moment in moments if moment.time >= since))))
