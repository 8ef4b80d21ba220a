"""Where memory goes: Table 1, Figures 1 and 2. The scheduler and the block managers are the real ones."""

from __future__ import annotations

import json
from importlib.resources import files
from statistics import fmean
from typing import Any

from ..memory.manager import BlockSpaceManager
from ..scheduler import Scheduler
from ..sequence import SequenceGroup
from ..simulate.clock import Moment, mean_usage, opt_13b_step, play, request
from ..simulate.contiguous import ContiguousSpaceManager
from ..simulate.usage import Usage
from .paper import curves, printed
from .sheet import COUNTED, GIVEN, Bars, Curves, Figure, Job, Number, Sheet, Stacks

BLOCK_SIZE, BLOCKS = 16, 984  # the grey bar of Orca (Max) in Figure 2 is 88 / 984
SYSTEMS = {"Orca (Max)": "max", "Orca (Pow2)": "pow2", "Orca (Oracle)": "oracle", "vLLM": None}
PARTS = ("token states", "reservation", "internal fragmentation", "external fragmentation & others")
MODELS = {"OPT-13B": (5120, 40), "OPT-66B": (9216, 64), "OPT-175B": (12288, 96)}  # hidden size, layers
BATCHES = (1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
OPT_13B_GB, KV_BYTES = 26.0, 2 * 5120 * 40 * 2


def scheduler_of(system: str, max_num_seqs: int = 256, blocks: int = BLOCKS,
                 block_size: int = BLOCK_SIZE) -> Scheduler:
    """A scheduler over an empty pool that is managed as this system does it."""
    manager = (BlockSpaceManager(block_size, blocks, num_cpu_blocks=0) if system == "vLLM"
               else ContiguousSpaceManager(SYSTEMS[system], block_size, blocks))
    return Scheduler(manager, max_num_seqs, max_num_batched_tokens=2560)


def requests() -> list[tuple[float, SequenceGroup]]:
    """The 900 s of arrivals behind Figure 2."""
    data = json.loads((files("minipaged") / "data" / "figure_2_requests.json").read_text(encoding="utf-8"))
    return [(time / 100, request(number, prompt, output))
            for number, (time, prompt, output) in enumerate(data["requests"])]


# ---- Table 1 ---------------------------------------------------------------------------------------------------------

def table_1(_: dict[Any, Any]) -> Sheet:
    """KV slots from the memory for them and the bytes of a token (§3: 2 x hidden size x layers x 2 bytes)."""
    paper = printed("table1")
    slots = {model: paper["KV cache (GB)"][model] * 2**30 / (2 * hidden * layers * 2)
             for model, (hidden, layers) in MODELS.items()}
    numbers = {model: Number(f"KV slots of {model}, thousands", count / 1000, paper["KV slots"][model] / 1000,
                             "predicted: GB of Table 1, read as GiB, by the bytes of a token")
               for model, count in slots.items()}
    split = {}
    for model, total in paper["total GPU memory (GB)"].items():
        weights, cache = paper["parameters (GB)"][model], paper["KV cache (GB)"][model]
        split[model] = None, (100 * weights / total, 100 * cache / total, 100 * (total - weights - cache) / total)
    return Sheet("Table 1: model sizes and memory", [
        Stacks("GPU memory, as the table has it", "%", ("parameters", "KV cache", "others"), split, GIVEN),
        Bars("KV cache slots", "thousands", {n.what.split()[3].strip(","): n for n in numbers.values()})],
        list(numbers.values()),
        ["OPT-66B: 9.7K slots need 21.25 GiB; the table rounds them to 21 GB."])


# ---- Figure 1 --------------------------------------------------------------------------------------------------------

def memory_at(system: str, batch: int) -> float:
    """Mean GB in use while so many requests run, parameters included; a full queue, 300 s on the clock."""
    scheduler = scheduler_of(system, max_num_seqs=batch, blocks=4 * BLOCKS)  # a pool that never limits them
    moments = play(scheduler, [(0.0, group) for _, group in requests()[:1200]], until=300)
    held = [sum(moment.usage) - moment.usage.free for moment in moments if moment.time >= 60]
    return OPT_13B_GB + fmean(held) * KV_BYTES / 1e9


def figure_1_plan(_: float) -> dict[Any, Job]:
    """A run for each system and batch size that fits the GPU."""
    return {(system, batch): Job(memory_at, (system, batch))
            for system in ("Orca (Max)", "vLLM") for batch in BATCHES if system == "vLLM" or batch <= 8}


def figure_1(found: dict[Any, float]) -> Sheet:
    """Left: what the memory is for. Right: memory and throughput against the number of running requests."""
    names = {"Orca (Max)": "Existing systems", "vLLM": "vLLM"}
    ours = {names[system]: [(0.0, OPT_13B_GB)] for system, _ in found}
    for (system, batch), gigabytes in found.items():
        ours[names[system]].append((batch, gigabytes))
    paper, rates = curves("fig1 memory"), curves("fig1 throughput")
    slope = {name: (points[-1][1] - 26) / points[-1][0] for name, points in paper.items()}
    numbers = [Number(f"GB per request, {name}", (points[-1][1] - OPT_13B_GB) / points[-1][0], slope[name], COUNTED)
               for name, points in ours.items()]
    fitted = "fitted to these points: 25.6 ms + 0.44 ms per request"
    throughput = [(batch, batch / opt_13b_step(batch, 0)) for batch in (0, *BATCHES)]
    theirs = dict(rates["Throughput"])
    numbers += [Number(f"tokens/s with {batch} requests", dict(throughput)[batch], theirs[batch], fitted)
                for batch in (8, 40)]
    return Sheet("Figure 1: OPT-13B on an A100 with 40 GB", [
        Stacks("Memory", "GB", ("parameters", "KV cache", "others"), {"OPT-13B": (None, (26, 12, 2))}, GIVEN),
        Curves("Memory in use", "running requests", "GB", ours, paper, COUNTED, top=48),
        Curves("Throughput", "running requests", "tokens/s", {"Throughput": throughput}, rates, fitted)], numbers,
        ["Existing systems reserve 2048 slots per request; 2048 x 800 KiB = 1.68 GB."])


# ---- Figure 2 --------------------------------------------------------------------------------------------------------

def saturated(system: str) -> tuple[Usage, float]:
    """Mean use of the pool from 300 to 900 s at 4 requests per second, and the mean number of running requests."""
    moments: list[Moment] = play(scheduler_of(system), requests(), until=900)
    return mean_usage(moments, since=300), fmean(m.running for m in moments if m.time >= 300)


def figure_2(found: dict[str, tuple[Usage, float]]) -> Sheet:
    """Four shares of the pool for each of four systems."""
    paper = {system: tuple(shares) for system, shares in printed("fig2").items()}
    shares = {system: found[system][0].figure_2() if system in found else None for system in SYSTEMS}
    basis = "predicted: counted by the block manager; the clock, fitted to Figure 1, hardly matters"
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
