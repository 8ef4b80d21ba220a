"""Sharing and pressure on the live engine: samples, beams, prefixes, swapping, recomputation; never another token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import workloads

from minipaged import LLM, BeamSearchParams, Chaos, SamplingParams, Trace
from minipaged.errors import InvalidConfig, InvalidParams, RequestTooLarge
from minipaged.memory.blocks import BlockAllocator
from minipaged.sequence import SequenceGroup
from minipaged.replay import replay, states

FOUR_SCORE = "Four score and seven years ago our"
PROMPT = list(range(50, 60))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def make() -> Iterator[Callable[..., LLM]]:
    """Makes an LLM with block size 4 and the audit on; in the end only pinned blocks may be in use."""
    made: list[LLM] = []

    def new(**options: object) -> LLM:
        options = {"model": "tiny-opt", "block_size": 4, "num_gpu_blocks_override": 64, "audit": True,
                   "trace": Trace(), **options}
        made.append(LLM(**options))
        return made[-1]

    yield new
    for llm in made:
        manager = llm.block_manager
        assert not llm.engine.scheduler.has_unfinished
        assert set(manager.block_tables) == set(manager.prefixes) and not manager.swapped
        assert used(llm) == len({block for table in manager.block_tables.values() for block in table.blocks})
        assert manager.host.num_free == manager.host.num_blocks


def used(llm: LLM) -> int:
    """Device blocks in use."""
    return llm.block_manager.device.num_blocks - llm.block_manager.device.num_free


def finish(llm: LLM) -> None:
    """Serve all that is queued; nothing may wait for ever."""
    for _ in range(1000):
        if not llm.engine.scheduler.has_unfinished:
            return
        llm.engine.step()
    scheduler = llm.engine.scheduler
    raise AssertionError(f"no progress: {len(scheduler.waiting)} requests wait, {len(scheduler.running)} run, "
                         f"{len(scheduler.swapped)} are swapped out")


def tokens_of(group: SequenceGroup) -> list[list[int]]:
    return [seq.output_token_ids for seq in group.seqs]


def computed_tokens(llm: LLM) -> list[int]:
    """Grows by the number of tokens that went through the model, once per iteration."""
    counts: list[int] = []
    run = llm.engine.runner.run
    llm.engine.runner.run = lambda seqs, tables: counts.append(sum(seq.num_new for seq in seqs)) or run(seqs, tables)
    return counts


# ---- random workloads --------------------------------------------------------------------------------------------

HAPPENED: Counter[str] = Counter()


@pytest.mark.parametrize("chunk", range(4))
def test_random_workloads_give_the_tokens_of_transformers(chunk: int, checkpoint, oracle, monkeypatch) -> None:
    run = workloads.run
    for seed in range(25 * chunk, 25 * chunk + 25):
        workload = workloads.make_workload(seed, lambda name: oracle(name).model.config.vocab_size)
        trace = Trace()
        monkeypatch.setattr(workloads, "run", partial(run, trace=trace))
        workloads.check(workload, checkpoint(workload.name), oracle(workload.name))
        HAPPENED.update(_what_happened(trace))
    HAPPENED["chunks"] += 1
    if HAPPENED["chunks"] == 4:
        print(dict(HAPPENED))
        for what in ("copy", "swap_out", "swap_in", "recompute", "prefix hit", "beam", "host pool full"):
            assert HAPPENED[what] >= 20, f"too little was tried: {dict(HAPPENED)}"


def _what_happened(trace: Trace) -> Counter[str]:
    found = Counter(event.kind for event in trace.events)
    arrived = {event.seq for event in trace.events if event.kind == "add"}
    for event in trace.events:
        found["prefix hit"] += event.kind == "share" and event.seq in arrived
        found["recompute"] += event.kind == "preempt" and event.how == "recompute"
        found["host pool full"] += event.kind == "preempt" and "host pool is full" in event.why
        found["beam"] += event.kind == "finish" and event.reason == "dropped"
    return found


# ---- samples -----------------------------------------------------------------------------------------------------

def test_figure_8_on_the_engine(make) -> None:
    """Two samples of the paper's 7-token prompt: blocks 7 and 1 shared, then block 1 copied to block 3."""
    llm = make(num_gpu_blocks_override=9)
    llm.block_manager.device.hand_out_next([7, 1, 3])
    prompt = llm.get_tokenizer()(FOUR_SCORE, add_special_tokens=False)["input_ids"]
    group = llm.engine.add_request(prompt, SamplingParams(n=2, seed=0, max_tokens=3, ignore_eos=True))
    tables, counts = llm.block_manager.block_tables, llm.block_manager.device.ref_counts
    llm.engine.step()
    a1, a2 = (tables[seq.seq_id] for seq in group.seqs)
    assert a1.blocks == a2.blocks == [7, 1] and (counts[7], counts[1]) == (2, 2)
    llm.engine.step()
    assert (a1.blocks, a2.blocks) == ([7, 3], [7, 1]) and (counts[7], counts[1], counts[3]) == (2, 1, 1)
    copies = [(event.src, event.dst) for event in llm.trace.events if event.kind == "copy"]
    assert copies == [(1, 3)]
    finish(llm)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_samples_share_the_prompt_and_equal_single_runs(make, n: int) -> None:
    llm = make()
    counts = computed_tokens(llm)
    params = dict(temperature=0.8, max_tokens=8, ignore_eos=True)
    group = llm.engine.add_request(PROMPT, SamplingParams(n=n, seed=11, **params))
    llm.engine.step()
    assert used(llm) == 3 and counts == [10], "one prefill, one set of blocks"
    llm.engine.step()
    assert used(llm) == 2 + n, "the full blocks once, and one for each sample"
    finish(llm)
    alone = [llm.generate(PROMPT, SamplingParams(seed=11 + i, **params))[0].outputs[0].token_ids for i in range(n)]
    assert tokens_of(group) == alone
    assert len(set(map(tuple, alone))) > 1


