"""Who runs the benchmark's requests: minipaged, and transformers in the two ways that it offers."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import MinipagedError
from .workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine import LLMEngine

BLOCK_SIZE = 16


class ContenderFailed(MinipagedError, RuntimeError):
    """What the benchmark compares with did not give the tokens that were asked for."""


@dataclass(frozen=True)
class Run:
    """One run of all requests.

    Attributes
    ----------
    tokens : int
        Generated for the requests; padding and what goes on behind a request's length do not count.
    seconds : float
        From the first request's arrival to the last token.
    steps : tuple[float, ...]
        Seconds of each iteration; empty where they cannot be seen.
    decodes : tuple[float, ...]
        Those of them that gave each of the requests, all of them running, one more token.
    peak_blocks, preemptions : int or None
        Of minipaged.
    """

    tokens: int
    seconds: float
    steps: tuple[float, ...] = ()
    decodes: tuple[float, ...] = ()
    peak_blocks: int | None = None
    preemptions: int | None = None


class Contender(Protocol):
    """One way to run the requests; ``pool`` says with which memory."""

    name: str
    pool: str

    def run(self, load: Workload) -> Run:
        """All requests at once, greedy, each to its full length."""


class Minipaged:
    """The engine, with a pool of so many blocks.

    Parameters
    ----------
    source, dtype : str
        As `LLM` takes them.
    pool : str
        For the table.
    blocks : int
        In the device pool.
    block_size : int
        Tokens of a block.
    preemption_mode : str or None
        As `LLM` takes it.
    """

    def __init__(self, source: str, dtype: str, pool: str, blocks: int, block_size: int = BLOCK_SIZE,
                 preemption_mode: str | None = None) -> None:
        from .. import LLM

        self.pool, self.blocks = pool, blocks
        self.name = "minipaged, swapping" if preemption_mode == "swap" else "minipaged"
        self.llm = LLM(source, dtype=dtype, block_size=block_size, num_gpu_blocks_override=blocks, audit=False,
                       preemption_mode=preemption_mode)

    def run(self, load: Workload) -> Run:
        """All requests at once, greedy, each to its full length."""
        from .. import SamplingParams

        engine, steps, decodes = self.llm.engine, [], []
        with _Watch(engine) as watch:
            start = perf_counter()
            groups = [engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
                      for prompt, length in zip(load.prompts, load.output_lens)]
            while engine.scheduler.has_unfinished:
                began = perf_counter()
                first = len(engine.step()) < len(groups) or any(group.num_generated == 1 for group in groups)
                steps.append(perf_counter() - began)
                decodes += [] if first else steps[-1:]
            seconds = perf_counter() - start
        tokens = sum(group.num_generated for group in groups)
        return Run(tokens, seconds, tuple(steps), tuple(decodes), watch.peak_blocks, watch.preemptions)


class _Watch:
    """Counts, from outside of the scheduler, the blocks in use and the requests that give way."""

    def __init__(self, engine: "LLMEngine") -> None:
        self.scheduler, self.pool = engine.scheduler, engine.manager.device
        self.peak_blocks = self.preemptions = 0

    def __enter__(self) -> "_Watch":
        schedule = self.scheduler.schedule

        def watched() -> object:
            """The scheduler's own decision; who ran before and does no more was preempted, as nobody ends in it."""
            before = list(self.scheduler.running)
            out = schedule()
            self.preemptions += sum(group not in self.scheduler.running for group in before)
            self.peak_blocks = max(self.peak_blocks, self.pool.num_blocks - self.pool.num_free)
            return out

        self.scheduler.schedule = watched
        return self

    def __exit__(self, *exc: object) -> None:
        del self.scheduler.schedule  # the class's own again


class ContinuousBatching:
    """transformers' continuous batching: a paged cache of its own, with pages of as many tokens as our blocks.

    Its loop takes no request in while less than 15 % of its pages are free, so the full pool has twice the need.
    """

    name = "transformers, continuous batching"

    def __init__(self, model: "PreTrainedModel", pool: str, blocks: int) -> None:
        self.model, self.pool, self.blocks = model, pool, 2 * blocks if pool == "full" else blocks

    def run(self, load: Workload) -> Run:
        """All requests at once, greedy, each to its full length; making the cache is not counted."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=1)
        cache = ContinuousBatchingConfig(page_size=BLOCK_SIZE, num_blocks=self.blocks)
        with self.model.continuous_batching_context_manager(config, continuous_batching_config=cache) as manager:
            start, tokens, left = perf_counter(), 0, len(load.prompts)
            for prompt, length in zip(load.prompts, load.output_lens):
                manager.add_request(prompt, max_new_tokens=length)
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running() or result is not None and result.error:
                    raise ContenderFailed(f"{self.name} stopped: {result and result.error}; its log says more")
                if result is not None and result.is_finished():
                    tokens, left = tokens + len(result.generated_tokens), left - 1
            return Run(_all(tokens, load, self.name), perf_counter() - start)


class PaddedGenerate:
    """transformers' ``generate``: as many requests as the pool's share, padded to the longest, until all are done.

    Padding takes more memory than the pool has; that is to its advantage.
    """

    name = "transformers, padded generate"

    def __init__(self, model: "PreTrainedModel", pool: str, share: float) -> None:
        self.model, self.pool, self.share = model, pool, share

    def run(self, load: Workload) -> Run:
        """Batch after batch, greedy, each as long as its longest request."""
        size, tokens, start = max(1, round(self.share * len(load.prompts))), 0, perf_counter()
        for i in range(0, len(load.prompts), size):
            prompts, lengths = load.prompts[i:i + size], load.output_lens[i:i + size]
            longest = max(map(len, prompts))
            padded = [[1] * (longest - len(prompt)) + prompt for prompt in prompts]
            mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            out = self.model.generate(torch.tensor(padded, device=self.model.device),
                                      attention_mask=torch.tensor(mask, device=self.model.device), do_sample=False,
                                      max_new_tokens=max(lengths), min_new_tokens=max(lengths), pad_token_id=1)
            tokens += sum(min(length, out.shape[1] - longest) for length in lengths)
        return Run(_all(tokens, load, self.name), perf_counter() - start)


def _all(tokens: int, load: Workload, name: str) -> int:
    if tokens != load.output_tokens:
        raise ContenderFailed(f"{name} generated {tokens} tokens where {load.output_tokens} were asked for")
    return tokens
