"""What the simulated users ask for: how long prompts and outputs are, and when requests arrive (§6.1).

The lengths of ShareGPT are the 84,226 pairs (input, output) that the authors' SOSP artifact ships
(sosp-ae-39/sosp-ae-astra, ``datasets/sharegpt_opt_text_completion_length.pkl``): the first user input and the first
answer of conversations collected in March 2023, counted by the OPT tokenizer; lengths only. The artifact's file for
Alpaca is not at hand: its lengths are drawn from the two histograms of Figure 11b, independently of each other.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np

from ..errors import InvalidConfig

DATA = files("minipaged") / "data"
MAX_LEN = 2048  # tokens that OPT and LLaMA take, prompt and output
MOST = 10_000_000  # requests at a time, which take some gigabytes
QUANTUM = 0.01  # seconds; the artifact's generator draws how many requests arrive in each


class Request(NamedTuple):
    """One request: its arrival in seconds, and its prompt and output in tokens."""

    time: float
    prompt: int
    output: int


class Histogram(NamedTuple):
    """Equal bins from ``first`` to ``last`` tokens, and the density in each, per token; the area is 1."""

    first: int
    last: int
    density: list[float]


@cache
def histogram(workload: str, side: str) -> Histogram:
    """A histogram of Figure 11: of "ShareGPT" or "Alpaca", "input" or "output"."""
    return Histogram(**json.loads((DATA / "figure_11.json").read_text(encoding="utf-8"))["histograms"][workload][side])


@cache
def lengths(workload: str) -> np.ndarray:
    """Pairs of prompt and output tokens, [requests, 2] int64, in the order of the data set, none of 2048 or more
    together, as the artifact takes them.

    Raises
    ------
    InvalidConfig
        The workload is neither "ShareGPT" (79,725 true pairs) nor "Alpaca" (20,000 drawn from its histograms).
    """
    if workload not in (known := {"ShareGPT": _sharegpt, "Alpaca": _alpaca}):
        raise InvalidConfig(f"the workload is {workload!r}; give {' or '.join(map(repr, known))}")
    pairs = known[workload]()
    return pairs[pairs.sum(axis=1) < MAX_LEN]


def _sharegpt() -> np.ndarray:
    with as_file(DATA / "sharegpt_lengths.csv.gz") as path:
        return np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1)


def _alpaca() -> np.ndarray:
    draw = np.random.default_rng(0)
    return np.stack([_drawn(histogram("Alpaca", side), 20_000, draw) for side in ("input", "output")], axis=1)


def _drawn(bins: Histogram, count: int, draw: np.random.Generator) -> np.ndarray:
    """Lengths as in a histogram; all whole numbers in a bin are equally likely."""
    numbers = np.arange(bins.first, bins.last + 1)
    width = (bins.last - bins.first) / len(bins.density)
    bin_of = np.minimum(((numbers - bins.first) / width).astype(int), len(bins.density) - 1)
    weights = np.array(bins.density)[bin_of] / np.bincount(bin_of)[bin_of]
    return draw.choice(numbers, count, p=weights / weights.sum())


def arrivals(workload: str, rate: float, seconds: float, seed: int = 0) -> list[Request]:
    """Poisson arrivals of a workload.

    Parameters
    ----------
    rate : float
        Requests per second.
    seconds : float
        For how long they arrive; the paper has an hour, and 15 minutes for OPT-175B.
    seed : int
        The same seed gives the same requests.

    Raises
    ------
    InvalidConfig
        The rate or the time is not above zero, or no request arrives in it, or more than `MOST` do.

    Source: §6.1, and the artifact's generator: as many pairs as requests from the beginning of the data set, shuffled.
    """
    return requests(lengths(workload), rate, seconds, seed)


def requests(pairs: np.ndarray, rate: float, seconds: float, seed: int = 0) -> list[Request]:
    """As `arrivals`, with pairs of prompt and output tokens of one's own, [requests, 2]; they are used in turn."""
    if not (rate > 0 and seconds > 0):  # nor is NaN
        raise InvalidConfig(f"{rate} requests/s for {seconds} s; give a rate and a time above zero")
    if rate * seconds > MOST:
        raise InvalidConfig(f"{rate} requests/s for {seconds} s are more than {MOST:,} requests; give a lower rate or "
                            "less time")
    counts = np.random.RandomState(seed).poisson(rate * QUANTUM, round(seconds / QUANTUM))
    times = np.repeat(np.arange(len(counts)), counts) * QUANTUM
    if not len(times):
        raise InvalidConfig(f"no request arrives in {seconds} s at {rate} requests/s; give more time or a higher rate")
    chosen = np.resize(pairs, (len(times), 2)).tolist()
    random.Random(seed).shuffle(chosen)
    return [Request(time, prompt, output) for time, (prompt, output) in zip(times.tolist(), chosen)]
