"""Random workloads against transformers: any mix of requests, any settings, the same tokens.

    python tests/workloads.py 2000        # so many, on all bundled and small random models
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from models import make_checkpoint
from oracle import TIE, Oracle

from minipaged import LLM, BeamSearchParams, Chaos, SamplingParams, Trace
from minipaged.engine import LLMEngine

NAMES = ("tiny-opt", "opt", "llama", "qwen3")
REQUESTS_PER_MODEL = 48
SAMPLING = [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 1.3, "top_k": 50, "top_p": 0.8}]


@dataclass
class Request:
    """A prompt and how to decode it."""

    prompt: list[int]
    params: SamplingParams | BeamSearchParams
    options: dict


@dataclass
class Workload:
    """Requests that arrive at given iterations, and the settings of the engine."""

    name: str
    requests: list[Request]
    arrivals: list[int]
    prefix: list[int] | None
    spare_blocks: int
    host_blocks: int
    settings: dict


def requests_of(name: str, vocab: int) -> list[Request]:
    """A fixed set of requests per model, so that transformers answers each only once; many share a beginning."""
    rng = random.Random(name)
    starts = [[rng.randrange(10, vocab) for _ in range(n)] for n in (8, 21, 32, 48)]
    made = []
    for number in range(REQUESTS_PER_MODEL):
        start = rng.choice(starts)[:rng.choice((8, 16, 21, 32, 48))] if rng.random() < 0.7 else []
        prompt = start + [rng.randrange(10, vocab) for _ in range(rng.choice((0, 1, 3, 7, 16)))]
        prompt = prompt or [rng.randrange(10, vocab)]
        max_tokens = rng.choice((1, 2, 5, 9, 17, 24))
        kind = number % 3
        if kind == 0:
            made.append(Request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens), {}))
        elif kind == 1:
            options = rng.choice(SAMPLING)
            made.append(Request(prompt, SamplingParams(n=rng.randint(1, 6), seed=number, max_tokens=max_tokens,
                                                       **options), options))
        else:
            options = rng.choice([{}, {"length_penalty": 0.5}, {"early_stopping": True}, {"length_penalty": -1.0},
                                  {"early_stopping": "never", "length_penalty": 2.0}])
            made.append(Request(prompt, BeamSearchParams(rng.randint(1, 6), max_tokens, **options), options))
    return made


def make_workload(seed: int, vocab_of: Callable[[str], int]) -> Workload:
    """Everything about it follows from the seed."""
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    requests = rng.sample(requests_of(name, vocab_of(name)), rng.randint(1, 6))
    prefix = None
    if rng.random() < 0.25:
        longest = max(requests, key=lambda request: len(request.prompt)).prompt
        prefix = longest[:rng.randint(1, len(longest))]
    settings = dict(block_size=rng.choice((1, 4, 16, 32)), enable_prefix_caching=rng.random() < 0.5,
                    preemption_mode=rng.choice((None, "swap", "recompute")),
                    attention=rng.choices(["eager", "torch", "cpu"], [15, 15, 70])[0],
                    chaos=Chaos(rng.choice((0.05, 0.3)), seed=seed) if rng.random() < 0.6 else None)
    return Workload(name, requests, sorted(rng.choice((0, 0, 1, 3, 8)) for _ in requests), prefix,
                    spare_blocks=rng.choice((0, 0, 1, 3, 10, 100)), host_blocks=rng.choice((0, 2, 20, 1000)),
                    settings=settings)


@cache
def _bytes_per_token(source: str) -> int:
    with LLM(source, num_gpu_blocks_override=1) as llm:
        return llm.engine.runner.bytes_per_token


def _blocks_alone(request: Request, size: int) -> int:
    """Blocks that a request needs at its longest: the prompt's full ones once, the others for each sequence."""
    total = -(-(len(request.prompt) + request.params.max_tokens - 1) // size)
    shared = total if request.params.max_tokens == 1 else len(request.prompt) // size
    return shared + request.params.width * (total - shared)


def run(workload: Workload, source: str, trace: Trace | None = None,
        meet: Callable[[LLMEngine], None] = lambda engine: None) -> list:
    """Serve the workload with the audit on; returns the finished groups. ``meet`` gets the engine before it begins."""
    size = workload.settings["block_size"]
    blocks = max(_blocks_alone(r, size) for r in workload.requests)
    block_bytes = _bytes_per_token(source) * size
    if workload.prefix is not None:  # its reader holds blocks for good
        blocks += -(-(len(workload.prefix) + 1) // size)
    with LLM(source, num_gpu_blocks_override=blocks + workload.spare_blocks, audit=True, trace=trace,
             swap_space=workload.host_blocks * block_bytes / (1 << 30), **workload.settings) as llm:
        engine = llm.engine
        meet(engine)
        if workload.prefix is not None:
            llm.register_prefix(workload.prefix)
        groups, arrivals, step = [], list(zip(workload.arrivals, workload.requests)), 0
        while arrivals or engine.scheduler.has_unfinished:
            while arrivals and arrivals[0][0] <= step:
                request = arrivals.pop(0)[1]
                groups.append(engine.add_request(request.prompt, request.params))
            engine.step()
            step += 1
            assert step < 20_000, "no progress"
        manager = engine.manager
        pinned = {block for seq in manager.prefixes for block in manager.block_tables[seq].blocks}
        assert manager.device.num_free == manager.device.num_blocks - len(pinned)
        assert manager.host.num_free == manager.host.num_blocks and not manager.swapped
        return groups


def check(workload: Workload, source: str, oracle: Oracle) -> None:
    """Run the workload and compare each request with transformers alone."""
    for request, group in zip(workload.requests, run(workload, source)):
        p, outputs = request.params, [seq.output_token_ids for seq in group.seqs]
        if isinstance(p, BeamSearchParams):
            _check_beams(request, group, oracle)
        elif p.temperature == 0:
            oracle.assert_greedy(request.prompt, outputs[0], p.max_tokens)
        else:
            wanted = [oracle.sampled(request.prompt, p.max_tokens, p.seed + i, **request.options) for i in range(p.n)]
            assert outputs == wanted


def _check_beams(request: Request, group, oracle: Oracle) -> None:
    p = request.params
    if p.beam_width == 1:  # transformers runs plain greedy search then, which ends at the first end token
        greedy = oracle.greedy(request.prompt, p.max_tokens)
        if not set(greedy) & oracle.eos:
            oracle.assert_greedy(request.prompt, group.seqs[0].output_token_ids, p.max_tokens)
        return
    wanted = oracle.beams(request.prompt, p.beam_width, p.max_tokens, **request.options)
    got = [(seq.output_token_ids, score) for score, seq in group.hypotheses]
    for (tokens, score), (wanted_tokens, wanted_score) in zip(got, wanted, strict=True):
        assert abs(score - wanted_score) < TIE * max(1, abs(wanted_score)), (got, wanted)
        assert tokens == wanted_tokens, (got, wanted)


def main(count: int) -> None:
    """Check so many workloads; stops at the first that differs, naming its seed."""
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: "tiny-opt" if name == "tiny-opt" else make_checkpoint(name, Path(folder)) for name in NAMES}
        oracles = {name: Oracle(source) for name, source in sources.items()}
        for seed in range(count):
            workload = make_workload(seed, lambda name: oracles[name].model.config.vocab_size)
            try:
                check(workload, sources[workload.name], oracles[workload.name])
            except BaseException:
                print(f"workload {seed}: {workload}", file=sys.stderr)
                raise
            if (seed + 1) % 50 == 0:
                print(f"{seed + 1} workloads give the tokens of transformers", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