def test_best_of_returns_the_best_in_order(make) -> None:
    llm = make()
    draw = partial(SamplingParams, seed=3, max_tokens=8)
    every = llm.generate(PROMPT, draw(n=5))[0].outputs
    best = llm.generate(PROMPT, draw(n=2, best_of=5))[0].outputs
    wanted = sorted(every, key=lambda output: -output.cumulative_logprob)[:2]
    assert [output.token_ids for output in best] == [output.token_ids for output in wanted]
    assert [output.index for output in best] == [0, 1] and best[0].cumulative_logprob > best[1].cumulative_logprob


# ---- beams -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, -1.0, 2.0])
def test_beam_search_of_a_text(make, oracle, early_stopping: bool | str, length_penalty: float) -> None:
    llm, truth = make(), oracle("tiny-opt")
    comma, = llm.get_tokenizer().encode(",", add_special_tokens=False)
    llm.engine.output_processor.eos_token_ids = {comma}  # so that candidates finish at different lengths
    options = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    ids = llm.get_tokenizer()(FOUR_SCORE)["input_ids"]
    output, = llm.beam_search(FOUR_SCORE, BeamSearchParams(4, 12, **options))
    wanted = truth.beams(ids, 4, 12, eos_token_id=comma, **options)
    assert [beam.tokens[len(ids):] for beam in output.sequences] == [tokens for tokens, _ in wanted]
    scores = [beam.score for beam in output.sequences]
    assert scores == sorted(scores, reverse=True) and scores == pytest.approx([s for _, s in wanted], abs=1e-4)
    for beam in output.sequences:
        generated = len(beam.tokens) - len(ids)
        assert beam.text == llm.get_tokenizer().decode(beam.tokens, skip_special_tokens=True)
        assert beam.text.startswith(FOUR_SCORE)
        assert beam.score == pytest.approx(beam.cum_logprob / generated ** length_penalty)
        assert beam.finish_reason == ("stop" if beam.tokens[-1] == comma else "length")
    assert {beam.finish_reason for beam in output.sequences} & {"stop"}


def test_beams_drop_their_blocks_at_once(make) -> None:
    """At most the prompt's full blocks and the own ones of each beam are in use, at any time."""
    llm = make()
    llm.engine.add_request(PROMPT, BeamSearchParams(4, 16, ignore_eos=True))
    while llm.engine.scheduler.has_unfinished:
        llm.engine.step()
        longest = max((table.num_tokens for table in llm.block_manager.block_tables.values()), default=0)
        assert len(llm.block_manager.block_tables) <= 4
        assert used(llm) <= 2 + 4 * (-(-longest // 4) - 2) or longest == 0
    assert sum(event.kind == "free" for event in llm.trace.events) > 8


# ---- prefixes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length, computed", [(12, 1), (11, 3), (10, 2), (9, 1), (3, 3)])
def test_the_second_run_computes_only_what_is_not_in_full_blocks(make, oracle, length: int, computed: int) -> None:
    llm = make(enable_prefix_caching=True)
    counts, prompt = computed_tokens(llm), list(range(70, 70 + length))
    for first in (length, computed):
        counts.clear()
        output, = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1))
        assert counts == [first]
        oracle("tiny-opt").assert_greedy(prompt, output.outputs[0].token_ids, 1)


