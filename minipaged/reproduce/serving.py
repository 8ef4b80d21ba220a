"""Latency under load: Figures 12 and 13. The scheduler is real, a clock is the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from ..simulate.clock import Outcome, serve
from ..simulate.systems import BATCHES, SYSTEMS
from ..simulate.workloads import arrivals
from .paper import Point, crossing, curves, next_rate, printed
from .sheet import Bars, Curves, Figure, Job, Number, Sheet

PANELS = {"fig12a": ("OPT-13B", "ShareGPT"), "fig12b": ("OPT-66B", "ShareGPT"), "fig12c": ("OPT-175B", "ShareGPT"),
          "fig12d": ("OPT-13B", "Alpaca"), "fig12e": ("OPT-66B", "Alpaca"), "fig12f": ("OPT-175B", "Alpaca")}
LEVEL = 0.5  # s/token at which rates are compared
TIME = ("By default an hour of arrivals for each point, a quarter of it for OPT-175B (§6.1); but the hour for "
        "FasterTransformer there too, as the artifact's script has it (ft/run_175b.py).")
BASIS = "predicted; the clock's constants are fitted to other points (simulate/cost.py)"
CURVE = "predicted but for the first point of each curve and vLLM's second, to which the clock's constants are fitted"


def at_rate(system: str, server: str, workload: str, rate: float, minutes: float) -> Outcome:
    """One system under one rate."""
    return serve(system, arrivals(workload, rate, 60 * minutes), server, batch=BATCHES[server, workload])


def paper_curve(panel: str, system: str) -> list[Point]:
    """The paper's points, and where its line crosses 1 s/token."""
    at_one = printed("at 1 s/token").get(panel, {}).get(system)
    points = curves(panel)[system]
    return [*points, (at_one, 1.0)] if at_one and max(y for _, y in points) < 1 else points


def until_late(panel: str, system: str, latency_at: Callable[[float], float]) -> list[Point]:
    """Latency at the paper's rates, at the next of the artifact's where the paper's line leaves the picture, and at
    further ones, each by 5 % higher, until it is past `LEVEL`.

    A straight line to a point far above `LEVEL` passes it too early. If the paper's line passes it between the same two
    rates as ours, both are read too low alike; else further points of ours narrow these two down.
    """
    rates, points = sorted({x for x, _ in curves(panel)[system]}), []
    if beyond := next_rate(panel, system):
        rates.append(beyond)
    while (not points or points[-1][1] < LEVEL) and len(points) < 30:
        rate = rates.pop(0) if rates else points[-1][0] * 1.05
        points.append((rate, latency_at(rate)))
    if len(points) < 2 or points[-2][0] < crossing(paper_curve(panel, system), LEVEL) <= points[-1][0]:
        return points
    return _narrowed(points, latency_at)


def _narrowed(points: list[Point], latency_at: Callable[[float], float]) -> list[Point]:
    """With more points between the last two, until those about `LEVEL` are at most 5 % apart."""
    (low, _), (high, _) = points[-2:]
    while high > 1.05 * low:
        middle = (low + high) / 2
        points = [*points, (middle, latency_at(middle))]
        low, high = (low, middle) if points[-1][1] >= LEVEL else (middle, high)
    return sorted(points)


def curve(panel: str, system: str, minutes: float) -> list[Point]:
    """A line of Figure 12; OPT-175B has a quarter of the time, but not with FasterTransformer, see `TIME`."""
    server, workload = PANELS[panel]
    minutes = minutes / 4 if server == "OPT-175B" and system != "FasterTransformer" else minutes
    return until_late(panel, system, lambda rate: at_rate(system, server, workload, rate, minutes).latency)


def compared(panel: str, ours: dict[str, list[Point]], others: Iterable[str], basis: str,
             ) -> tuple[list[Number], list[Number]]:
    """The rates at which the latencies of a panel cross `LEVEL`, and vLLM's divided by those of ``others``."""
    rates = {system: (crossing(points, LEVEL), crossing(paper_curve(panel, system), LEVEL))
             for system, points in ours.items()}
    name = f"({panel[-1]}) " if panel[-1].isalpha() else ""
    numbers = [Number(f"{name}{system}: requests/s at {LEVEL} s/token", *both, basis)
               for system, both in rates.items()]
    ratios = [Number(f"{name}vLLM / {other}, requests/s at {LEVEL} s/token",
                     *(_divided(*ends) for ends in zip(rates["vLLM"], rates[other])), basis)
              for other in others if "vLLM" in rates and other in rates]
    return numbers, ratios


def differences(**groups: list[Number]) -> list[str]:
    """A sentence for each group of numbers: by how much ours differ from the paper's."""
    return [f"Median difference of the {what}: {median(errors):.0%}, the largest {max(errors):.0%}."
            for what, group in groups.items() if (errors := _errors(group))]


# ---- Figure 12 -------------------------------------------------------------------------------------------------------

def figure_12_plan(minutes: float) -> dict[Any, Job]:
    """A curve for each system in each panel."""
    return {(panel, system): Job(curve, (panel, system, minutes)) for panel in reversed(PANELS) for system in SYSTEMS}


def figure_12(found: dict[Any, list[Point]]) -> Sheet:
    """Normalized latency against the request rate, and the rates at which it crosses `LEVEL`."""
    panels, numbers, ratios = [], [], []
    for panel, (server, workload) in PANELS.items():
        ours = {system: found[panel, system] for system in SYSTEMS if (panel, system) in found}
        panels.append(Curves(f"({panel[-1]}) {server}, {workload}", "requests/s", "s/token", ours, curves(panel), CURVE,
                             top=1.0))
        rates, divided = compared(panel, ours, ("Orca (Oracle)", "Orca (Max)"), BASIS)
        numbers += rates
        ratios += divided
    return Sheet("Figure 12: single sequence generation", panels, numbers + ratios,
                 [*differences(rates=numbers, ratios=ratios), TIME])


def _divided(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def _errors(numbers: list[Number]) -> list[float]:
    return [abs(n.ours / n.paper - 1) for n in numbers if n.ours and n.paper]


# ---- Figure 13 -------------------------------------------------------------------------------------------------------

RATES = {"ShareGPT": 2.0, "Alpaca": 30.0}


def figure_13_plan(minutes: float) -> dict[Any, Job]:
    """One rate for each workload; all systems but FasterTransformer."""
    return {(workload, system): Job(at_rate, (system, "OPT-13B", workload, rate, minutes))
            for workload, rate in RATES.items() for system in SYSTEMS[1:]}


def figure_13(found: dict[Any, Outcome]) -> Sheet:
    """Mean number of requests that run at the same time."""
    paper, panels = printed("fig13"), []
    for workload, rate in RATES.items():
        numbers = {system: Number(f"{workload}: {system}, requests", outcome.running, paper[workload][system], BASIS)
                   for system in SYSTEMS[1:] if (outcome := found.get((workload, system)))}
        panels.append(Bars(f"{workload}, {rate:g} requests/s", "requests running", numbers))
    return Sheet("Figure 13: average number of batched requests, OPT-13B", panels,
                 [number for panel in panels for number in panel.numbers.values()],
                 ["Counted from a third of the arrivals to the last. vLLM's bars depend on how long a step takes."])


FIGURES = {
    "fig12": Figure("latency against request rate", figure_12_plan, figure_12),
    "fig13": Figure("requests running at a time", figure_13_plan, figure_13),
}
