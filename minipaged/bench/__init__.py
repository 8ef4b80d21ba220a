"""Tokens per second on requests of random lengths, beside transformers in the same minutes: `bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from ..display import text_table
from ..loading import load_config
from .contenders import BLOCK_SIZE, Contender, ContinuousBatching, Minipaged, PaddedGenerate, Run
from .workload import RANDOM, REQUESTS, Workload, make_checkpoint, make_workload

SHARES = {"full": 1.0, "quarter": 0.25}  # of the blocks that all requests need at their full length
HEADER = ("system", "pool", "tokens/s", "minipaged is", "step ms", "all decoding ms", "steps", "peak KV blocks",
          "preemptions")


def bench(model: str = RANDOM, dtype: str = "float32", pools: Sequence[str] = tuple(SHARES), against: bool = False,
          rounds: int = 3, requests: int = REQUESTS) -> str:
    """Run the same requests by every contender in turn, round after round; returns the table of medians.

    Parameters
    ----------
    model : str
        As `LLM` takes it, or ``"opt-125m"``: random weights in that model's geometry, made here.
    dtype : str
        Of the weights and the cache.
    pools : sequence of str
        Names from `SHARES`.
    against : bool
        Run transformers too, interleaved, so that whatever else the machine does meets all alike.
    rounds : int
        Runs of each; before them comes one of few tokens, which is not counted.
    requests : int
        How many.

    Raises
    ------
    The errors of `LLM`; ContenderFailed
        Transformers did not give the tokens that were asked for.
    """
    with _source(model) as source:
        load = make_workload(load_config(source)[1].vocab_size, requests)
        field = make_field(source, dtype, pools, against, load)
        warm_up = Workload(load.prompts[:2], [4, 4][:requests])
        runs: list[list[Run]] = [[] for _ in field]
        with tqdm(total=len(field) * (1 + rounds), desc="runs", disable=None) as bar:
            for turn in [warm_up] + rounds * [load]:
                for contender, kept in zip(field, runs):
                    bar.set_postfix_str(f"{contender.name}, {contender.pool} pool")
                    run = contender.run(turn)
                    kept += [] if turn is warm_up else [run]
                    bar.update()
        return report(field, runs, load, f"{model}, {dtype}")


@contextmanager
def _source(model: str) -> Iterator[str]:
    if model != RANDOM:
        yield model
        return
    with TemporaryDirectory() as folder:
        yield make_checkpoint(Path(folder))


def make_field(source: str, dtype: str, pools: Sequence[str], against: bool, load: Workload) -> list[Contender]:
    """Everyone who runs, each with each pool; transformers' two share one copy of the weights.

    Where requests must give way, minipaged runs once more with all of them swapped: on a CPU both pools lie in the same
    memory, and a copy costs less than to compute again (§7.3).
    """
    needed = load.blocks(BLOCK_SIZE)
    blocks = {pool: max(ceil(sum(needed) * SHARES[pool]), *needed) for pool in pools}
    field: list[Contender] = [Minipaged(source, dtype, pool, blocks[pool]) for pool in pools]
    field += [Minipaged(source, dtype, pool, blocks[pool], preemption_mode="swap") for pool in pools if pool != "full"]
    if against:
        from transformers import AutoModelForCausalLM

        device = field[0].llm.engine.runner.device
        folder = load_config(source)[0]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
        field += [ContinuousBatching(model, pool, blocks[pool]) for pool in pools]
        field += [PaddedGenerate(model, pool, SHARES[pool]) for pool in pools]
    return field


def report(field: Sequence[Contender], runs: Sequence[Sequence[Run]], load: Workload, what: str) -> str:
    """One line for each contender and pool: medians over the rounds, and minipaged's lead, the median of the ratios."""
    ours = {contender.pool: kept for contender, kept in zip(field, runs) if contender.name == "minipaged"}
    rows = [_row(contender, kept, ours[contender.pool]) for contender, kept in zip(field, runs)]
    return "\n".join([
        text_table(HEADER, rows, f"{what}: {len(load.prompts)} requests at once, {load.prompt_tokens:,} prompt and "
                                 f"{load.output_tokens:,} output tokens"), "",
        f"Medians of {len(runs[0])} rounds in which all took turns; PyTorch with {torch.get_num_threads()} threads; "
        f"blocks of {BLOCK_SIZE} tokens.",
        f"Attention: {field[0].llm.engine.runner.backend.reason}.",
        "Step: one iteration. All decoding: those that gave every request one more token, prompts left out."])


def _row(contender: Contender, kept: Sequence[Run], ours: Sequence[Run]) -> tuple[object, ...]:
    speed = median(run.tokens / run.seconds for run in kept)
    if not isinstance(contender, Minipaged):
        lead = median((mine.tokens / mine.seconds) / (run.tokens / run.seconds) for mine, run in zip(ours, kept))
        return contender.name, contender.pool, round(speed, 1), f"{lead:.2f} times as fast", *[""] * 5
    last = kept[-1]
    return (contender.name, contender.pool, round(speed, 1), "", _ms(*(run.steps for run in kept)),
            _ms(*(run.decodes for run in kept)), len(last.steps), f"{last.peak_blocks} of {contender.blocks}",
            last.preemptions)


def _ms(*seconds: Sequence[float]) -> str:
    every = [second for run in seconds for second in run]
    return f"{1000 * median(every):.2f}" if every else ""
