"""The contiguous baselines, the accounting of every slot, Figure 2, and the pictures of it."""

from __future__ import annotations

import random
import re
from statistics import mean
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged import SamplingParams
from minipaged.errors import DoubleFree, InvalidConfig, OutOfBlocks, RequestTooLarge
from minipaged.simulate.contiguous import BuddyAllocator, ContiguousSpaceManager
from minipaged.memory.manager import BlockSpaceManager
from minipaged.scheduler import Scheduler
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.simulate.clock import mean_usage, play
from minipaged.simulate.systems import ContinuousBatching
from minipaged.simulate.usage import Piece, Usage, layout, usage
from minipaged.simulate.workloads import Request, arrivals
from minipaged.views.canvas import WIDTH
from minipaged.views.fragmentation import LEFT, RIGHT, ROW, USES, bars_view, fragmentation_view, slots_view

BLOCKS = 984  # of 16 slots, as in the paper's run
# Figure 2 as measured in its drawing: token states, reservation, internal, external fragmentation & others, in percent.
FIGURE_2 = {"max": (20.410, 13.349, 57.298, 8.943), "pow2": (26.849, 17.884, 13.646, 41.622),
            "oracle": (38.199, 25.242, 0.0, 36.559), "paged": (96.264, 1.044, 1.044, 1.647)}


def request(number: int, prompt: int, output: int, n: int = 1) -> SequenceGroup:
    seq = Sequence(number, [0] * prompt, prompt)
    return SequenceGroup(number, [seq], SamplingParams(n=n), None, prompt + output, 0)


def scheduler(kind: str, num_blocks: int = BLOCKS, block_size: int = 16, max_len: int = 2048) -> Scheduler:
    manager = (BlockSpaceManager(block_size, num_blocks, 0) if kind == "paged"
               else ContiguousSpaceManager(kind, block_size, num_blocks, max_len))
    return Scheduler(manager, max_num_seqs=256, max_num_batched_tokens=2560)


# ---- the buddy allocator ---------------------------------------------------------------------------------------------

def free_lists(pool: BuddyAllocator) -> dict[int, list[int]]:
    return {size: list(starts) for size, starts in pool.free_lists.items()}


