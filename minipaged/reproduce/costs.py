"""What block size costs: Figure 18, the kernel and latency under load, and Figure 19, swapping or recomputation."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ..scheduler import PreemptionMode
from ..simulate.clock import serve
from ..simulate.workloads import arrivals
from .paper import Point, curves
from .sheet import GIVEN, Curves, Figure, Job, Number, Sheet

TOKENS, LAYERS, KV_BYTES = 256, 40, 2 * 5120 * 40 * 2  # what Figure 19a moves: OPT-13B, 256 tokens
SIZES = [2**i for i in range(9)]
# Requests/s behind Figure 18b, which the paper does not tell. Fitted: its best block size, 32, has here its latency.
RATES = {"ShareGPT": 1.66, "Alpaca": 26.26}
FITTED = "fitted at block sizes 1 and 256: ms per copy and GB/s; predicted between"


def copies(block_size: int) -> int:
    """Transfers of 256 tokens: one per block, layer, and key or value, as the artifact makes them."""
    return 2 * LAYERS * -(-TOKENS // block_size)


def swap_costs(points: list[Point]) -> tuple[float, float]:
    """Milliseconds per copy, and GB/s, through the first and the last point of a curve of Figure 19a."""
    measured = dict(points)
    per_copy = (measured[1] - measured[256]) / (copies(1) - copies(256))
    return per_copy, TOKENS * KV_BYTES / 1e6 / (measured[256] - per_copy * copies(256))


def swap_ms(points: list[Point], block_size: int) -> float:
    """Milliseconds to move 256 tokens: an overhead per copy, and the bytes at the bandwidth of PCIe."""
    per_copy, bandwidth = swap_costs(points)
    return per_copy * copies(block_size) + TOKENS * KV_BYTES / 1e6 / bandwidth


def under_load(workload: str, block_size: int, preemption: PreemptionMode, minutes: float) -> float:
    """Normalized latency of vLLM, OPT-13B, with the same number of slots in blocks of this size."""
    requests = arrivals(workload, RATES[workload], 60 * minutes)
    return serve("vLLM", requests, block_size=block_size, preemption=preemption).latency


def load_plan(cases: tuple[tuple[str, PreemptionMode], ...], minutes: float) -> dict[Any, Job]:
    """A run for each block size."""
    return {(workload, how, size): Job(under_load, (workload, size, how, minutes))
            for workload, how in cases for size in SIZES}


def by_size(found: dict[Any, float], workload: str, how: PreemptionMode) -> list[Point]:
    """The latencies that were found."""
    return [(size, found[workload, how, size]) for size in SIZES if (workload, how, size) in found]


def good_sizes(points: list[Point]) -> tuple[float, float]:
    """The smallest and the largest block size of those with at most 2.5 times the latency of the best."""
    good = [size for size, latency in points if latency <= 2.5 * min(y for _, y in points)]
    return min(good), max(good)


def load_numbers(what: str, ours: list[Point], paper: list[Point], workload: str) -> list[Number]:
    """Ours and the paper's latency at each block size, and which of them are fitted to."""
    return [Number(f"{what}, block size {size}, s/token", mine, dict(paper)[size],
                   FITTED_LOADS.get((workload, size), LOAD)) for size, mine in ours]


# ---- Figure 19 -------------------------------------------------------------------------------------------------------

WAYS: dict[str, PreemptionMode] = {"Recompute": "recompute", "Swap": "swap"}
LOAD = "predicted; below 16 with the kernel's cost of small blocks, fitted to Figure 18b, ShareGPT, block size 8"
FITTED_LOADS = {("ShareGPT", 8): "fitted: the kernel's cost of small blocks", ("ShareGPT", 32): "fitted: the rate",
                ("Alpaca", 32): "fitted: the rate"}
RATE = "The paper does not tell the rate; here it is that at which block size 32, its best, has Figure 18b's latency: "