def test_what_was_generated_is_found_by_the_next_turn(make, oracle) -> None:
    llm = make(enable_prefix_caching=True)
    answer = llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    counts, turn = computed_tokens(llm), PROMPT + answer + [99, 98]
    output, = llm.generate(turn, GREEDY)
    assert counts[0] == 4, "20 tokens, of which 17 had keys and values, in 4 full blocks"
    oracle("tiny-opt").assert_greedy(turn, output.outputs[0].token_ids, 8)


def test_a_registered_prefix_is_pinned_and_its_last_block_copied(make, oracle) -> None:
    llm, truth = make(num_gpu_blocks_override=20), oracle("tiny-opt")
    llm.register_prefix(PROMPT)
    pinned = list(llm.block_manager.block_tables[next(iter(llm.block_manager.prefixes))].blocks)
    assert used(llm) == 3
    counts = computed_tokens(llm)
    tasks = [[], [7, 8, 9], [9], list(range(200, 212))]
    for task in tasks:
        counts.clear()
        output, = llm.generate(PROMPT + task, GREEDY)
        assert counts[0] == max(1, len(task)), "the prompt phase runs on the task's tokens only"
        truth.assert_greedy(PROMPT + task, output.outputs[0].token_ids, 8)
    copies = [event for event in llm.trace.events if event.kind == "copy"]
    assert len(copies) == len(tasks) and {event.src for event in copies} == {pinned[2]}
    params = SamplingParams(n=3, seed=5, max_tokens=8)
    outputs = llm.generate([PROMPT + [7], PROMPT + [8], PROMPT[:9] + [7]], params)
    for prompt, output in zip([PROMPT + [7], PROMPT + [8], PROMPT[:9] + [7]], outputs):
        assert [out.token_ids for out in output.outputs] == [truth.sampled(prompt, 8, 5 + i) for i in range(3)]
    assert used(llm) == 3 and list(llm.block_manager.block_tables.values())[0].blocks == pinned


def test_a_swapped_request_that_shared_a_pinned_prefix_comes_back(make, oracle) -> None:
    """Its blocks were the prefix's before; in the host pool they are its own, and may be more than are free now."""
    llm, prefix = make(num_gpu_blocks_override=12, preemption_mode="swap"), list(range(10, 34))
    llm.register_prefix(prefix)
    prompts = [prefix + [50 + i, 6, 7] for i in range(2)]
    groups = [llm.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=14)) for prompt in prompts]
    finish(llm)
    assert any(event.kind == "swap_out" for event in llm.trace.events)
    for prompt, group in zip(prompts, groups):
        oracle("tiny-opt").assert_greedy(prompt, tokens_of(group)[0], 14)


def test_pinned_blocks_count_against_the_pool(make) -> None:
    """What could not run beside the prefix is refused, and so is a prefix beside which a request could not run."""
    llm = make(num_gpu_blocks_override=8)
    llm.register_prefix(list(range(20)))
    with pytest.raises(RequestTooLarge, match="need 5 blocks of 4"):
        llm.engine.add_request(PROMPT, GREEDY)
    llm.engine.add_request([*range(20), 99], GREEDY)  # 4 own tokens or more go into 2 blocks
    with pytest.raises(RequestTooLarge):
        llm.register_prefix([5] * 8)
    finish(llm)
    assert used(llm) == 5


# ---- preemption --------------------------------------------------------------------------------------------------

def test_first_come_first_served_with_swapped_groups(make) -> None:
    """The latest gives way, the earliest comes back first, and nobody is admitted while one is swapped out."""
    llm = make(num_gpu_blocks_override=17, preemption_mode="swap")
    params = [SamplingParams(n=2, seed=i, max_tokens=20, ignore_eos=True) for i in range(4)]
    llm.generate([PROMPT[i:i + 6] for i in range(4)], params)
    seen, status = Counter(), {}
    for event, state in states(llm.trace.events):
        if event.kind == "preempt":
            assert event.how == "swap" and event.request == max(r for r, where in status.items() if where == "running")
        elif event.kind == "admit":
            assert "swapped" not in status.values(), "admitted while another was swapped out"
            assert event.request == min(r for r, where in status.items() if where == "waiting")
        elif event.kind == "swap_in":
            assert event.request == min(r for r, where in status.items() if where == "swapped")
        seen[event.kind], status = seen[event.kind] + 1, dict(state.status)
    assert seen["swap_out"] >= 3 and seen["swap_in"] == seen["swap_out"], seen
    firsts = [event.request for event in llm.trace.events if event.kind == "finish"]
    assert firsts == sorted(firsts), "a later request overtook an earlier one"