@settings(max_examples=200, deadline=None)
@given(num_blocks=st.integers(1, 70), log_chunk=st.integers(0, 5), draws=st.lists(st.integers(0, 10**6), max_size=60))
def test_buddy_allocator_against_brute_force(num_blocks: int, log_chunk: int, draws: list[int]) -> None:
    """The naive pool is a list of who owns each block; a chunk is found in it if, at a multiple of its size, there is
    a run of free blocks so long. That is exact for buddies that are always joined."""
    pool = BuddyAllocator(num_blocks, 1 << log_chunk)
    at_first, owner, held = free_lists(pool), [None] * num_blocks, []
    for draw in draws:
        if held and draw % 3 == 0:
            start, size = held.pop(draw // 3 % len(held))
            pool.free(start)
            assert owner[start:start + size] == [start] * size
            owner[start:start + size] = [None] * size
            continue
        asked = 1 + draw // 3 % (2 << log_chunk)
        size = 1
        while size < asked:
            size *= 2
        fits = size <= 1 << log_chunk and any(owner[at:at + size] == [None] * size for at in range(0, num_blocks, size))
        before = free_lists(pool)
        pool.can_allocate(1, asked, 2, 1)
        assert pool.can_allocate(asked) == fits and free_lists(pool) == before, "asking changes nothing"
        if not fits:
            with pytest.raises(OutOfBlocks, match="ask can_allocate"):
                pool.allocate(asked)
            assert free_lists(pool) == before
            continue
        start = pool.allocate(asked)
        assert start % size == 0 and owner[start:start + size] == [None] * size and pool.allocated[start] == size
        owner[start:start + size] = [start] * size
        held.append((start, size))
        assert pool.num_free == owner.count(None)
    for start, _ in held:
        pool.free(start)
    assert {size: sorted(starts) for size, starts in pool.free_lists.items()} == at_first and not pool.allocated


def test_the_pool_is_cut_as_in_the_artifact() -> None:
    pool = BuddyAllocator(BLOCKS, 128)
    assert {size: starts for size, starts in pool.free_lists.items() if starts} == {
        128: [0, 128, 256, 384, 512, 640, 768], 64: [896], 16: [960], 8: [976]}
    assert pool.allocate(100) == 768, "last in, first out"


def test_external_fragmentation() -> None:
    pool = BuddyAllocator(16, 16)
    chunks = [pool.allocate(4) for _ in range(4)]
    pool.free(chunks[1])
    pool.free(chunks[2])
    assert pool.num_free == 8 and not pool.can_allocate(8), "two free neighbours that are no buddies"
    assert pool.can_allocate(4, 4) and not pool.can_allocate(4, 4, 1)
    pool.free(chunks[0])
    assert pool.can_allocate(8)


def test_the_allocator_refuses() -> None:
    for num_blocks, max_chunk in ((16, 3), (0, 4), (16, 0)):
        with pytest.raises(InvalidConfig):
            BuddyAllocator(num_blocks, max_chunk)
    pool = BuddyAllocator(16, 8)
    start = pool.allocate(3)
    for wrong in (start + 1, 12):
        with pytest.raises(DoubleFree):
            pool.free(wrong)
    pool.free(start)
    with pytest.raises(DoubleFree):
        pool.free(start)
    with pytest.raises(OutOfBlocks):
        pool.allocate(9)


# ---- reservations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("estimate", "prompt", "output", "slots", "blocks"), [
    ("max", 7, 4, 2048, 128), ("max", 2000, 48, 2048, 128),
    ("pow2", 10, 25, 42, 4),  # §6.1: "if the true output length is 25, it reserves 32"
    ("pow2", 10, 32, 42, 4), ("pow2", 10, 33, 74, 8), ("pow2", 1500, 300, 2012, 128), ("pow2", 1600, 300, 2048, 128),
    ("oracle", 10, 25, 35, 4), ("oracle", 100, 28, 128, 8), ("oracle", 100, 29, 129, 16), ("oracle", 3, 1, 4, 1),
])
def test_what_is_reserved(estimate: str, prompt: int, output: int, slots: int, blocks: int) -> None:
    manager = ContiguousSpaceManager(estimate, 16, BLOCKS)
    assert manager.claim(prompt, output) == slots
    manager.allocate(request(0, prompt, output))
    assert list(manager.device.allocated.values()) == [blocks]
    piece, = manager.pieces
    assert piece[2:] == (prompt, output, slots - prompt - output, blocks * 16 - slots)


def test_orca_max_runs_seven_requests_at_once() -> None:
    orca = scheduler("max")
    for number in range(20):
        orca.add(request(number, 40, 400))
    orca.schedule()
    assert len(orca.running) == BLOCKS // 128 == 7 and [group.request_id for group in orca.running] == [*range(7)]
    assert usage(orca.manager) == Usage(7 * 40, 7 * 400, 7 * (2048 - 440), 0, 88 * 16)


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    orca = scheduler("oracle", num_blocks=16, max_len=256)
    for number, output in enumerate((100, 200, 5)):
        orca.add(request(number, 10, output))
    orca.schedule()
    assert [group.request_id for group in orca.running] == [0], "the third would fit, but the second comes first"
    orca.remove(orca.running[0])
    orca.schedule()
    assert [group.request_id for group in orca.running] == [1]


def test_a_request_of_several_sequences_gets_a_chunk_for_each_or_none() -> None:
    manager = ContiguousSpaceManager("oracle", 1, 16, 16)
    first, second = request(0, 2, 5, n=2), request(1, 2, 5)
    manager.allocate(first)
    assert manager.device.allocated == {0: 8, 8: 8}
    assert [piece[2:] for piece in manager.pieces] == [(2, 5, 0, 1), (0, 7, 0, 1)], "the second waits for its copy"
    child = Sequence(10, [0, 0], 2)
    manager.fork(first.seqs[0], child)
    assert [piece[2:] for piece in manager.pieces] == [(2, 5, 0, 1)] * 2, "nothing is shared"
    assert not manager.can_allocate(second)
    manager.free(child)
    manager.free(child)  # as `BlockSpaceManager.free`: without a chunk, nothing
    assert manager.can_allocate(second)
    with pytest.raises(OutOfBlocks):
        manager.allocate(request(1, 2, 5, n=2))
    assert [piece.owner for piece in manager.pieces] == [0] and manager.device.num_free == 8
    manager.allocate(third := request(3, 1, 2, n=2))
    manager.free(third.seqs[0])
    assert manager.device.num_free == 8, "chunks that were never forked into go back too"


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(RequestTooLarge, match="max_len"):
        ContiguousSpaceManager("max", 16, BLOCKS).can_allocate(request(0, 2000, 49))
    with pytest.raises(RequestTooLarge, match="larger pool"):
        ContiguousSpaceManager("max", 16, 100).can_allocate(request(0, 10, 10))
    with pytest.raises(InvalidConfig):
        ContiguousSpaceManager("guess", 16, 100)


