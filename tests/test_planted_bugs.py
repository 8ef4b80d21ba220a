"""Real bugs of other engines, planted one by one: the audit, the poison or the comparison with transformers shows each.

Every test first serves its workload without the bug, to which nothing objects.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import minipaged.engine
from minipaged import LLM, Chaos, SamplingParams, Trace
from minipaged.errors import AuditError
from minipaged.memory import manager as manager_module
from minipaged.memory import prefix, swap
from minipaged.memory.blocks import BlockAllocator
from minipaged.memory.cache import KVCache
from minipaged.memory.manager import BlockSpaceManager
from minipaged.scheduler import Scheduler

X, Y = [50, 60, 70, 80], [91, 81, 71, 61]
MAX_TOKENS = 8


@pytest.fixture
def serve(oracle) -> Callable[..., None]:
    """Runs prompts, greedily or as n samples, and compares them with transformers; all blocks must be free then."""
    truth = oracle("tiny-opt")

    def run(*prompts: list[int], n: int = 1, fail_first: bool = False, one_by_one: bool = False,
            **options: object) -> None:
        options = {"block_size": 4, "num_gpu_blocks_override": 40, "audit": True, **options}
        params = SamplingParams(temperature=0 if n == 1 else 1, n=n, seed=1, max_tokens=MAX_TOKENS, ignore_eos=True)
        with LLM("tiny-opt", **options) as llm:
            llm.engine.runner.cache.data.fill_(float("nan"))  # else it may hold what an earlier pool left in memory
            if fail_first:
                _fail_once(llm)
            groups = []
            for prompt in prompts:
                groups.append(llm.engine.add_request(prompt, params))
                while llm.engine.scheduler.has_unfinished and (one_by_one or prompt is prompts[-1]):
                    try:
                        llm.engine.step()
                    except MemoryError:
                        assert fail_first
            for prompt, group in zip(prompts, groups):
                for i, seq in enumerate(group.seqs):
                    if n == 1:
                        truth.assert_greedy(prompt, seq.output_token_ids, MAX_TOKENS)
                    else:
                        assert seq.output_token_ids == truth.sampled(prompt, MAX_TOKENS, 1 + i), f"sample {i} differs"
            assert llm.block_manager.device.num_free == 40, "blocks are lost"

    return run


def _fail_once(llm: LLM) -> None:
    run = llm.engine.runner.run

    def fail(*args: object) -> None:
        llm.engine.runner.run = run
        raise MemoryError

    llm.engine.runner.run = fail


def test_never_returning_a_block(serve, monkeypatch) -> None:
    serve(X, Y)
    monkeypatch.setattr(BlockAllocator, "_release", lambda self, block: None)
    with pytest.raises(AuditError, match="has 0 readers and stands 0 times in the free list"):
        serve(X, Y)
    with pytest.raises(AssertionError, match="blocks are lost"):
        serve(X, Y, audit=False)


def test_returning_a_block_that_is_still_read(serve, monkeypatch) -> None:
    """The reference count is ignored: the first reader that leaves takes the block with it."""
    def free(self: BlockAllocator, block: int) -> None:
        self.ref_counts[block] = 0
        self._release(block)

    serve(X + Y[:2], n=3)
    monkeypatch.setattr(BlockAllocator, "free", free)
    with pytest.raises(AuditError, match="two writers|readers"):
        serve(X + Y[:2], n=3)


def test_hashing_a_block_without_its_prefix(serve, monkeypatch) -> None:
    """Both blocks of the later prompts were seen before, but behind other tokens."""
    prompts = [X + Y + [5], *(Y + X + [last] for last in (5, 105, 205, 305))]
    serve(*prompts, enable_prefix_caching=True, one_by_one=True)
    right = prefix.block_key
    for module in (prefix, manager_module):
        monkeypatch.setattr(module, "block_key", lambda previous, token_ids: right(b"", token_ids))
    serve(*prompts, one_by_one=True)
    with pytest.raises(AssertionError, match="logit is"):
        serve(*prompts, enable_prefix_caching=True, one_by_one=True)


def test_not_copying_on_write(serve, monkeypatch) -> None:
    serve(X + Y[:2], n=2)
    monkeypatch.setattr(BlockSpaceManager, "_copy_on_write", lambda self, seq, table, copied=None: [])
    with pytest.raises(AuditError, match="two writers|copy it first"):
        serve(X + Y[:2], n=2)
    with pytest.raises(AssertionError, match="sample . differs"):
        serve(X + Y[:2], n=2, audit=False)


def test_a_new_block_without_the_copy(serve, monkeypatch) -> None:
    """The table is right and the contents are not: nothing that the audit could see, but the new block holds NaN."""
    serve(X + Y[:2], n=2)
    monkeypatch.setattr(KVCache, "copy_blocks", lambda self, pairs: None)
    with pytest.raises((AssertionError, RuntimeError), match="sample . differs|nan"):
        serve(X + Y[:2], n=2)


def test_losing_what_is_shared_on_swap(serve, monkeypatch) -> None:
    """Each table moves by itself: the tokens stay right, but the host pool holds some blocks several times."""
    move, sizes = swap.move_tables, []

    def counted(tables: list, source: BlockAllocator, target: BlockAllocator) -> list[tuple[int, int]]:
        before = len({block for table in tables for block in table.blocks})
        pairs = manager_module.mover(tables, source, target)
        sizes.append((before, len({block for table in tables for block in table.blocks})))
        return pairs

    def one_by_one(tables: list, source: BlockAllocator, target: BlockAllocator) -> list[tuple[int, int]]:
        return [pair for table in tables for pair in move([table], source, target)]

    def swapped() -> None:
        sizes.clear()
        serve(X + Y[:2], n=3, chaos=Chaos(at={3: [0]}, how="swap"))
        assert len(sizes) == 2, "not swapped out and in"
        assert all(before == after for before, after in sizes), f"sharing is lost: {sizes}"

    monkeypatch.setattr(manager_module, "move_tables", counted)
    monkeypatch.setattr(manager_module, "mover", move, raising=False)
    swapped()
    monkeypatch.setattr(manager_module, "mover", one_by_one)
    with pytest.raises(AssertionError, match=r"sharing is lost: \[\(4, 6\), "):
        swapped()


def test_a_query_of_length_zero_when_all_blocks_hit(serve, monkeypatch) -> None:
    """The last token's keys and values are there, but not its logits; the model gets nothing to run."""
    fill = BlockSpaceManager._fill

    def no_last_token(self: BlockSpaceManager, plan: object, made: dict) -> list:
        copies = fill(self, plan, made)
        plan.seq.num_computed = self.block_tables[plan.seq.seq_id].num_shared
        return copies

    prompts = [X + Y, X + Y]
    serve(*prompts, enable_prefix_caching=True, one_by_one=True)
    monkeypatch.setattr(BlockSpaceManager, "_fill", no_last_token)
    serve(*prompts, one_by_one=True)
    with pytest.raises((RuntimeError, IndexError), match="0 elements|size 0"):  # of transformers' decoder, or the packed
        serve(*prompts, enable_prefix_caching=True, one_by_one=True)


