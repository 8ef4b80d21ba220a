"""Where memory goes: Table 1, Figures 1 and 2. The scheduler and the block managers are the real ones."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ..simulate.clock import Moment, mean_usage, play
from ..simulate.cost import OPT_13B, SERVERS, Cost, Work
from ..simulate.systems import SYSTEMS as ALL_SYSTEMS
from ..simulate.systems import make_system
from ..simulate.usage import Usage
from ..simulate.workloads import Request, arrivals
from .paper import curves, printed
from .serving import BASIS
from .sheet import COUNTED, GIVEN, Bars, Curves, Figure, Job, Number, Sheet, Stacks

SYSTEMS = ALL_SYSTEMS[1:]  # those with a pool
PARTS = ("token states", "reservation", "internal fragmentation", "external fragmentation & others")
BATCHES = (1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
SERVER = SERVERS["OPT-13B"]


def figure_2_requests() -> list[Request]:
    """The 900 s of arrivals behind Figure 2, as far as the artifact tells: its generator, at its seed."""
    return arrivals("ShareGPT", 4.0, 900.0)


# ---- Table 1 ---------------------------------------------------------------------------------------------------------

def table_1(_: dict[Any, Any]) -> Sheet:
    """KV slots from the memory for them and the bytes of a token (§3: 2 x hidden size x layers x 2 bytes)."""
    paper = printed("table1")
    slots = {name: paper["KV cache (GiB)"][name] * 2**30 / SERVERS[name].model.kv_bytes for name in paper["KV slots"]}
    numbers = {name: Number(f"KV slots of {name}, thousands", count / 1000, paper["KV slots"][name] / 1000,
                            "given: the memory; predicted: the bytes of a token")
               for name, count in slots.items()}
    split = {}
    for model, total in paper["total GPU memory (GB)"].items():
        weights, cache = paper["parameters (GB)"][model], paper["KV cache (GB)"][model]
        split[model] = None, (100 * weights / total, 100 * cache / total, 100 * (total - weights - cache) / total)
    return Sheet("Table 1: model sizes and memory", [
        Stacks("GPU memory, as the table has it", "%", ("parameters", "KV cache", "others"), split, GIVEN),
        Bars("KV cache slots", "thousands", {n.what.split()[3].strip(","): n for n in numbers.values()})],
        list(numbers.values()),
        ["The memory for them is what the artifact's formula leaves: 95 % of the GPUs, less parameters, activations "
         "and 1 GiB each: 12.0, 21.2 and 263.9 GiB. The table rounds these to 12, 21 and 264 GB; 9.7K slots of OPT-66B "
         "do not fit in 21."])


# ---- Figure 1 --------------------------------------------------------------------------------------------------------

def memory_at(system: str, batch: int) -> float:
    """Mean GB in use while so many requests run, parameters included; a full queue, 300 s on the clock."""
    pool = make_system(system, 4 * SERVER.blocks(), max_num_seqs=batch)  # one that never limits them
    moments = play(pool, [request._replace(time=0.0) for request in figure_2_requests()[:1200]], until=300)
    held = [sum(moment.usage) - moment.usage.free for moment in moments if moment.time >= 60]
    return (OPT_13B.weight_bytes + fmean(held) * OPT_13B.kv_bytes) / 1e9


def figure_1_plan(_: float) -> dict[Any, Job]:
    """A run for each system and batch size that fits the GPU."""
    return {(system, batch): Job(memory_at, (system, batch))
            for system in ("Orca (Max)", "vLLM") for batch in BATCHES if system == "vLLM" or batch <= 8}


def figure_1(found: dict[Any, float]) -> Sheet:
    """Left: what the memory is for. Right: memory and throughput against the number of running requests."""
    names = {"Orca (Max)": "Existing systems", "vLLM": "vLLM"}
    ours = {names[system]: [(0.0, 26.0)] for system, _ in found}
    for (system, batch), gigabytes in found.items():
        ours[names[system]].append((batch, gigabytes))
    paper, rates = curves("fig1 memory"), curves("fig1 throughput")
    slope = {name: (points[-1][1] - 26) / points[-1][0] for name, points in paper.items()}
    numbers = [Number(f"GB per request, {name}", (points[-1][1] - 26.0) / points[-1][0], slope[name], COUNTED)
               for name, points in ours.items()]
    context = slope["vLLM"] * 1e9 / OPT_13B.kv_bytes
    throughput = [(batch, batch / Cost(SERVER).seconds(Work(batch, batch, round(batch * context))))
                  for batch in BATCHES]
    theirs = dict(rates["Throughput"])
    numbers += [Number(f"tokens/s with {batch} requests", dict(throughput)[batch], theirs[batch], BASIS)
                for batch in (8, 40)]
    return Sheet("Figure 1: OPT-13B on an A100 with 40 GB", [
        Stacks("Memory", "GB", ("parameters", "KV cache", "others"), {"OPT-13B": (None, (26, 12, 2))}, GIVEN),
        Curves("Memory in use", "running requests", "GB", ours, paper, COUNTED, top=48),
        Curves("Throughput", "running requests", "tokens/s", {"Throughput": throughput}, rates, BASIS)], numbers,
        ["Existing systems reserve 2048 slots per request; 2048 x 800 KiB = 1.68 GB.",
         f"Throughput: each request reads {context:.0f} tokens, as many as the paper's memory panel holds for it."])


# ---- Figure 2 --------------------------------------------------------------------------------------------------------

def saturated(system: str) -> tuple[Usage, float]:
    """Mean use of the pool from 300 to 900 s at 4 requests per second, and the mean number of running requests."""
    moments: list[Moment] = play(make_system(system, SERVER.blocks()), figure_2_requests(), until=900)
    return mean_usage(moments, since=300), fmean(m.running for m in moments if m.time >= 300)


def figure_2(found: dict[str, tuple[Usage, float]]) -> Sheet:
    """Four shares of the pool for each of four systems."""
    paper = {system: tuple(shares) for system, shares in printed("fig2").items()}
    shares = {system: found[system][0].figure_2() if system in found else None for system in SYSTEMS}
    basis = "predicted: counted by the block manager; the clock hardly matters"
    numbers = [Number(f"{system}: {part}, %", ours, theirs, basis) for system in found
               for part, ours, theirs in zip(PARTS, shares[system], paper[system])]
    notes = ["vLLM reserves nothing: as the paper's script does, half of the free blocks is drawn as reservation and "
             "half as internal fragmentation."]
    if numbers:
        notes.append(f"Largest difference: {max(abs(n.ours - n.paper) for n in numbers):.2f} points.")
    bars = {system: (shares[system], paper[system]) for system in SYSTEMS}
    return Sheet("Figure 2: average share of the KV cache memory", [
        Stacks("OPT-13B, ShareGPT, 4 requests/s", "%", PARTS, bars, basis)], numbers, notes)


FIGURES = {
    "table1": Figure("model sizes and memory", lambda minutes: {}, table_1),
    "fig1": Figure("memory of a GPU, and what limits the batch", figure_1_plan, figure_1),
    "fig2": Figure("where the memory goes", lambda minutes: {s: Job(saturated, (s,)) for s in SYSTEMS}, figure_2),
}