# ---- the accounting --------------------------------------------------------------------------------------------------

def check_books(scheduler: Scheduler, num_slots: int) -> None:
    """Every slot is counted once, and the token states are the tokens of the running requests."""
    pieces, used, at = layout(scheduler.manager), usage(scheduler.manager), 0
    for piece in pieces:
        assert piece.start >= at and min(piece) >= 0, "pieces overlap"
        at = piece.start + sum(piece[2:])
    assert at <= num_slots and sum(used) == num_slots and sum(used.percent()) == pytest.approx(100)
    assert sum(used.figure_2()) == pytest.approx(100)
    assert used.tokens == sum(len(group.seqs[0].token_ids) for group in scheduler.running)
    if isinstance(scheduler.manager, ContiguousSpaceManager):
        assert {piece.owner for piece in pieces} == {group.request_id for group in scheduler.running}
        assert used.reserved == sum(group.max_len - len(group.seqs[0].token_ids) for group in scheduler.running)
        assert used.internal == 0 or scheduler.manager.estimate != "oracle"


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(FIGURE_2)), block_size=st.sampled_from([1, 4, 5, 16]),
       lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=25))
def test_every_slot_is_counted_at_every_step(kind: str, block_size: int, lengths: list[tuple[int, int]]) -> None:
    num_blocks = -(-300 // block_size)
    simulated = scheduler(kind, num_blocks, block_size, max_len=120)
    schedule, steps = simulated.schedule, 0

    def checked() -> object:
        nonlocal steps
        out, steps = schedule(), steps + 1
        check_books(simulated, num_blocks * block_size)
        return out

    simulated.schedule = checked
    requests = [Request(number / 7, *pair) for number, pair in enumerate(lengths)]
    moments = play(ContinuousBatching(simulated), requests, until=1e9, every=1, seconds=lambda work: 0.5)
    assert len(moments) == steps and not simulated.has_unfinished
    assert usage(simulated.manager).free == num_blocks * block_size, "everything was given back"


def test_a_shared_block_counts_once() -> None:
    manager = BlockSpaceManager(4, 10, 10)
    group = request(0, 6, 10)
    manager.allocate(group)
    child = Sequence(1, [0] * 6, 6)
    group.seqs.append(child)
    manager.fork(group.seqs[0], child)
    assert usage(manager) == Usage(6, 0, 0, 2, 32)
    manager.append_slot(child)  # copies the last block
    assert usage(manager) == Usage(4 + 2 + 3, 0, 0, 2 + 1, 28)
    assert [piece[2:] for piece in layout(manager)] == [(4, 0, 0, 0), (2, 0, 0, 2), (3, 0, 0, 1)]
    manager.swap_out(group)
    assert usage(manager) == Usage(0, 0, 0, 0, 40), "what is swapped out is not in this pool"


@pytest.mark.parametrize(("parent", "child", "owner"), [(6, 5, 0), (5, 6, 1), (6, 6, 0)])
def test_a_shared_block_is_as_full_as_its_fullest_reader_has_it(parent: int, child: int, owner: int) -> None:
    manager = BlockSpaceManager(4, 10, 10)
    manager.allocate(group := request(0, 6, 10))
    manager.fork(group.seqs[0], Sequence(1, [0] * 6, 6))
    manager.block_tables[0].num_tokens, manager.block_tables[1].num_tokens = parent, child
    assert usage(manager) == Usage(6, 0, 0, 2, 32) and layout(manager)[-1][2:] == (2, 0, 0, 2)
    assert {piece.owner for piece in layout(manager) if piece.tokens == 2} == {owner}


def test_the_plotting_rule_of_figure_2() -> None:
    assert Usage(50, 10, 20, 5, 15).figure_2() == (50, 10, 20, 20)
    assert Usage(50, 10, 0, 5, 35).figure_2() == (50, 10, 0, 40)
    assert Usage(90, 0, 0, 4, 6).figure_2() == (90, 3, 3, 4), "half of the free slots each, though nothing is reserved"


def test_the_clock() -> None:
    seen = []
    moments = play(ContinuousBatching(scheduler("max")), [Request(1.0, 5, 3), Request(1.25, 7, 2)], until=9, every=1,
                   seconds=lambda work: seen.append(work[:3]) or 0.5)
    assert [moment.time for moment in moments] == [1.0, 1.5, 2.0]
    assert seen == [(1, 5, 0), (2, 1 + 7, 6), (2, 2, 7 + 8)], "sequences, tokens, and tokens that are read"
    assert [moment.running for moment in moments] == [1, 2, 2]
    assert mean_usage(moments, since=1.5).tokens == mean((6 + 7, 7 + 8))


# ---- Figure 2 --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FIGURE_2)
def test_figure_2(kind: str) -> None:
    moments = play(ContinuousBatching(scheduler(kind)), arrivals("ShareGPT", 4.0, 900.0), until=900)
    used = mean_usage(moments, since=300)
    print(kind, [round(share, 2) for share in used.figure_2()])
    for ours, theirs in zip(used.figure_2(), FIGURE_2[kind]):
        assert abs(ours - theirs) < 1.5
    if kind == "max":
        assert {moment.running for moment in moments if moment.time > 300} == {7}
        assert 100 * 88 / 984 == pytest.approx(used.figure_2()[3]), "the leftover blocks alone"
    if kind == "paged":
        assert used.reserved == used.internal == 0 and used.percent()[3] < 2


# ---- the pictures ----------------------------------------------------------------------------------------------------

def shapes(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag))