def test_a_hit_on_a_block_that_is_not_computed_yet(serve, monkeypatch) -> None:
    """Blocks are remembered when they are allocated; the iteration that was to compute them fails."""
    fill = BlockSpaceManager._fill

    def too_early(self: BlockSpaceManager, plan: object, made: dict) -> list:
        copies, table = fill(self, plan, made), self.block_tables[plan.seq.seq_id]
        for block, key in zip(table.blocks, table.keys):
            self.device.remember(block, key)
        return copies

    serve(X + Y + [5], enable_prefix_caching=True, fail_first=True)
    monkeypatch.setattr(BlockSpaceManager, "_fill", too_early)
    serve(X + Y + [5], enable_prefix_caching=True)
    with pytest.raises((AssertionError, RuntimeError), match="nan|logit is|lengths differ"):
        serve(X + Y + [5], enable_prefix_caching=True, fail_first=True)


@pytest.mark.parametrize("at", [3, 4, 5])
def test_dropping_a_token_at_a_block_boundary_after_preemption(serve, monkeypatch, at: int) -> None:
    """A recomputed sequence whose last block has one token takes this one for computed: seen only where that is so."""
    fill = BlockSpaceManager._fill

    def drop(self: BlockSpaceManager, plan: object, made: dict) -> list:
        copies, table = fill(self, plan, made), self.block_tables[plan.seq.seq_id]
        if plan.seq.num_generated and table.num_tokens % self.block_size == 1:
            table.num_shared = table.num_tokens
        return copies

    serve(X + Y[:2], chaos=Chaos(at={at: [0]}, how="recompute"))
    monkeypatch.setattr(BlockSpaceManager, "_fill", drop)
    if at != 4:  # before iteration 4 there are the 6 tokens of the prompt and 3 generated ones
        return serve(X + Y[:2], chaos=Chaos(at={at: [0]}, how="recompute"))
    with pytest.raises((AssertionError, RuntimeError), match="nan|logit is"):
        serve(X + Y[:2], chaos=Chaos(at={at: [0]}, how="recompute"))


# ---- reading what was freed --------------------------------------------------------------------------------------

def _free_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running sequence's first block goes back to the pool, while its table keeps it."""
    grow = Scheduler._grow_running

    def leak(self: Scheduler, out: object) -> bool:
        for group in self.running:
            block = self.manager.get_block_table(group.seqs[0]).blocks[0]
            if group.seqs[0].num_generated == 6 and self.manager.device.ref_counts[block]:
                self.manager.device.free(block)
        return grow(self, out)

    monkeypatch.setattr(Scheduler, "_grow_running", leak)
    monkeypatch.setattr(BlockSpaceManager, "free", lambda self, seq: self.block_tables.pop(seq.seq_id, None))


def test_reading_a_freed_block(serve, monkeypatch) -> None:
    """The audit sees it in the books; without the books the poison shows it; without both nobody would notice."""
    serve(X + Y)
    _free_too_early(monkeypatch)
    with pytest.raises(AuditError, match="device block 0 is in 1 tables but counts 0"):
        serve(X + Y)
    with pytest.raises(AssertionError, match="blocks are lost"):
        serve(X + Y, audit=False)
    monkeypatch.setattr(minipaged.engine, "audit", lambda manager: None)
    with pytest.raises((AssertionError, RuntimeError), match="nan|logit is"):
        serve(X + Y)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 2, 6])
def test_every_block_that_is_free_again_is_poisoned(caching: bool, max_tokens: int) -> None:
    """But those that the prefix cache keeps; also blocks that are taken and freed in a single iteration."""
    trace = Trace()
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=12, audit=True, enable_prefix_caching=caching,
             trace=trace) as llm:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        for prompts in ([X + Y, Y], [Y + X], [X]):
            llm.generate(prompts, params)
            data = llm.engine.runner.cache.data
            used = {event.block for event in trace.events if event.kind == "allocate"}
            alive = [b for b in used.intersection(llm.block_manager.device.free_list)
                     if not torch.isnan(data[:, :, b]).all()]
            assert used
            assert not alive, f"the free blocks {alive} can be read without notice"
