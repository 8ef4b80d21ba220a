"""What block size costs: Figure 19a, swapping against recomputation, and Figure 18a, which needs a GPU."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from .paper import Point, curves
from .sheet import GIVEN, Curves, Figure, Number, Sheet

TOKENS, LAYERS, KV_BYTES = 256, 40, 2 * 5120 * 40 * 2  # what Figure 19a moves: OPT-13B, 256 tokens
SIZES = [2**i for i in range(9)]
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


def figure_19(_: dict[Any, Any]) -> Sheet:
    """(a) only: the overhead of both ways to make room, against the block size."""
    paper = curves("fig19a")
    ours = {name: [(size, swap_ms(paper[name], size)) for size in SIZES] for name in ("Swap in", "Swap out")}
    ours["Swap in + out"] = [(size, i + o) for (size, i), (_, o) in zip(ours["Swap in"], ours["Swap out"])]
    recompute = fmean(ms for _, ms in paper["Recompute"])
    ours["Recompute"] = [(size, recompute) for size in SIZES]
    numbers = [Number(f"swap in + out, block size {size}, ms", mine, dict(paper["Swap in + out"])[size], FITTED)
               for size, mine in ours["Swap in + out"][1:-1]]
    numbers.append(Number("smallest block size at which swapping wins", min(
        size for size, ms in ours["Swap in + out"] if ms < recompute), min(
        size for (size, swap), (_, ms) in zip(paper["Swap in + out"], paper["Recompute"]) if swap < ms), FITTED))
    (into, into_rate), (out, out_rate) = swap_costs(paper["Swap in"]), swap_costs(paper["Swap out"])
    return Sheet("Figure 19: recomputation and swapping, OPT-13B, 256 tokens", [
        Curves("(a) overhead", "block size", "ms", ours, paper, f"{FITTED}; recomputation: the mean", log=True)],
        numbers,
        [f"Fitted: {1000 * into:.1f} µs per copy and {into_rate:.1f} GB/s into the GPU, {1000 * out:.1f} µs and "
         f"{out_rate:.1f} GB/s out of it. Recomputation is given: the mean of its points, which lie within 5 % of it.",
         "(b), end to end, is not made here."])


def figure_18(_: dict[Any, Any]) -> Sheet:
    """The paper's points of (a) alone, and what its text says beside them."""
    paper = curves("fig18a")
    numbers = []
    for batch in (8, 32):
        ft = dict(paper[f"FT (bs {batch})"])
        numbers += [Number(f"kernel against FasterTransformer's, {batch} requests, context {context:g}, % more", None,
                           100 * (us / ft[context] - 1), "needs a GPU")
                    for context, us in paper[f"vLLM (bs {batch})"]]
    return Sheet("Figure 18: the attention kernel", [
        Curves("(a) latency, the paper's points alone", "context length", "µs", {}, paper, GIVEN, log=True)], numbers,
        ["(a) needs a GPU; there is nothing of ours in this picture. The paper's text says 20 to 26 %: that is its 32 "
         "requests; with 8 its figure has more. (b), the block size under load, is not made here."])


FIGURES = {
    "fig18": Figure("the kernel: the paper's points", lambda minutes: {}, figure_18),
    "fig19": Figure("swapping or recomputation", lambda minutes: {}, figure_19),
}
