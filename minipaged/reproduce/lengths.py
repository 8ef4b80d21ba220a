"""Figure 11: how long the prompts and outputs of the two workloads are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..simulate.workloads import Histogram, histogram, lengths
from .paper import Point, printed
from .sheet import Curves, Figure, Number, Sheet

SIDES = ("input", "output")
BASES = {"ShareGPT": "given: the artifact's own pairs; counted here",
         "Alpaca": "drawn from the paper's histograms, so that only the sampling is ours"}


def centres(bins: Histogram) -> list[float]:
    """The middle of each bin in tokens."""
    edges = np.linspace(bins.first, bins.last, len(bins.density) + 1)
    return ((edges[1:] + edges[:-1]) / 2).tolist()


def density(values: np.ndarray, bins: Histogram) -> list[Point]:
    """The share per token of the values in the same bins as the paper's; values [requests]."""
    heights, _ = np.histogram(values, len(bins.density), (bins.first, bins.last), density=True)
    return list(zip(centres(bins), heights.tolist()))


def figure_11(_: dict[Any, Any]) -> Sheet:
    """Both histograms of both workloads, and their means."""
    panels, numbers = [], []
    for workload, means in printed("fig11").items():
        pairs, ours, paper = lengths(workload), {}, {}
        for side, values, mean in zip(SIDES, pairs.T, means):
            bins = histogram(workload, side)
            ours[side] = density(values, bins)
            paper[side] = list(zip(centres(bins), bins.density))
            numbers.append(Number(f"{workload}: mean {side}, tokens", float(values.mean()), mean, BASES[workload]))
        panels.append(Curves(workload, "tokens", "share per token", ours, paper, BASES[workload],
                             mark_every=3))
    return Sheet("Figure 11: lengths of prompts and outputs", panels, numbers,
                 [f"ShareGPT: {len(lengths('ShareGPT')):,} pairs with prompt and output below 2048 tokens together, as "
                  "the artifact's generator takes them.",
                  "Alpaca: the artifact's file is not at hand. Prompts and outputs are drawn from the paper's "
                  "histograms, independently of each other."])


FIGURES = {"fig11": Figure("lengths of the workloads", lambda minutes: {}, figure_11)}
