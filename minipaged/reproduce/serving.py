"""Latency under load: Figures 12a, 12d and 13, OPT-13B on one A100. The scheduler is real, a clock is the model."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from statistics import fmean, median
from typing import Any, NamedTuple

from ..errors import InvalidConfig, RequestTooLarge
from ..simulate.clock import iterations, opt_13b_step, request
from .memory import scheduler_of
from .paper import Point, crossing, curves, printed
from .sheet import Bars, Curves, Figure, Job, Number, Sheet

SYSTEMS = ("FasterTransformer", "Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "vLLM")
PANELS = {"fig12a": "ShareGPT", "fig12d": "Alpaca"}
BATCH = {"ShareGPT": 5, "Alpaca": 14}  # FasterTransformer's: what the memory holds (§6.1; the artifact's numbers)
LEVEL = 0.5  # s/token at which rates are compared
BASIS = "predicted; the clock is fitted to Figure 1, its 0.13 ms per prompt token a guess"
Request = tuple[float, int, int]  # arrival in seconds, prompt tokens, output tokens


class Outcome(NamedTuple):
    """What a run gave: mean of latency / output length in s/token, and the mean number of requests running."""

    latency: float
    running: float


def arrivals(workload: str, rate: float, seconds: float, seed: int = 0) -> list[Request]:
    """Poisson arrivals with the lengths of ShareGPT (3,604 true pairs) or Alpaca (400, from Figure 11's histograms).

    Raises
    ------
    InvalidConfig
        The rate or the time is not above zero, or no request arrives in it.
    """
    if rate <= 0 or seconds <= 0:
        raise InvalidConfig(f"{rate} requests/s for {seconds} s; give a rate and a time above zero")
    draw, pairs, time, found = random.Random(seed), _lengths(workload), 0.0, []
    while (time := time + draw.expovariate(rate)) < seconds:
        found.append((time, *draw.choice(pairs)))
    if not found:
        raise InvalidConfig(f"no request arrives in {seconds} s at {rate} requests/s; give more time or a higher rate")
    return found


def _lengths(workload: str) -> list[tuple[int, int]]:
    data = files("minipaged") / "data"
    if workload == "ShareGPT":
        found = json.loads((data / "figure_2_requests.json").read_text(encoding="utf-8"))["requests"]
    elif workload == "Alpaca":
        found = json.loads((data / "lengths.json").read_text(encoding="utf-8"))["alpaca"]["pairs"]
    else:
        raise InvalidConfig(f"the workload is {workload!r}; give 'ShareGPT' or 'Alpaca'")
    return [(prompt, output) for *_, prompt, output in found]


def serve(system: str, workload: str, rate: float, seconds: float, seed: int = 0, blocks: int = 984,
          block_size: int = 16) -> Outcome:
    """Serve all requests that arrive within ``seconds``, and wait for the last of them.

    Raises
    ------
    InvalidConfig
        The rate, the time or a name.
    RequestTooLarge
        A request that the pool could never hold.
    """
    requests = arrivals(workload, rate, seconds, seed)
    if system == "FasterTransformer":
        return _in_batches(requests, BATCH[workload])
    if system not in SYSTEMS:
        raise InvalidConfig(f"the system is {system!r}; give one of {', '.join(SYSTEMS)}")
    scheduler = scheduler_of(system, max_num_seqs=2048 if system == "vLLM" else 256, blocks=blocks,
                             block_size=block_size)
    if (longest := max(prompt + output for _, prompt, output in requests)) > blocks * block_size:
        raise RequestTooLarge(f"a request of {longest} tokens, and the pool has {blocks} blocks; give more blocks")
    groups = [(time, request(number, prompt, output)) for number, (time, prompt, output) in enumerate(requests)]
    latencies, running, last = [], [], requests[-1][0]
    for iteration in iterations(scheduler, groups, opt_13b_step):
        if last / 3 <= iteration.begin < last:
            running.append(len(iteration.scheduled))
        for group in iteration.completed:
            time, _, output = requests[group.request_id]
            latencies.append((iteration.end - time) / output)
    return Outcome(fmean(latencies), fmean(running) if running else 0.0)


def _in_batches(requests: list[Request], size: int) -> Outcome:
    """FasterTransformer: the earliest requests in one batch, padded to the longest, until the longest output ends."""
    clock, latencies, batches = 0.0, [], []
    waiting = requests[::-1]
    while waiting:
        clock, batch = max(clock, waiting[-1][0]), []
        while waiting and waiting[-1][0] <= clock and len(batch) < size:
            longer = [*batch, waiting[-1]]
            if batch and max(r[1] for r in longer) + max(r[2] for r in longer) > 2040:
                break
            batch.append(waiting.pop())
        steps, width = max(output for *_, output in batch), max(prompt for _, prompt, _ in batch)
        clock += opt_13b_step(len(batch), len(batch) * width) + (steps - 1) * opt_13b_step(len(batch), 0)
        latencies += [(clock - time) / output for time, _, output in batch]
        batches += [len(batch)] * steps
    return Outcome(fmean(latencies), fmean(batches))


def paper_curve(panel: str, system: str) -> list[Point]:
    """The paper's points, and where its line crosses 1 s/token."""
    at_one = printed("at 1 s/token")[panel].get(system)
    points = curves(panel)[system]
    return [*points, (at_one, 1.0)] if at_one and max(y for _, y in points) < 1 else points


def curve(panel: str, system: str, minutes: float) -> list[Point]:
    """Latency at the paper's rates, and at further ones until it is past `LEVEL`."""
    rates, points = sorted(x for x, _ in paper_curve(panel, system)), []
    rate = rates[0]
    while (not points or points[-1][1] < LEVEL) and len(points) < 30:
        rate = rates.pop(0) if rates else rate * 1.1
        points.append((rate, serve(system, PANELS[panel], rate, 60 * minutes).latency))
    return points


# ---- Figure 12 -------------------------------------------------------------------------------------------------------

def figure_12_plan(minutes: float) -> dict[Any, Job]:
    """A curve for each system in each panel."""
    return {(panel, system): Job(curve, (panel, system, minutes)) for panel in reversed(PANELS) for system in SYSTEMS}


def figure_12(found: dict[Any, list[Point]]) -> Sheet:
    """Normalized latency against the request rate, and the rates at which it crosses `LEVEL`."""
    panels, numbers, ratios = [], [], []
    for panel, workload in PANELS.items():
        ours = {system: found[panel, system] for system in SYSTEMS if (panel, system) in found}
        paper = curves(panel)
        panels.append(Curves(f"({panel[-1]}) OPT-13B, 1 GPU, {workload}", "requests/s", "s/token", ours, paper, BASIS,
                             top=1.0))
        rates = {system: (crossing(points, LEVEL), crossing(paper_curve(panel, system), LEVEL))
                 for system, points in ours.items()}
        numbers += [Number(f"({panel[-1]}) {system}: requests/s at {LEVEL} s/token", *both, BASIS)
                    for system, both in rates.items()]
        for other in ("Orca (Oracle)", "Orca (Max)"):
            if "vLLM" in rates and other in rates:
                pairs = [_divided(*ends) for ends in zip(rates["vLLM"], rates[other])]
                ratios.append(Number(f"({panel[-1]}) vLLM / {other}, requests/s at {LEVEL} s/token", *pairs, BASIS))
    errors = [abs(n.ours / n.paper - 1) for n in numbers if n.ours and n.paper]
    notes = [f"Median difference of the rates: {median(errors):.0%}."] if errors else []
    notes.append("Panels b, c, e and f need the steps of OPT-66B and OPT-175B on several GPUs, which this clock does "
                 "not have.")
    return Sheet("Figure 12: single sequence generation", panels, numbers + ratios, notes)


def _divided(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


# ---- Figure 13 -------------------------------------------------------------------------------------------------------

def figure_13_plan(minutes: float) -> dict[Any, Job]:
    """One rate for each workload; all systems but FasterTransformer."""
    return {(workload, system): Job(serve, (system, workload, rate, 60 * min(minutes, 20)))
            for workload, rate in (("ShareGPT", 2.0), ("Alpaca", 30.0)) for system in SYSTEMS[1:]}


def figure_13(found: dict[Any, Outcome]) -> Sheet:
    """Mean number of requests that run at the same time."""
    paper, panels = printed("fig13"), []
    for workload, rate in (("ShareGPT", 2), ("Alpaca", 30)):
        numbers = {system: Number(f"{workload}: {system}, requests", outcome.running, paper[workload][system], BASIS)
                   for system in SYSTEMS[1:] if (outcome := found.get((workload, system)))}
        panels.append(Bars(f"{workload}, {rate} requests/s", "requests running", numbers))
    return Sheet("Figure 13: average number of batched requests, OPT-13B", panels,
                 [number for panel in panels for number in panel.numbers.values()],
                 ["Counted from a third of the arrivals to the last. vLLM's bars depend on how long a step takes."])


FIGURES = {
    "fig12": Figure("latency against request rate", figure_12_plan, figure_12),
    "fig13": Figure("requests running at a time", figure_13_plan, figure_13),
}
