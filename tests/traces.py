"""Traces to test with: the paper's figures written down by hand, a run of the engine, and token texts hard to show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest

from minipaged import LLM, SamplingParams, Trace
from minipaged import trace as ev
from minipaged.engine import LLMEngine
from minipaged.scheduler import Scheduler, SchedulerOutputs

NASTY = ["<img src=x onerror=alert(1)>", "</script>", "]]>", "\n", "\r", "\t", "\x00\x1b[31m", " a  b ", "&amp;",
         "'\"><", "\u202eabc", "\ud800", "\u0301", "日本語", "", "\\n", "x" * 500, "\ufffe", "| free |"]


def start(**sizes: int) -> ev.Start:
    """An engine with the pool of the paper's figures, unless sizes say otherwise."""
    shape = dict(block_size=4, num_blocks=9, num_host_blocks=4, max_model_len=2048, bytes_per_token=819200)
    return ev.Start(step=0, schema=ev.SCHEMA, model="none", attention="eager", attention_reason="",
                    **{**shape, **sizes})


def request(seq: int, prompt: str | list[str], blocks: list[int], size: int = 4) -> list[ev.Event]:
    """A request that arrives and is prefilled in iteration 1."""
    words = prompt.split() if isinstance(prompt, str) else prompt
    return [ev.Add(0, seq, seq, list(range(len(words))), words), ev.Admit(1, seq),
            *(ev.Allocate(1, seq, logical, block) for logical, block in enumerate(blocks)),
            ev.Write(1, seq, 0, len(words))]


def figure_7() -> list[ev.Event]:
    """Requests A and B of Figure 7, written down by hand."""
    a, b = request(0, "Four score and seven years ago our", [7, 1]), request(1, "It was the", [5])
    return [start(), *a, *b, ev.Sample(1, 0, 7, "fathers", -0.1), ev.Sample(1, 1, 3, "best", -0.1),
            ev.Write(2, 0, 7, 8), ev.Write(2, 1, 3, 4),
            ev.Sample(2, 0, 8, "brought", -0.1), ev.Sample(2, 1, 4, "of", -0.1),
            ev.Allocate(3, 0, 2, 3), ev.Write(3, 0, 8, 9), ev.Allocate(3, 1, 1, 2), ev.Write(3, 1, 4, 5),
            ev.Sample(3, 1, 5, "times", -0.1), ev.Write(4, 1, 5, 6)]


def figure_8() -> list[ev.Event]:
    """Samples A1 and A2 of Figure 8: the blocks are shared until A1 writes first and copies block 1 to block 3."""
    return [start(), *request(0, "Four score and seven years ago our", [7, 1]), ev.Fork(1, 0, 0, 1),
            ev.Share(1, 1, 0, 7), ev.Share(1, 1, 1, 1), ev.Sample(1, 0, 7, "fathers", -1.0),
            ev.Sample(1, 1, 8, "mothers", -1.0), ev.Copy(2, 0, 1, 1, 3), ev.Write(2, 0, 7, 8), ev.Write(2, 1, 7, 8)]


@dataclass(frozen=True)
class Run:
    """A trace of the engine, and what the block manager itself said after each iteration, from 0.

    Attributes
    ----------
    tables, num_tokens : list[dict]
        Per iteration, sequence to physical blocks and to slots given to its tokens.
    num_blocks : int
        Of the pool.
    """

    trace: Trace
    tables: list[dict[int, list[int]]]
    num_tokens: list[dict[int, int]]
    num_blocks: int


@cache
def small_pool_run() -> Run:
    """Five requests in a pool so small that some are preempted."""
    run = Run(Trace(), [{}], [{}], num_blocks=11)
    llm = LLM("tiny-opt", trace=run.trace, block_size=4, num_gpu_blocks_override=run.num_blocks, audit=True)
    prompts = [list(range(10, 10 + n)) for n in (7, 4, 9, 1, 12)]
    for _ in llm.stream(prompts, SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)):
        if run.trace.step == len(run.tables):
            held = llm.block_manager.block_tables
            run.tables.append({seq: list(table.blocks) for seq, table in held.items()})
            run.num_tokens.append({seq: table.num_tokens for seq, table in held.items()})
    return run


class Witness:
    """What the engine itself does in each iteration, noted beside its trace, by which the pictures are judged.

    Attributes
    ----------
    did : list[dict[int, str]]
        Per iteration, request to the letter of `minipaged.views.timeline.MEANING` for what its scheduler decided.
    device, host : list[int]
        Per iteration, blocks in use by the allocators when the model is about to run.
    tables : list[dict[int, list[int]]]
        After each iteration, sequence to physical blocks.
    ref_counts : list[tuple[list[int], list[int]]]
        After each iteration, of the device's and of the host's blocks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[dict[int, str]] = []
        self.device: list[int] = []
        self.host: list[int] = []
        self.tables: list[dict[int, list[int]]] = []
        self.ref_counts: list[tuple[list[int], list[int]]] = []
        known, schedule, step = set(), Scheduler.schedule, LLMEngine._step

        def watched(scheduler: Scheduler) -> SchedulerOutputs:
            waited = {group.request_id for group in scheduler.waiting}
            out = schedule(scheduler)
            ran = {group.request_id for group, _ in out.scheduled}
            did = {request: "D" if request not in waited else "R" if request in known else "P" for request in ran}
            known.update(ran)
            did |= {group.request_id: "w" for group in scheduler.waiting}
            self.did.append(did | {group.request_id: "S" for group in scheduler.swapped})
            for used, pool in ((self.device, scheduler.manager.device), (self.host, scheduler.manager.host)):
                used.append(pool.num_blocks - pool.num_free)
            return out

        def noted(engine: LLMEngine) -> list:
            groups, manager = step(engine), engine.manager
            self.tables.append({seq: list(table.blocks) for seq, table in manager.block_tables.items()})
            self.ref_counts.append((list(manager.device.ref_counts), list(manager.host.ref_counts)))
            return groups

        monkeypatch.setattr(Scheduler, "schedule", watched)
        monkeypatch.setattr(LLMEngine, "_step", noted)