def drawn_areas(svg: str) -> dict[str, float]:
    """Of each use, the slots that its colour covers; the scale is that of rows of 256 slots."""
    found = {}
    for use, (fill, *_) in USES.items():
        boxes = [re.findall(r"h([\d.]+)v" + str(ROW) + "h", path.get("d")) for path in shapes(svg, "path")
                 if path.get("fill") == fill]
        found[use] = sum(float(width) for widths in boxes for width in widths) * 256 / (RIGHT - LEFT)
    return found


def some_pool(kind: str, seed: int) -> list[Piece]:
    draw = random.Random(seed)
    simulated = scheduler(kind, num_blocks=150, block_size=8, max_len=256)
    play(ContinuousBatching(simulated), [Request(0.0, draw.randint(1, 90), draw.randint(1, 90)) for _ in range(80)],
         until=2)
    return layout(simulated.manager)


@pytest.mark.parametrize("kind", FIGURE_2)
def test_the_picture_is_to_scale_and_says_what_the_layout_says(kind: str) -> None:
    for seed in range(5):
        pieces = some_pool(kind, seed)
        view = fragmentation_view({kind: pieces}, 1200, 8, row_slots=256)
        used = dict(zip(USES, [*(sum(piece[i] for piece in pieces) for i in range(2, 6)), 0]))
        used["free"] = 1200 - sum(used.values())
        assert drawn_areas(view.svg) == pytest.approx(used, abs=3), "a tenth of a unit per piece is rounding"
        row = view.text.splitlines()[3].split()
        assert row == [kind, str(len({piece.owner for piece in pieces})), *(f"{n / 1200:.1%}" for n in used.values())]
        letters = "".join(line.strip() for line in view.text.split("token states\n")[-1].splitlines())
        assert len(letters) == 1200 // 4
        slots = ["free"] * 1200
        for piece in pieces:
            at = piece.start
            for use, number in zip(USES, piece[2:]):
                slots[at:at + number] = [use] * number
                at += number
        for cell, letter in enumerate(letters):
            here = slots[4 * cell:4 * cell + 4]
            assert letter in {USES[use][2] for use in here if here.count(use) == max(map(here.count, here))}