def test_an_earlier_request_that_is_recomputed_comes_back_before_later_ones_that_are_swapped(make) -> None:
    """Single sequences are recomputed and several are swapped; still the earliest is served first."""
    llm = make(num_gpu_blocks_override=14)
    widths = [1, 1, 2, 2]
    llm.generate([PROMPT] * 4, [SamplingParams(n=n, seed=1, max_tokens=20, ignore_eos=True) for n in widths])
    assert {event.how for event in llm.trace.events if event.kind == "preempt"} == {"recompute", "swap"}
    finished = [event.request for event in llm.trace.events if event.kind == "finish"]
    assert finished == sorted(finished), "a later request overtook an earlier one"


def test_a_block_swapped_in_and_copied_in_one_iteration(make, oracle) -> None:
    """Samples swapped out right after their prompt still share its last block; it comes back, then is copied."""
    llm = make(chaos=Chaos(at={2: [0]}, how="swap"))
    output, = llm.generate(PROMPT, SamplingParams(n=3, seed=5, max_tokens=8))
    moved = {event.kind: event.step for event in llm.trace.events if event.kind in ("swap_in", "copy")}
    assert moved == {"swap_in": 3, "copy": 3}
    assert [out.token_ids for out in output.outputs] == [oracle("tiny-opt").sampled(PROMPT, 8, 5 + i) for i in range(3)]


def test_a_full_host_pool_falls_back_to_recomputation(make, oracle) -> None:
    probe = make()
    block_bytes = probe.engine.runner.bytes_per_token * 4
    llm = make(num_gpu_blocks_override=17, swap_space=3 * block_bytes / (1 << 30), preemption_mode="swap")
    assert llm.block_manager.host.num_blocks == 3
    outputs = llm.generate([PROMPT] * 4, SamplingParams(n=2, seed=7, max_tokens=20))
    preempted = [event for event in llm.trace.events if event.kind == "preempt"]
    assert any(event.how == "recompute" and "the host pool is full" in event.why for event in preempted)
    for output in outputs:
        assert [out.token_ids for out in output.outputs] == [oracle("tiny-opt").sampled(PROMPT, 20, 7 + i)
                                                             for i in range(2)]


def test_the_default_rule_recomputes_one_and_swaps_several(make) -> None:
    llm = make(num_gpu_blocks_override=16)
    llm.generate([PROMPT] * 4, [SamplingParams(n=1 + i % 2, seed=i, max_tokens=20, ignore_eos=True) for i in range(4)])
    how = {event.request: event.how for event in llm.trace.events if event.kind == "preempt"}
    assert set(how.values()) == {"recompute", "swap"}
    assert all(way == ("swap" if request % 2 else "recompute") for request, way in how.items())


@pytest.mark.parametrize("where", ["waiting", "running", "swapped", "recomputed"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True),
                                    BeamSearchParams(3, 9)], ids=["greedy", "samples", "beams"])
def test_abort_frees_at_once_and_the_trace_knows(make, where: str, params: SamplingParams | BeamSearchParams) -> None:
    """Another request runs on beside it, with its own tokens."""
    llm = make(chaos=Chaos(at={3: [1]}, how="swap" if where == "swapped" else "recompute"))
    other, group = llm.engine.add_request(PROMPT, GREEDY), llm.engine.add_request(PROMPT[1:], params)
    for _ in range({"waiting": 0, "running": 2, "swapped": 3, "recomputed": 3}[where]):
        llm.engine.step()
    queue = getattr(llm.engine.scheduler, where if where != "recomputed" else "waiting")
    assert group in queue
    llm.engine.abort(group)
    manager = llm.block_manager
    assert set(manager.block_tables) <= {other.seqs[0].seq_id} and not manager.swapped and group not in queue
    state = replay(llm.trace.events)
    assert state.ref_counts == manager.device.ref_counts and state.host_ref_counts == manager.host.ref_counts
    finish(llm)
    assert tokens_of(other)[0] == llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids


# ---- failures ----------------------------------------------------------------------------------------------------

def _mixed(llm: LLM) -> list[SequenceGroup]:
    """Samples, beams and greedy requests that do not all fit at once."""
    params = [SamplingParams(n=3, seed=5, max_tokens=9), GREEDY, BeamSearchParams(3, 9),
              SamplingParams(n=2, seed=1, max_tokens=12, ignore_eos=True), GREEDY]
    return [llm.engine.add_request(PROMPT[i:], p) for i, p in enumerate(params)]


