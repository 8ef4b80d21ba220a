"""The block manager: the paper's figures by number, and every operation against a brute-force model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import count

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from traces import start

from minipaged import BeamSearchParams, SamplingParams, Trace
from minipaged import trace as ev
from minipaged.beam import Candidate
from minipaged.errors import DoubleFree, InvalidConfig, OutOfBlocks
from minipaged.memory.audit import audit, audit_writes
from minipaged.memory.blocks import BlockAllocator
from minipaged.memory.manager import BlockSpaceManager
from minipaged.memory.prefix import PrefixCachingAllocator, block_key, block_keys
from minipaged.memory.table import translate
from minipaged.output_processor import OutputProcessor
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.text import Tokens
from minipaged.replay import replay

FOUR_SCORE = list(range(7))  # "Four score and seven years ago our"
NUMBERS = count()


def group_of(*token_ids: list[int]) -> SequenceGroup:
    """A request whose sequences have these tokens."""
    seqs = [Sequence(next(NUMBERS), list(tokens), 1) for tokens in token_ids]
    return SequenceGroup(next(NUMBERS), seqs, SamplingParams(), None, 10**6, 0)


def manager_of(blocks: int = 9, host: int = 0, next_blocks: tuple[int, ...] = (), caching: bool = False,
               block_size: int = 4) -> BlockSpaceManager:
    """A manager that hands out these blocks next."""
    manager = BlockSpaceManager(block_size, blocks, host, watermark=0, enable_prefix_caching=caching)
    manager.device.hand_out_next(next_blocks)
    return manager


def fork(manager: BlockSpaceManager, group: SequenceGroup, parent: Sequence) -> Sequence:
    """One more sequence of a request."""
    child = parent.fork(next(NUMBERS))
    manager.fork(parent, child)
    group.seqs.append(child)
    return child


def append(manager: BlockSpaceManager, seq: Sequence, token: int) -> list[tuple[int, int]]:
    """One more token, and its slot."""
    seq.token_ids.append(token)
    return manager.append_slot(seq)


def compute(manager: BlockSpaceManager, group: SequenceGroup) -> None:
    """What the engine does after the model ran."""
    for seq in group.unfinished:
        manager.mark_computed(seq)
        seq.num_computed = len(seq.token_ids)


def entries(manager: BlockSpaceManager, seq: Sequence) -> list[tuple[int, int]]:
    """A block table as §4.2 has it: (physical block, filled) per logical block."""
    table = manager.get_block_table(seq)
    return [(block, table.filled(logical)) for logical, block in enumerate(table.blocks)]


def books(manager: BlockSpaceManager) -> tuple:
    """All that an operation could change."""
    return deepcopy(({seq: (t.blocks, t.num_tokens, t.num_shared, t.keys) for seq, t in manager.block_tables.items()},
                     manager.swapped, *((pool.ref_counts, pool.free_list, list(getattr(pool, "kept", ())))
                                        for pool in (manager.device, manager.host))))


# ---- the paper's figures -----------------------------------------------------------------------------------------

def test_figure_6() -> None:
    manager, request = manager_of(next_blocks=(7, 1, 3)), group_of(FOUR_SCORE)
    seq = request.seqs[0]
    manager.allocate(request)
    assert entries(manager, seq) == [(7, 4), (1, 3)]
    assert append(manager, seq, 7) == [] and entries(manager, seq) == [(7, 4), (1, 4)]
    assert append(manager, seq, 8) == [] and entries(manager, seq) == [(7, 4), (1, 4), (3, 1)]


def test_figure_7() -> None:
    manager, a, b = manager_of(next_blocks=(7, 1, 5, 3, 2)), group_of(FOUR_SCORE), group_of([10, 11, 12])
    manager.allocate(a)
    manager.allocate(b)
    for token in (7, 8):
        append(manager, a.seqs[0], token)
        append(manager, b.seqs[0], token)
    append(manager, b.seqs[0], 9)
    assert entries(manager, a.seqs[0]) == [(7, 4), (1, 4), (3, 1)]
    assert entries(manager, b.seqs[0]) == [(5, 4), (2, 2)]
    assert sorted(manager.device.free_list) == [0, 4, 6, 8]


def test_figure_8() -> None:
    """A1 writes first and gets a copy of block 1 in block 3; A2 then is alone with block 1 and writes there."""
    manager, request = manager_of(next_blocks=(7, 1, 3)), group_of(FOUR_SCORE)
    manager.allocate(request)
    a1, a2 = request.seqs[0], fork(manager, request, request.seqs[0])
    counts = manager.device.ref_counts
    assert (counts[7], counts[1]) == (2, 2)
    assert append(manager, a1, 7) == [(1, 3)] and (counts[7], counts[1], counts[3]) == (2, 1, 1)
    assert append(manager, a2, 8) == [] and (counts[7], counts[1], counts[3]) == (2, 1, 1)
    assert (entries(manager, a1), entries(manager, a2)) == ([(7, 4), (3, 4)], [(7, 4), (1, 4)])


@pytest.mark.parametrize("block_size", [1, 4])
def test_figure_9(block_size: int) -> None:
    """All new candidates come from the old candidates 1 and 2; blocks 2, 4, 5 and 8 are freed."""
    manager, request = manager_of(blocks=13, block_size=block_size), group_of(list(range(block_size)))
    request.params = BeamSearchParams(4, 100)
    processor = OutputProcessor(manager, Tokens(None, "none"), set(), NUMBERS)
    request.seqs[0].detokenizer = processor.tokens.stream()
    manager.allocate(request)

    def advance(parents: list[int]) -> None:
        """One block of tokens more, of which the first makes the candidates differ."""
        for step in [parents] + [list(range(len(parents)))] * (block_size - 1):
            processor.advance_beams(request, request.seqs, [Candidate(p, i, -1.0) for i, p in enumerate(step)])
            for seq in request.seqs:
                assert manager.append_slot(seq) == [], "all beams differ at the beginning of a block"

    def paths() -> list[list[int]]:
        return [manager.get_block_table(seq).blocks for seq in request.seqs]

    for parents in ([0, 0], [0, 1], [0, 0, 0, 1]):
        advance(parents)
    assert paths() == [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]]
    assert manager.device.ref_counts == [4, 3, 1, 3, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    manager.device.hand_out_next([9, 10, 11, 12])
    free = manager.device.free
    manager.device.free = lambda block: (free(block), manager.device.hand_out_next([9, 10, 11, 12]))
    advance([1, 1, 2, 2])
    assert paths() == [[0, 1, 3, 6, 9], [0, 1, 3, 6, 10], [0, 1, 3, 7, 11], [0, 1, 3, 7, 12]]
    assert manager.device.ref_counts == [4, 4, 0, 4, 0, 0, 2, 2, 0, 1, 1, 1, 1]
    assert set(manager.device.free_list) == {2, 4, 5, 8}


# ---- single operations -------------------------------------------------------------------------------------------

def test_a_block_freed_twice_and_a_free_block_shared() -> None:
    pool = BlockAllocator(2)
    block = pool.allocate()
    pool.free(block)
    for operation in (pool.free, pool.share):
        with pytest.raises(DoubleFree, match=f"block {block} of the device pool"):
            operation(block)
    assert pool.num_free == 2


def test_only_free_blocks_can_be_handed_out_next() -> None:
    pool = BlockAllocator(3)
    pool.hand_out_next([2, 1])
    assert [pool.allocate(), pool.allocate()] == [2, 1]
    with pytest.raises(InvalidConfig, match=r"free are \[0\]"):
        pool.hand_out_next([0, 1])


def test_out_of_blocks_changes_nothing() -> None:
    manager, first, second = manager_of(blocks=3, host=2), group_of(FOUR_SCORE), group_of([1] * 5)

    def refused(says: str, operation: Callable[..., object], *args: object) -> None:
        before = books(manager)
        with pytest.raises(OutOfBlocks, match=says):
            operation(*args)
        assert books(manager) == before

    manager.allocate(first)
    refused("1 free blocks", manager.allocate, second)
    other = fork(manager, first, first.seqs[0])
    refused("all 0 blocks of the host", manager_of(host=0).host.allocate)
    assert append(manager, other, 7) == [(1, 2)] and append(manager, first.seqs[0], 7) == []
    refused("host pool", manager.swap_out, first)
    for seq in first.seqs:
        refused("all 3 blocks of the device pool", manager.append_slot, seq)


def test_swapping_keeps_what_is_shared() -> None:
    manager, request = manager_of(host=9), group_of(FOUR_SCORE)
    manager.allocate(request)
    for _ in range(2):
        fork(manager, request, request.seqs[0])
    for seq in request.seqs:
        append(manager, seq, seq.seq_id)
    device = {block for seq in request.seqs for block in manager.get_block_table(seq).blocks}
    pairs = manager.swap_out(request)
    assert len(device) == 4 and {source for source, _ in pairs} == device and len(pairs) == 4
    assert sorted(manager.host.ref_counts, reverse=True) == [3, 1, 1, 1, 0, 0, 0, 0, 0] and manager.device.num_free == 9
    back = manager.swap_in(request)
    assert {source for source, _ in back} == {target for _, target in pairs} and manager.host.num_free == 9
    first = {manager.get_block_table(seq).blocks[0] for seq in request.seqs}
    assert len(first) == 1 and manager.device.ref_counts[first.pop()] == 3


def test_recomputed_samples_share_again_what_they_have_in_common() -> None:
    """Four samples with 6 common and one own token, block size 4: one block for all, and one each."""
    manager, request = manager_of(), group_of(*(FOUR_SCORE[:6] + [20 + i] for i in range(4)))
    assert manager.allocate(request) == [] and 9 - manager.device.num_free == 5
    assert manager.device.ref_counts[manager.get_block_table(request.seqs[3]).blocks[0]] == 4
    assert [seq.num_computed for seq in request.seqs] == [0, 4, 4, 4]


# ---- prefixes ----------------------------------------------------------------------------------------------------

def test_the_key_of_a_block_knows_all_tokens_before_it() -> None:
    assert block_keys([1, 2, 3, 4], 2) == block_keys([1, 2, 3, 4, 5], 2)[:2]
    assert block_keys([1, 2, 3, 4], 2)[1] != block_keys([3, 4, 3, 4], 2)[1]
    assert block_keys([3, 4, 3, 4], 2)[0] != block_keys([3, 4, 3, 4], 2)[1]
    assert len(set(block_keys([0] * 9, 1))) == 9, "the same token at another position"


def test_the_block_left_longest_ago_is_forgotten_first() -> None:
    pool = PrefixCachingAllocator(4)
    keys = [block_key(b"", [i]) for i in range(4)]
    blocks = [pool.allocate() for _ in range(3)]
    for block, key in zip(blocks, keys):
        pool.remember(block, key)
    for index in (1, 0, 2):
        pool.free(blocks[index])
    assert pool.num_free == 4 and pool.allocate() == 3, "what is not remembered goes first"
    pool.share(blocks[1])
    pool.free(blocks[1])  # the longest ago is now block 0
    assert [pool.allocate() for _ in range(2)] == [blocks[0], blocks[2]]
    assert [pool.find_all([key]) for key in keys[:3]] == [[], [blocks[1]], []]
    assert pool.num_free == 1 and pool.allocate() == blocks[1] and pool.find_all(keys[1:2]) == []
    with pytest.raises(OutOfBlocks):
        pool.allocate()


def test_a_prompt_found_completely_still_computes_its_last_token() -> None:
    manager, prompt = manager_of(caching=True), list(range(8))
    first = group_of(prompt)
    manager.allocate(first)
    compute(manager, first)
    second = group_of(prompt)
    manager.allocate(second)
    assert entries(manager, second.seqs[0]) == entries(manager, first.seqs[0])
    assert second.seqs[0].num_computed == 7 and manager.get_block_table(second.seqs[0]).num_shared == 8
    audit_writes(manager, second.seqs)


def test_blocks_not_computed_yet_are_not_found() -> None:
    manager, prompt = manager_of(caching=True), list(range(8))
    first, second, third = group_of(prompt), group_of(prompt), group_of(prompt)
    manager.allocate(first)
    manager.allocate(second)
    assert second.seqs[0].num_computed == 0 and 9 - manager.device.num_free == 4
    compute(manager, first)
    manager.allocate(third)
    assert third.seqs[0].num_computed == 7 and 9 - manager.device.num_free == 4


def test_generated_blocks_are_found_too_and_outlive_their_reader() -> None:
    manager, request = manager_of(caching=True), group_of(FOUR_SCORE)
    manager.allocate(request)
    compute(manager, request)
    append(manager, request.seqs[0], 7)
    compute(manager, request)
    manager.free(request.seqs[0])
    again = group_of([*FOUR_SCORE, 7, 99])
    manager.allocate(again)
    assert again.seqs[0].num_computed == 8 and manager.device.num_free == 6


# ---- the state machine -------------------------------------------------------------------------------------------

PICK = st.integers(0, 1000)


class Memory(RuleBasedStateMachine):
    """Serves random requests as the engine would, the model's work replaced by what a slot should hold.

    ``content`` maps (pool, block, offset) to all tokens up to the one whose keys and values lie there: keys and values
    depend on nothing else. As in the engine, the copies that an iteration returns are made only when it runs.
    """

    steps, seen = 0, Counter()

    @initialize(block_size=st.integers(1, 5), blocks=st.integers(4, 16), host=st.sampled_from([0, 3, 16]),
                watermark=st.sampled_from([0.0, 0.2]), caching=st.booleans(), seed=PICK)
    def begin(self, block_size: int, blocks: int, host: int, watermark: float, caching: bool, seed: int) -> None:
        self.trace, self.random, self.numbers = Trace(), random.Random(seed), count()
        self.trace.events.append(start(block_size=block_size, num_blocks=blocks, num_host_blocks=host))
        self.manager = BlockSpaceManager(block_size, blocks, host, watermark, caching, self.trace)
        self.pools = {"device": self.manager.device, "host": self.manager.host}
        self.content: dict[tuple[str, int, int], tuple[int, ...]] = {}
        self.waiting, self.running, self.swapped, self.scheduled = [], [], [], []
        self.outs, self.ins, self.copies = [], [], []
        self.state, self.applied = replay(self.trace.events), 1

    # -- helpers

    def note(self, what: str) -> None:
        Memory.seen[what] += 1

    def tell(self, event: type[ev.Event], **what: object) -> None:
        self.trace.emit(event, **what)

    def tokens(self, length: int) -> list[int]:
        """Few different tokens, so that many beginnings are equal."""
        return [0 if self.random.random() < 0.8 else 1 for _ in range(length)]

    def token(self) -> int:
        return self.random.randrange(3)

    def free_blocks(self, manager: BlockSpaceManager, host: bool = False) -> int:
        """Counted from the tables alone."""
        pool = manager.host if host else manager.device
        return pool.num_blocks - len({block for seq, table in manager.block_tables.items()
                                      if (seq in manager.swapped) == host for block in table.blocks})

    def attempt(self, group: SequenceGroup, operation: Callable[[BlockSpaceManager, SequenceGroup], object]) -> int:
        """Try it on a copy that asks no permission: blocks left free, or -1 if there were too few."""
        twin, group = deepcopy((self.manager, group), {id(self.trace): ev.NO_TRACE})
        twin.can_allocate = lambda *_, **__: True
        try:
            operation(twin, group)
        except OutOfBlocks:
            return -1
        return self.free_blocks(twin)

    def refused(self, operation: Callable[[], object]) -> None:
        """It raises, and leaves everything as it was."""
        before = books(self.manager), len(self.trace)
        with pytest.raises(OutOfBlocks):
            operation()
        assert (books(self.manager), len(self.trace)) == before
        self.note("refused")

    def idle(self, pick: int) -> SequenceGroup:
        """A running request that this iteration has not scheduled; if there is none, a new iteration begins."""
        if all(group in self.scheduled for group in self.running):
            self.run()
        groups = [group for group in self.running if group not in self.scheduled]
        return groups[pick % len(groups)]

    def release(self, group: SequenceGroup) -> None:
        for seq in group.seqs:
            self.manager.free(seq)
            seq.num_computed = 0

    # -- one iteration

    @precondition(lambda self: not self.outs)
    @rule(pick=PICK, length=st.integers(1, 10))
    def admit(self, pick: int, length: int) -> None:
        """A request that waits, or a new one."""
        self.admit_one(self.waiting[pick % len(self.waiting)] if self.waiting and pick % 4 else self.add(length))

    def add(self, length: int) -> SequenceGroup:
        group = SequenceGroup(next(self.numbers), [Sequence(next(self.numbers), self.tokens(length), length)],
                              SamplingParams(), None, 10**6, 0)
        self.tell(ev.Add, request=group.request_id, seq=group.seqs[0].seq_id, token_ids=list(group.seqs[0].token_ids),
                  texts=["x"] * length)
        self.waiting.append(group)
        return group

    def admit_one(self, group: SequenceGroup) -> None:
        left = self.attempt(group, lambda manager, group: manager.allocate(group))
        assert self.manager.can_allocate(group, beside_others=False) == (left >= 0)
        assert self.manager.can_allocate(group, beside_others=True) == (left >= self.manager.watermark_blocks)
        if left < 0:
            return self.refused(lambda: self.manager.allocate(group))
        self.copies += self.manager.allocate(group)
        self.waiting.remove(group)
        self.running.append(group)
        self.scheduled.append(group)
        self.tell(ev.Admit, request=group.request_id)
        tables = [self.manager.get_block_table(seq) for seq in group.seqs]
        size = self.manager.block_size
        different = {tuple(seq.token_ids[:end * size + size]) for seq, table in zip(group.seqs, tables)
                     for end in range(len(table.blocks))}
        # Two registered prefixes may begin alike, in blocks of their own; which of them is shared is all one.
        pinned = {block for seq in self.manager.prefixes for block in self.manager.block_tables[seq].blocks}
        own = {block for table in tables for block in table.blocks} - pinned
        assert len(own) <= len(different), "sharing is lost"
        self.note("several recomputed" if len(group.seqs) > 1 else "admitted")
        self.note("found" if any(table.num_shared for table in tables) else "not found")

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def grow(self, pick: int) -> None:
        group = self.idle(pick)
        fits = self.attempt(group, lambda m, group: [m.append_slot(seq) for seq in group.seqs]) >= 0
        assert self.manager.can_append_slots([group]) == fits
        if not fits and len(group.seqs) == 1:
            self.refused(lambda: self.manager.append_slot(group.seqs[0]))
        if fits:
            self._append(group)

    def _append(self, group: SequenceGroup) -> None:
        for seq in group.seqs:
            self.copies += self.manager.append_slot(seq)
        self.scheduled.append(group)

    @precondition(lambda self: self.running and not self.ins)
    @rule(pick=PICK)
    def swap_out(self, pick: int) -> None:
        group = self.idle(pick)
        blocks = {block for seq in group.seqs for block in self.manager.get_block_table(seq).blocks}
        fits = len(blocks) <= self.free_blocks(self.manager, host=True)
        assert self.manager.can_swap_out(group) == fits
        if not fits:
            return self.refused(lambda: self.manager.swap_out(group))
        self.tell(ev.Preempt, request=group.request_id, why="", how="swap")
        pairs = self.manager.swap_out(group)
        assert {source for source, _ in pairs} == blocks and len(pairs) == len(blocks), "one host block per block"
        self.outs += pairs
        self.running.remove(group)
        self.swapped.append(group)
        self.note("swapped several" if len(group.seqs) > 1 else "swapped one")

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def recompute(self, pick: int) -> None:
        group = self.idle(pick)
        self.tell(ev.Preempt, request=group.request_id, why="", how="recompute")
        self.release(group)
        self.running.remove(group)
        self.waiting.append(group)

    @precondition(lambda self: self.swapped)
    @rule(pick=PICK)
    def swap_in(self, pick: int) -> None:
        if self.outs:
            self.run()
        group = self.swapped[pick % len(self.swapped)]

        def all_of_it(manager: BlockSpaceManager, group: SequenceGroup) -> None:
            manager.swap_in(group)
            for seq in group.seqs:
                manager.append_slot(seq)

        left = self.attempt(group, all_of_it)
        assert self.manager.can_swap_in(group, beside_others=False) == (left >= 0)
        assert self.manager.can_swap_in(group, beside_others=True) == (left >= self.manager.watermark_blocks)
        if left >= 0:
            self.ins += self.manager.swap_in(group)
            self.swapped.remove(group)
            self.running.append(group)
            self._append(group)
            self.note("swapped in")
        elif self.attempt(group, lambda manager, group: manager.swap_in(group)) < 0:
            self.refused(lambda: self.manager.swap_in(group))

    @precondition(lambda self: self.scheduled or self.outs)
    @rule()
    def run(self) -> None:
        """The copies in the engine's order, then each scheduled sequence writes and samples its next token."""
        self.note("copied" if self.copies else "ran")
        for pairs, source, target in ((self.outs, "device", "host"), (self.ins, "host", "device"),
                                      (self.copies, "device", "device")):
            self._move(pairs, source, target)
        seqs = [seq for group in self.scheduled for seq in group.seqs]
        audit_writes(self.manager, seqs)
        written: set[tuple[str, int, int]] = set()
        for seq in seqs:
            table = self.manager.get_block_table(seq)
            assert seq.num_computed < len(seq.token_ids) == table.num_tokens, "nothing would be computed"
            for position in range(max(seq.num_computed, table.num_shared), table.num_tokens):
                slot = "device", *translate(table.blocks, position, table.block_size)
                assert slot not in written, f"two write to {slot}"
                written.add(slot)
                self.content[slot] = tuple(seq.token_ids[:position + 1])
        for seq in seqs:
            self.manager.mark_computed(seq)
            seq.num_computed = len(seq.token_ids)
            self.sample(seq)
        self.outs, self.ins, self.copies, self.scheduled = [], [], [], []
        for pool, blocks in self.pools.items():  # what is free and not kept may be overwritten any time
            for block in blocks.free_list:
                for offset in range(self.manager.block_size):
                    self.content.pop((pool, block, offset), None)

    def _move(self, pairs: list[tuple[int, int]], source: str, target: str) -> None:
        assert len({write for _, write in pairs}) == len(pairs), "two copies into one block"
        moved = {(target, write, offset): self.content.get((source, read, offset))
                 for read, write in pairs for offset in range(self.manager.block_size)}
        self.content.update({slot: tokens for slot, tokens in moved.items() if tokens is not None})

    def sample(self, seq: Sequence) -> None:
        seq.token_ids.append(self.token())
        self.tell(ev.Sample, seq=seq.seq_id, token_id=seq.token_ids[-1], text="y", logprob=0.0)

    # -- between iterations

    @precondition(lambda self: self.running)
    @rule(pick=PICK, children=st.integers(1, 3))
    def fork(self, pick: int, children: int) -> None:
        self.run()
        group = self.running[pick % len(self.running)]
        for _ in range(children if len(group.seqs) + children <= 5 else 0):
            parent = group.seqs[pick % len(group.seqs)]
            child = parent.fork(next(self.numbers))
            child.token_ids.pop()  # forked before the newest token was sampled
            self.tell(ev.Fork, request=group.request_id, parent=parent.seq_id, seq=child.seq_id)
            self.manager.fork(parent, child)
            group.seqs.append(child)
            self.sample(child)
            self.note("forked")

    @precondition(lambda self: self.running or self.swapped)
    @rule(pick=PICK)
    def end(self, pick: int) -> None:
        """One sequence ends, or a request does: between iterations, wherever it is."""
        self.run()
        groups = self.running + self.swapped
        group = groups[pick % len(groups)]
        if len(group.seqs) > 1 and group in self.running and pick % 3:
            self.manager.free(group.seqs.pop(pick % len(group.seqs)))
            return
        self.note("aborted on host" if group in self.swapped else "ended")
        self.release(group)
        self.tell(ev.Finish, request=group.request_id, seq=group.seqs[0].seq_id, reason="abort")
        (self.running if group in self.running else self.swapped).remove(group)

    @precondition(lambda self: len(self.manager.prefixes) < 2 and self.random.random() < 0.3)
    @rule(length=st.integers(1, 9))
    def register_prefix(self, length: int) -> None:
        self.run()
        group = self.add(length)
        self.admit_one(group)
        if group in self.running:
            self.run()
            reader = group.seqs[0].fork(next(self.numbers))
            self.tell(ev.Fork, request=group.request_id, parent=group.seqs[0].seq_id, seq=reader.seq_id)
            self.manager.fork(group.seqs[0], reader)
            self.manager.prefixes[reader.seq_id] = reader.token_ids[:length]
            self.release(group)
            self.running.remove(group)
            self.note("prefix")

    # -- what must hold after each of them

    def check_invariants(self, *args: object, **kwargs: object) -> None:
        Memory.steps += 1
        if not hasattr(self, "manager"):
            return super().check_invariants(*args, **kwargs)
        audit(self.manager)
        self._check_counts()
        self._check_trace()
        if not (self.outs or self.ins or self.copies or self.scheduled):
            self._check_contents()
        super().check_invariants(*args, **kwargs)

    def _check_counts(self) -> None:
        assert self.manager.swapped <= self.manager.block_tables.keys()
        for host, pool in ((False, self.manager.device), (True, self.manager.host)):
            named = Counter(block for seq, table in self.manager.block_tables.items()
                            if (seq in self.manager.swapped) == host for block in table.blocks)
            assert pool.ref_counts == [named[block] for block in range(pool.num_blocks)]
            assert pool.num_free == pool.num_blocks - len(named)

    def _check_trace(self) -> None:
        for event in self.trace.events[self.applied:]:
            self.state.apply(event)
        self.applied = len(self.trace.events)
        tables = self.manager.block_tables
        assert self.state.tables == {seq: table.blocks for seq, table in tables.items()}
        assert all(self.state.num_tokens[seq] == table.num_tokens for seq, table in tables.items())
        assert self.state.ref_counts == self.manager.device.ref_counts
        assert self.state.host_ref_counts == self.manager.host.ref_counts

    def _check_contents(self) -> None:
        size = self.manager.block_size
        held = [(seq.token_ids, seq.num_computed, "host" if group in self.swapped else "device",
                 self.manager.get_block_table(seq).blocks)
                for group in self.running + self.swapped for seq in group.seqs]
        held += [(tokens, len(tokens), "device", self.manager.block_tables[seq].blocks)
                 for seq, tokens in self.manager.prefixes.items()]
        if self.manager.caching:
            for group in self.running + self.waiting:
                tokens = group.seqs[0].token_ids
                found = self.manager.device.find_all(block_keys(tokens, size))
                held.append((tokens, len(found) * size, "device", found))
        for tokens, computed, pool, blocks in held:
            for position in range(computed):
                slot = pool, *translate(blocks, position, size)
                assert self.content.get(slot) == tuple(tokens[:position + 1]), f"{slot} at position {position}"

    def teardown(self) -> None:
        """In the end everything but the prefixes is free, and the whole trace tells the same."""
        if hasattr(self, "manager"):
            self.run()
            for group in self.running + self.swapped:
                self.release(group)
            pinned = {block for seq in self.manager.prefixes for block in self.manager.block_tables[seq].blocks}
            assert self.free_blocks(self.manager) == self.manager.device.num_free
            assert self.manager.device.num_free == self.manager.device.num_blocks - len(pinned)
            assert self.manager.host.num_free == self.manager.host.num_blocks
            state = replay(self.trace.events)
            assert set(state.tables) == set(self.manager.prefixes)
            assert state.ref_counts == self.manager.device.ref_counts and not any(state.host_ref_counts)


def test_random_operations_against_the_model() -> None:
    Memory.steps, Memory.seen = 0, Counter()
    run_state_machine_as_test(Memory, settings=settings(max_examples=300, stateful_step_count=50, derandomize=True,
                                                        deadline=None, database=None,
                                                        report_multiple_bugs=False))
    print(Memory.steps, dict(Memory.seen))
    assert Memory.steps > 5000
    for what in ("admitted", "several recomputed", "found", "copied", "forked", "swapped one", "swapped several",
                 "swapped in", "aborted on host", "ended", "prefix", "refused"):
        assert Memory.seen[what] >= 50, f"{what} happened {Memory.seen[what]} times: {Memory.seen}"