def test_four_pools_in_one_picture() -> None:
    pools = {f"<{kind}>": some_pool(kind, 0) for kind in FIGURE_2}
    view = fragmentation_view(pools, 1200, 8, row_slots=256)
    again = fragmentation_view(pools, 1200, 8, row_slots=256)
    assert (view.text, view.svg) == (again.text, again.svg) and len(view.svg) < 20_000
    root = ElementTree.fromstring(view.svg)
    assert root.get("viewBox").split()[2] == str(WIDTH) and root.get("width") == "100%" and " id=" not in view.svg
    assert root.get("font-size") == "14" and not [t for t in shapes(view.svg, "text") if t.get("font-size")]
    texts = [t.text for t in shapes(view.svg, "text")]
    assert {"<max>", "<paged>"} <= set(texts), "names are data"
    common = set.intersection(*({piece.owner for piece in pieces} for pieces in pools.values()))
    assert (f"thick border: request {min(common)}" in texts) if common else not any("thick" in t for t in texts)
    styles = [(fill, dash) for fill, dash, *_ in USES.values()]
    assert len({dash for _, dash in styles[:4]}) == 4, "each use in a piece has its own line"


def test_a_piece_goes_on_in_the_next_row_and_the_first_common_request_is_marked() -> None:
    view = fragmentation_view({"one": [(5, 0, 40, 30, 20, 10), (3, 100, 8, 0, 0, 0), (1, 108, 4, 0, 0, 0)],
                               "two": [(3, 64, 8, 0, 0, 0), (5, 72, 8, 0, 0, 0)]}, 128, 8, row_slots=64)
    assert "thick border: request 3" in [t.text for t in shapes(view.svg, "text")]
    thick = [path.get("d") for path in shapes(view.svg, "path") if path.get("stroke-width") == "2"]
    assert [d.count("z") for d in thick] == [1, 1]
    for path in shapes(view.svg, "path"):
        for x, width in re.findall(r"M([\d.]+) [\d.]+h([\d.]+)", path.get("d")):
            assert LEFT <= float(x) and float(x) + float(width) <= RIGHT + 0.1, "out of the picture"


def test_pieces_that_cannot_be_are_refused() -> None:
    for pieces in ([(0, 0, 5, 0, 0, 3), (1, 7, 1, 0, 0, 0)], [(0, 60, 5, 0, 0, 0)], [(0, 0, -1, 2, 0, 0)]):
        with pytest.raises(InvalidConfig, match="overlaps"):
            fragmentation_view({"pool": pieces}, 64, 8)


def test_an_empty_pool_and_one_smaller_than_a_row() -> None:
    view = fragmentation_view({"pool": []}, 40, 8, row_slots=64)
    assert "pool: 0 requests, 0.0% of the slots hold token states\n  " + "." * 40 in view.text
    shapes(view.svg, "path")
    assert "." * 16 + "\n  ...." in fragmentation_view({"pool": []}, 20, 8, row_slots=16).text


def test_bars_add_up() -> None:
    view = bars_view("shares", {"tokens": "used", "free": "not"}, [("a <b>", (25.0, 75.0)), ("c", (50.0, 0.0))])
    widths = [float(box.get("width")) for box in shapes(view.svg, "rect") if box.get("height") == "28"]
    assert widths == pytest.approx([(RIGHT - 190) * share for share in (0.25, 0.75, 0.5)], abs=0.1)
    assert view.text.splitlines()[3].split() == ["a", "<b>", "25.0%", "75.0%"]


def test_a_strip_of_slots_shows_its_texts_and_wraps() -> None:
    parts = [("tokens", "prompt", ["<s>", *"abcdefgh" * 6], 49), ("internal", "never", ["<resv>"], 507)]
    view = slots_view("strip", parts)
    texts = [t.text for t in shapes(view.svg, "text")]
    assert texts.count("a") == 6 and "<s>" in texts and "…" in texts
    assert "507 slots: never (internal fragmentation: never used)" in texts
    boxes = [(float(b.get("x")), float(b.get("width"))) for b in shapes(view.svg, "rect") if b.get("height") == "30"]
    assert len(boxes) == 49 + 2 and all(x + width <= RIGHT + 0.1 for x, width in boxes)
    assert view.text.splitlines()[-1].split()[:2] == ["2", "never"] and "507" in view.text
