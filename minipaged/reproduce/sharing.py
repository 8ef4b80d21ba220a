"""What sharing saves: Figure 15, and what it buys in latency: Figure 14. Several sequences per request, OPT-13B."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ..simulate.beams import RecordedBeams
from ..simulate.clock import run, serve
from ..simulate.cost import SERVERS, Cost
from ..simulate.systems import SYSTEMS, ContinuousBatching, make_system
from ..simulate.workloads import arrivals
from .paper import Point, curves, printed
from .serving import BASIS, compared, differences, until_late
from .sheet import Bars, Curves, Figure, Job, Number, Sheet

WIDTHS = (2, 4, 6)
METHODS = ("parallel sampling", "beam search")
PANELS = {f"fig14{letter}": case for letter, case in zip("abcdef", ((m, w) for m in METHODS for w in WIDTHS))}
SERVER = SERVERS["OPT-13B"]
BEAMS = "; which beams part is as tiny-opt's own searches had it"


def options(method: str, width: int) -> dict[str, Any]:
    """How `make_system` is to run requests of so many samples or beams."""
    return {"width": width, "beams": RecordedBeams(width) if method == "beam search" else None}


# ---- Figure 14 -------------------------------------------------------------------------------------------------------

def curve(panel: str, system: str, minutes: float) -> list[Point]:
    """A line of Figure 14: Alpaca."""
    method, width = PANELS[panel]
    return until_late(panel, system, lambda rate: serve(
        system, arrivals("Alpaca", rate, 60 * minutes), **options(method, width)).latency)


def figure_14_plan(minutes: float) -> dict[Any, Job]:
    """A curve for each system in each panel, from a sixth of the time: each request is several."""
    return {(panel, system): Job(curve, (panel, system, minutes / 6))
            for panel in reversed(PANELS) for system in SYSTEMS[1:]}


def figure_14(found: dict[Any, list[Point]]) -> Sheet:
    """Normalized latency against the request rate, for requests of several samples or beams."""
    panels, numbers, ratios = [], [], []
    for panel, (method, width) in PANELS.items():
        ours = {system: found[panel, system] for system in SYSTEMS[1:] if (panel, system) in found}
        basis = BASIS + BEAMS * (method == "beam search")
        panels.append(Curves(f"({panel[-1]}) {method}, {width}", "requests/s", "s/token", ours, curves(panel), basis,
                             top=1.0))
        rates, divided = compared(panel, ours, ("Orca (Oracle)",), basis)
        numbers += rates
        ratios += divided
    return Sheet("Figure 14: parallel sampling and beam search, OPT-13B, Alpaca", panels, numbers + ratios,
                 ["By default ten minutes of arrivals for each point, where the paper has an hour: past the knee, where "
                  "the queue only grows, latencies are lower than they would be later.",
                  *differences(rates=numbers, ratios=ratios)])


# ---- Figure 15 -------------------------------------------------------------------------------------------------------

def blocks_without_sharing(system: ContinuousBatching) -> int:
    """The blocks of all running requests, if none had two readers; a prompt counts once per sequence to be."""
    tables, total = system.manager.block_tables, 0
    for group in system.scheduler.running:
        seqs = group.unfinished
        total += sum(len(tables[seq.seq_id].blocks) for seq in seqs) * (group.width // len(seqs))
    return total


def saving(workload: str, method: str, width: int, seed: int = 0, since: float = 300.0, until: float = 900.0,
           rate: float = 20.0) -> float:
    """Percent of the blocks that sharing saves, over the iterations from ``since`` to ``until`` seconds.

    As in the artifact: 1 - 1 / mean(blocks without sharing / blocks in use), at 20 requests/s.
    """
    system = make_system("vLLM", SERVER.blocks(), **options(method, width))
    pool, ratios = system.manager.device, []
    for iteration in run(system, arrivals(workload, rate, until, seed), Cost(SERVER).seconds, until):
        if iteration.begin >= since and system.scheduler.running:
            ratios.append(blocks_without_sharing(system) / (pool.num_blocks - pool.num_free))
    return 100 * (1 - 1 / fmean(ratios))


def figure_15_plan(_: float) -> dict[Any, Job]:
    """Runs for each workload, method and width: five of ShareGPT's samples, where few requests run at a time and chance
    has its part; beam searches, which are slow to simulate, from 150 to 450 s."""
    samples = {(workload, METHODS[0], width, seed): Job(saving, (workload, METHODS[0], width, seed))
               for workload, seeds in (("ShareGPT", 5), ("Alpaca", 1)) for width in WIDTHS for seed in range(seeds)}
    beams = {(workload, METHODS[1], width, 0): Job(saving, (workload, METHODS[1], width, 0, 150.0, 450.0))
             for workload in ("ShareGPT", "Alpaca") for width in WIDTHS}
    return beams | samples


def figure_15(found: dict[Any, float]) -> Sheet:
    """The saving in four panels, ours in pairs with the paper's bars or inside its range."""
    panels, notes = [], []
    for method in METHODS:
        for workload in ("Alpaca", "ShareGPT"):
            paper, numbers = printed("fig15")[method][workload], {}
            for width in WIDTHS:
                runs = [value for case, value in found.items() if case[:3] == (workload, method, width)]
                theirs = paper[str(width)] if isinstance(paper, dict) else tuple(paper)
                if runs:
                    numbers[str(width)] = Number(f"{method}, {workload}, {width} sequences: blocks saved, %",
                                                 fmean(runs), theirs, "predicted: counted by the block manager"
                                                 + BEAMS * (method == "beam search"))
                if len(runs) > 1:
                    notes.append(f"{workload}, {width} samples: the mean of {len(runs)} seeds, which give "
                                 f"{min(runs):.1f} to {max(runs):.1f}.")
            panels.append(Bars(f"{method}, {workload}", "blocks saved, %", numbers))
    return Sheet("Figure 15: memory saved by sharing, OPT-13B", panels,
                 [number for panel in panels for number in panel.numbers.values()],
                 [*notes, "Alpaca's prompts and outputs are drawn independently of each other.", _beams_note()])


def _beams_note() -> str:
    """How often beams die in tiny-opt's searches, which is what decides over their saving."""
    shares = [f"{RecordedBeams(width).mean_survivors:.1f} of {width}" for width in WIDTHS]
    return ("The model decides over beams: the more of them die at each token, the more the others share. In tiny-opt's "
            f"searches {', '.join(shares)} beams go on at each token; the paper does not tell how many in OPT-13B's "
            "(in the artifact all tokens of a prompt are the same one).")


FIGURES = {
    "fig14": Figure("several sequences per request", figure_14_plan, figure_14),
    "fig15": Figure("memory saved by sharing", figure_15_plan, figure_15),
}