def figure_19(found: dict[Any, float]) -> Sheet:
    """(a): the overhead of both ways to make room, against the block size; (b): latency with either."""
    panel_a, numbers, notes = _overhead()
    paper = curves("fig19b")
    ours = {name: points for name, how in WAYS.items() if (points := by_size(found, "ShareGPT", how))}
    panel_b = Curves("(b) ShareGPT, under load", "block size", "s/token", ours, paper, LOAD, log=True)
    for name, points in ours.items():
        numbers += load_numbers("(b) " + name, points, paper[name], "ShareGPT" if name == "Recompute" else "")
    swapped, again = (dict(ours.get(name, [])) for name in ("Swap", "Recompute"))
    numbers += [Number(f"(b) swap / recompute, block size {size}", swapped[size] / again[size],
                       dict(paper["Swap"])[size] / dict(paper["Recompute"])[size], LOAD)
                for size in SIZES if size in swapped and size in again]
    notes.append(f"(b): {RATE}{RATES['ShareGPT']:.2f} requests/s. Swapped bytes "
                 "move while the model computes, as in the artifact; to begin a copy holds the iteration up.")
    return Sheet("Figure 19: recomputation and swapping, OPT-13B", [panel_a, panel_b], numbers, notes)


def _overhead() -> tuple[Curves, list[Number], list[str]]:
    paper = curves("fig19a")
    ours = {name: [(size, swap_ms(paper[name], size)) for size in SIZES] for name in ("Swap in", "Swap out")}
    ours["Swap in + out"] = [(size, i + o) for (size, i), (_, o) in zip(ours["Swap in"], ours["Swap out"])]
    recompute = fmean(ms for _, ms in paper["Recompute"])
    ours["Recompute"] = [(size, recompute) for size in SIZES]
    numbers = [Number(f"(a) swap in + out, block size {size}, ms", mine, dict(paper["Swap in + out"])[size], FITTED)
               for size, mine in ours["Swap in + out"][1:-1]]
    numbers.append(Number("(a) smallest block size at which swapping wins", min(
        size for size, ms in ours["Swap in + out"] if ms < recompute), min(
        size for (size, swap), (_, ms) in zip(paper["Swap in + out"], paper["Recompute"]) if swap < ms), FITTED))
    (into, into_rate), (out, out_rate) = swap_costs(paper["Swap in"]), swap_costs(paper["Swap out"])
    note = (f"(a): 256 tokens. Fitted: {1000 * into:.1f} µs per copy and {into_rate:.1f} GB/s into the GPU, "
            f"{1000 * out:.1f} µs and {out_rate:.1f} GB/s out of it. Recomputation is given: the mean of its points, "
            "which lie within 5 % of it.")
    return Curves("(a) overhead", "block size", "ms", ours, paper, f"{FITTED}; recomputation: the mean",
                  log=True), numbers, [note]


# ---- Figure 18 -------------------------------------------------------------------------------------------------------

def figure_18(found: dict[Any, float]) -> Sheet:
    """(a): the paper's points alone, and what its text says beside them; (b): latency against the block size."""
    kernel, paper = curves("fig18a"), curves("fig18b")
    numbers = []
    for batch in (8, 32):
        ft = dict(kernel[f"FT (bs {batch})"])
        numbers += [Number(f"(a) kernel against FasterTransformer's, {batch} requests, context {context:g}, % more",
                           None, 100 * (us / ft[context] - 1), "needs a GPU")
                    for context, us in kernel[f"vLLM (bs {batch})"]]
    ours = {workload: points for workload in paper if (points := by_size(found, workload, "recompute"))}
    for workload, points in ours.items():
        for what, mine, theirs in zip(("smallest", "largest"), good_sizes(points), good_sizes(paper[workload])):
            numbers.append(Number(f"(b) {workload}: {what} good block size", mine, theirs, LOAD))
        numbers += load_numbers("(b) " + workload, points, paper[workload], workload)
    rates = " and ".join(f"{RATES[workload]:.2f} ({workload})" for workload in paper)
    return Sheet("Figure 18: block size", [
        Curves("(a) the kernel, the paper's points alone", "context length", "µs", {}, kernel, GIVEN, log=True),
        Curves("(b) under load", "block size", "s/token", ours, paper, LOAD, log=True)], numbers,
        ["(a) needs a GPU; there is nothing of ours in that panel. The paper's text says 20 to 26 %: that is its 32 "
         "requests; with 8 its figure has more.",
         f"(b): {RATE}{rates} requests/s: where the server cannot keep up, latencies grow with the "
         "time. A good block size has at most 2.5 times the latency of the best."])


FIGURES = {
    "fig18": Figure("block size: the kernel, and latency under load", lambda minutes: load_plan(
        (("ShareGPT", "recompute"), ("Alpaca", "recompute")), minutes), figure_18),
    "fig19": Figure("swapping or recomputation", lambda minutes: load_plan(
        (("ShareGPT", "recompute"), ("ShareGPT", "swap")), minutes), figure_19),
}