@pytest.mark.parametrize("caching", [False, True])
def test_any_allocation_may_fail(make, checkpoint, monkeypatch, caching: bool) -> None:
    """The k-th allocation fails, for every k, in the middle of whatever needed it; nobody loses a token or a block."""
    llm = make(model=checkpoint("llama"), num_gpu_blocks_override=18, preemption_mode="swap",
               enable_prefix_caching=caching, trace=None)
    calls, failing = [], None
    allocate = BlockAllocator.allocate

    def may_fail(pool: BlockAllocator) -> int:
        calls.append(pool.pool)
        if len(calls) == failing:
            raise MemoryError("planted")
        return allocate(pool)

    def serve() -> list[list[list[int]]]:
        calls.clear()
        groups = _mixed(llm)
        while llm.engine.scheduler.has_unfinished:
            try:
                llm.engine.step()
            except MemoryError:
                llm.engine._audit()
        assert used(llm) == 0 and llm.block_manager.host.num_free == llm.block_manager.host.num_blocks
        return [tokens_of(group) for group in groups]

    wanted = serve()
    monkeypatch.setattr(BlockAllocator, "allocate", may_fail)
    serve()
    places = list(calls)
    assert {"host", "device"} == set(places)
    print(Counter(places))
    for failing in range(1, len(places) + 1):
        assert serve() == wanted, f"allocation {failing} ({places[failing - 1]}) failed"


@pytest.mark.parametrize("fails", ["run", "allocate"])
def test_the_trace_of_an_iteration_that_failed_replays(make, monkeypatch, fails: str) -> None:
    """It failed right after a request was swapped out, or with the first block of a new one."""
    llm = make(chaos=Chaos(at={3: [0]}, how="swap") if fails == "run" else None)
    groups = [llm.engine.add_request(PROMPT, SamplingParams(n=3, seed=1, max_tokens=9)) for _ in range(2)]
    for _ in range(2 if fails == "run" else 0):
        llm.engine.step()
    target = llm.engine.runner if fails == "run" else llm.block_manager.device
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(target, fails, lambda *args: (_ for _ in ()).throw(MemoryError("planted")))
        llm.engine.step()
    state, manager = replay(llm.trace.events), llm.block_manager
    assert state.tables == {seq: table.blocks for seq, table in manager.block_tables.items()}
    assert state.ref_counts == manager.device.ref_counts and state.host_ref_counts == manager.host.ref_counts
    finish(llm)
    assert tokens_of(groups[0]) == tokens_of(groups[1])


# ---- bad input ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, says", [
    (dict(n=0), "n is 0"), (dict(n=-2), "n is -2"), (dict(n=3, best_of=2), "best_of is 2 and n is 3"),
    (dict(n=2, temperature=0), "n or best_of is 2 at temperature 0"),
    (dict(best_of=3, temperature=0), "n or best_of is 3 at temperature 0"),
], ids=str)
def test_bad_numbers_of_samples(options: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidParams, match=says):
        SamplingParams(**options)


def test_bad_beam_widths(make) -> None:
    for width in (0, -1):
        with pytest.raises(InvalidParams, match=f"beam_width is {width}"):
            BeamSearchParams(width, 5)
    with pytest.raises(InvalidParams, match="early_stopping is 'later'"):
        BeamSearchParams(2, 5, early_stopping="later")
    with pytest.raises(InvalidParams, match="beam_width is 4097 and the vocabulary has 4096"):
        make().beam_search(FOUR_SCORE, BeamSearchParams(4097, 5))


@pytest.mark.parametrize("params", [SamplingParams(n=6, max_tokens=40), BeamSearchParams(6, 40)], ids=["n", "beams"])
def test_a_group_that_can_never_fit_is_refused_with_the_numbers(make, params) -> None:
    """10 + 40 - 1 slots are 13 blocks, of which 2 are shared: 2 + 6 * 11 = 68."""
    with pytest.raises(RequestTooLarge, match="6 sequences need 68 blocks of 4, and the pool has 67"):
        make(num_gpu_blocks_override=67).engine.add_request(PROMPT, params)
    llm = make(num_gpu_blocks_override=68)
    llm.engine.add_request(PROMPT, params)
    finish(llm)


def test_more_sequences_than_an_iteration_takes_are_refused(make) -> None:
    with pytest.raises(RequestTooLarge, match="runs 3 sequences and max_num_seqs is 2"):
        make(max_num_seqs=2).generate(PROMPT, SamplingParams(n=3))


@pytest.mark.parametrize("options", [dict(rate=1), dict(rate=-0.1), dict(how="gently")], ids=str)
def test_bad_chaos(options: dict[str, object]) -> None:
    with pytest.raises(InvalidConfig, match="chaos with rate"):
        Chaos(**options)
