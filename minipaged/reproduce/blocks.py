"""Block tables on the live engine: Figure 8, copy-on-write, and Figure 9, beam search."""

from __future__ import annotations

from typing import Any

from .sheet import Figure, Job, Number, Sheet, Tables

LIVE = "measured: the engine with tiny-opt"
PAPER_8 = {"at the prompt": ({"A1": [7, 1], "A2": [7, 1]}, {7: 2, 1: 2}),
           "after the first writes": ({"A1": [7, 3], "A2": [7, 1]}, {7: 2, 1: 1, 3: 1})}
PAPER_9 = {"before": ([[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]],
                      {0: 4, 1: 3, 3: 3, 2: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}),
           "after": ([[0, 1, 3, 6, 9], [0, 1, 3, 6, 10], [0, 1, 3, 7, 11], [0, 1, 3, 7, 12]],
                     {0: 4, 1: 4, 3: 4, 6: 2, 7: 2, 9: 1, 10: 1, 11: 1, 12: 1})}
Moment = tuple[list[list[int]], dict[int, int]]  # block tables, and readers of each block in use


def _readers(manager: Any) -> dict[int, int]:
    return {block: count for block, count in enumerate(manager.device.ref_counts) if count}


def parallel_sampling() -> dict[str, Moment]:
    """Figure 8: two samples of a prompt of seven tokens, blocks of four."""
    from .. import LLM, SamplingParams

    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=9, audit=True) as llm:
        llm.block_manager.device.hand_out_next([7, 1, 3])
        [*prompt] = llm.get_tokenizer()("Four score and seven years ago our", add_special_tokens=False)["input_ids"]
        stream = llm.stream(prompt, SamplingParams(n=2, temperature=2.0, ignore_eos=True, max_tokens=4, seed=0))
        return {moment: ([list(table.blocks) for table in next(stream).block_tables], _readers(llm.block_manager))
                for moment in PAPER_8}


def beam_search() -> dict[str, Moment]:
    """Figure 9: four candidates, and a choice in which all new ones come from two of them.

    The scheduler, the block manager and the step that replaces candidates are the engine's; the scores are a script,
    which names for each new candidate the one it comes from.
    """
    from .. import LLM, BeamSearchParams
    from ..beam import Candidate

    with LLM("tiny-opt", block_size=2, num_gpu_blocks_override=32, audit=True) as llm:
        engine, manager = llm.engine, llm.block_manager
        group = engine.add_request([5, 6], BeamSearchParams(beam_width=4, max_tokens=9, ignore_eos=True))

        def iteration(parents: list[int], next_blocks: tuple[int, ...] = ()) -> Moment:
            """The tables of one iteration, after which candidate i goes on from candidate ``parents[i]``."""
            manager.device.hand_out_next(next_blocks)
            engine.scheduler.schedule()
            moment = [list(manager.get_block_table(s).blocks) for s in group.unfinished], _readers(manager)
            script = [Candidate(parent, 7 + i, -0.1 * i) for i, parent in enumerate(parents)]
            engine.output_processor.advance_beams(group, group.unfinished, script)
            return moment

        iteration([0, 0, 0, 0], (0,))
        iteration([0, 1, 2, 3], (1, 2, 5, 8))
        iteration([0, 0, 0, 1])
        iteration([0, 1, 2, 3], (3, 9, 10, 4))
        iteration([0, 0, 0, 3])
        iteration([0, 1, 2, 3], (5, 6, 7, 8))
        return {"before": iteration([1, 1, 2, 2]), "after": iteration([0, 1, 2, 3], (9, 10, 11, 12))}


def figure_8(found: dict[str, dict[str, Moment]]) -> Sheet:
    """The tables of both samples, before and after the copy."""
    paper = {moment: (list(tables.values()), readers) for moment, (tables, readers) in PAPER_8.items()}
    return _sheet("Figure 8: parallel sampling, copy-on-write", found, paper, ["A1", "A2"],
                  "Block 1 has two readers; the first writer gets a copy, block 3, and the other writes in place.")


def figure_9(found: dict[str, dict[str, Moment]]) -> Sheet:
    """The tables of the four candidates, before and after the choice."""
    return _sheet("Figure 9: beam search with 4 candidates", found, PAPER_9, [f"candidate {i}" for i in range(4)],
                  "All new candidates come from candidates 1 and 2; blocks 2, 4, 5 and 8 are freed; nothing is copied. "
                  "A script chose the candidates, as the figure has them; the tables are the engine's.")


def _sheet(title: str, found: dict[str, dict[str, Moment]], paper: dict[str, Moment], names: list[str],
           note: str) -> Sheet:
    panels, numbers = [], []
    for moment, (tables, readers) in found.get("run", {}).items():
        theirs, their_readers = paper[moment]
        by_name = sorted(tables) if len(names) > 2 else tables  # beams have no order of their own
        panels.append(Tables(moment, dict(zip(names, by_name)), readers, dict(zip(names, theirs)), LIVE))
        same = sum(mine == yours for mine, yours in zip(by_name, theirs))
        numbers += [Number(f"{moment}: tables as in the figure", same, len(theirs), LIVE),
                    Number(f"{moment}: blocks with the figure's reference count",
                           sum(readers.get(block) == count for block, count in their_readers.items()),
                           len(their_readers), LIVE)]
    return Sheet(title, panels, numbers,
                 [note, "The free list is set before, so that blocks get the figure's numbers."])


FIGURES = {
    "fig8": Figure("copy-on-write of two samples", lambda minutes: {"run": Job(parallel_sampling)}, figure_8),
    "fig9": Figure("beams as a tree of blocks", lambda minutes: {"run": Job(beam_search)}, figure_9),
}
