"""The simulator: its five systems by hand, its clock, its cost, its workloads, and what it refuses."""

from __future__ import annotations

import time
from statistics import fmean

import numpy as np
import pytest

from minipaged.errors import InvalidConfig, InvalidParams, RequestTooLarge
from minipaged.reproduce.paper import curves
from minipaged.reproduce.serving import PANELS
from minipaged.simulate import workloads
from minipaged.simulate.clock import Iteration, outcome, play, run, serve
from minipaged.simulate.cost import FASTER_TRANSFORMER, SERVERS, SWAP_IN, SWAP_OUT, Cost, Work
from minipaged.simulate.systems import BATCHES, SYSTEMS, make_system
from minipaged.simulate.workloads import Request, arrivals, histogram, lengths


def iterations(name: str, requests: list[Request], blocks: int = 984, **options: object) -> list[Iteration]:
    return list(run(make_system(name, blocks, **options), requests, lambda work: 1.0))


# ---- the clock -------------------------------------------------------------------------------------------------------

def test_latency_is_the_mean_of_latency_by_output_length() -> None:
    """Two requests, an iteration a second, by hand."""
    requests = [Request(0.0, 5, 2), Request(0.5, 5, 4)]
    assert outcome(requests, iterations("vLLM", requests)).latency == pytest.approx((2 / 2 + 4.5 / 4) / 2)
    # In batches the second waits for the first, alone in its batch, to end at 2.
    assert outcome(requests, iterations("FasterTransformer", requests, batch=2)).latency == pytest.approx(
        (2 / 2 + 5.5 / 4) / 2)


def test_running_is_counted_from_a_third_of_the_arrivals_to_the_last() -> None:
    requests = [Request(0.0, 5, 4), Request(2.0, 5, 40), Request(3.0, 5, 1)]
    assert [i.work.seqs for i in iterations("vLLM", requests)[:4]] == [1, 1, 2, 3]
    assert outcome(requests, iterations("vLLM", requests)).running == fmean((1, 2)), "the iterations at 1 and 2 s"


def test_the_clock_stops_and_waits() -> None:
    requests = [Request(0.25, 5, 2), Request(9.0, 5, 2)]
    assert [i.begin for i in iterations("vLLM", requests)] == [0.25, 1.25, 9.0, 10.0]
    assert [i.begin for i in run(make_system("vLLM", 9), requests, lambda work: 1.0, until=1.5)] == [0.25, 1.25]


def test_play_looks_at_the_memory_every_so_many_iterations() -> None:
    moments = play(make_system("vLLM", 9), [Request(0.0, 5, 10)], until=99, every=4, seconds=lambda work: 1.0)
    assert [(moment.time, moment.usage.tokens) for moment in moments] == [(0.0, 5), (4.0, 9), (8.0, 13)]


def test_the_block_size_reaches_the_clock() -> None:
    requests = [Request(0.0, 400, 20)] * 4
    assert serve("vLLM", requests, block_size=1).latency > 1.05 * serve("vLLM", requests).latency


# ---- FasterTransformer -----------------------------------------------------------------------------------------------

def test_a_batch_is_padded_and_ends_with_its_longest_output() -> None:
    found = iterations("FasterTransformer", [Request(0.0, 10, 3), Request(0.0, 20, 9)], batch=2)
    assert found[0].work == Work(2, 2 * 20, 0) and found[1].work == Work(2, 2, 2 * 21) and len(found) == 9
    assert [i.completed for i in found] == [[]] * 8 + [[0, 1]], "all answers leave together"


def test_a_batch_is_cut_at_its_size_and_at_the_models_length() -> None:
    assert [i.completed for i in iterations("FasterTransformer", [Request(0.0, 9, 1)] * 3, batch=2)] == [[0, 1], [2]]
    too_long = [Request(0.0, 2000, 3), Request(0.0, 20, 41)]
    assert iterations("FasterTransformer", too_long, batch=2)[0].work.seqs == 1
    assert iterations("FasterTransformer", [Request(0.0, 2000, 3), Request(0.0, 20, 40)], batch=2)[0].work.seqs == 2


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_prompt_of_one_token_is_a_prompt(system: str) -> None:
    """It reads no keys and values; the token after it reads two."""
    assert [i.work for i in iterations(system, [Request(0.0, 1, 2)])] == [Work(1, 1, 0), Work(1, 1, 2)]


# ---- how much runs at a time -----------------------------------------------------------------------------------------

def test_the_batches_of_fastertransformer_are_the_artifacts() -> None:
    sizes = {server: (BATCHES[server, "ShareGPT"], BATCHES[server, "Alpaca"]) for server in list(SERVERS)[:3]}
    assert sizes == {"OPT-13B": (5, 14), "OPT-66B": (2, 8), "OPT-175B": (24, 80)} and len(BATCHES) == 6


@pytest.mark.parametrize(("system", "most"), [("vLLM", 2048), *((name, 256) for name in SYSTEMS[1:4])])
def test_so_many_sequences_run_at_a_time(system: str, most: int) -> None:
    first = iterations(system, [Request(0.0, 1, 1)] * (most + 1), blocks=128 * (most + 1))[0]
    assert first.work == Work(most, most, 0)


@pytest.mark.parametrize("system", SYSTEMS[1:])
def test_so_many_tokens_run_at_a_time(system: str) -> None:
    for prompts, seqs in (((2000, 560), 2), ((2000, 561), 1)):
        first = iterations(system, [Request(0.0, prompt, 1) for prompt in prompts])[0]
        assert first.work == Work(seqs, sum(prompts[:seqs]), 0)


# ---- samples, beams, prefixes ----------------------------------------------------------------------------------------

def test_samples_share_the_prompt_and_copy_its_last_block() -> None:
    found = iterations("vLLM", [Request(0.0, 6, 3)], 10, block_size=4, width=3)
    assert [i.work for i in found] == [Work(1, 6, 0), Work(3, 3, 21, copied=2 * 4), Work(3, 3, 24)]
    assert found[-1].completed == [0] and len(found) == 3


def test_orca_copies_the_prompt_for_each_sample() -> None:
    found = iterations("Orca (Oracle)", [Request(0.0, 6, 3)], 16, block_size=4, width=3)
    assert [i.work for i in found] == [Work(1, 6, 0), Work(3, 3, 21, copied=2 * 6), Work(3, 3, 24)]


def test_beams_fork_and_die_as_they_are_told() -> None:
    told = []

    def beams(request: int, step: int) -> tuple[int, ...]:
        told.append((request, step))
        return (0, 0) if step != 1 else (1, 1)

    system = make_system("vLLM", 12, block_size=2, width=2, beams=beams)
    pool, used = system.manager.device, []
    for iteration in run(system, [Request(0.0, 4, 4)], lambda work: 1.0):
        used.append(pool.num_blocks - pool.num_free)
    assert told == [(0, 0), (0, 1), (0, 2)], "the last token needs no decision"
    # Prompt: 2 blocks. Then one block each; the first beam dies, its child copies the half full block on write; the
    # two children of the first fill a block each.
    assert used == [2, 4, 4, 5] and pool.num_free == 12
    orca = iterations("Orca (Oracle)", [Request(0.0, 4, 4)], 16, block_size=2, width=2, beams=beams)
    assert [i.work.copied for i in orca] == [0, 4, 5, 6], "a fork copies all that its parent holds"


def test_orca_copies_a_beam_for_each_that_dies() -> None:
    for parents, copies in (((0, 0, 0), 2), ((1, 1, 2), 1), ((2, 0, 1), 0)):
        found = iterations("Orca (Oracle)", [Request(0.0, 4, 4)], 32, block_size=2, width=3,
                           beams=lambda request, step: parents if step else (0, 0, 0))
        assert [i.work.copied for i in found] == [0, 2 * 4, copies * 5, copies * 6], parents


def test_a_shared_prefix_is_computed_once_and_its_blocks_are_pinned() -> None:
    requests = [Request(0.0, 20, 2), Request(0.0, 17, 2)]
    system = make_system("vLLM", 10, block_size=4, prefix=16)
    assert system.manager.num_pinned == 4
    first, second = run(system, requests, lambda work: 1.0)
    assert first.work == Work(2, 4 + 1, 17) and second.work == Work(2, 2, 21 + 18)
    assert system.manager.device.num_free == 6
    assert iterations("Orca (Oracle)", requests, 32, block_size=4, prefix=16)[0].work == Work(2, 37, 0)


@pytest.mark.parametrize(("mode", "again"), [("recompute", 12), ("swap", 0)])
def test_preemption_is_work(mode: str, again: int) -> None:
    """Two requests that do not fit together: at 12 tokens each the later gives way, and comes back."""
    requests = [Request(0.0, 8, 9), Request(0.0, 8, 9)]
    found = iterations("vLLM", requests, 6, block_size=4, preemption=mode)
    assert [i.completed for i in found if i.completed] == [[0], [1]]
    assert sum(i.work.tokens for i in found) == sum(i.work.seqs for i in found) + 2 * 7 + again
    moved = (sum(i.work.swapped_out for i in found), sum(i.work.swapped_in for i in found))
    assert moved == ((3, 3) if mode == "swap" else (0, 0))


# ---- the cost --------------------------------------------------------------------------------------------------------

def test_the_cost_grows_with_each_part_of_the_work() -> None:
    cost = Cost(SERVERS["OPT-13B"])
    base = cost.seconds(Work(8, 8, 8 * 400))
    for more in (Work(9, 9, 8 * 400), Work(8, 8, 9 * 400), Work(8, 2000, 8 * 400), Work(8, 8, 3200, copied=64),
                 Work(8, 8, 3200, swapped_in=4), Work(8, 8, 3200, swapped_out=4)):
        assert cost.seconds(more) > base, more
    assert cost.seconds(Work(8, 100, 3200)) == base, "below the roofline's bend the weights' bytes take longer"
    assert cost.seconds(Work(0, 0, 0)) == 0


def test_bytes_are_swapped_while_the_model_computes() -> None:
    cost, block = Cost(SERVERS["OPT-13B"]), 16 * 819_200
    computing = cost.seconds(Work(8, 8, 3200))
    for which, transfer in (("swapped_in", SWAP_IN), ("swapped_out", SWAP_OUT)):
        few, many = (cost.seconds(Work(8, 8, 3200, **{which: blocks})) for blocks in (4, 400))
        assert few == pytest.approx(computing + transfer.per_copy * 2 * 40 * 4), "only to begin the copies takes time"
        assert many == pytest.approx(transfer.per_copy * 2 * 40 * 400 + 400 * block / transfer.bandwidth)
        alone = cost.seconds(Work(0, 0, 0, **{which: 4}))
        assert alone == pytest.approx(transfer.per_copy * 2 * 40 * 4 + 4 * block / transfer.bandwidth)
    four = Cost(SERVERS["OPT-66B"])
    share = 4000 * 16 * four.server.model.kv_bytes / 4 / SWAP_IN.bandwidth
    assert four.seconds(Work(1, 1, 9, swapped_in=4000)) == pytest.approx(SWAP_IN.begin(4000, 64) + share), "its share"


def test_the_constants_fit_the_points_that_they_name() -> None:
    """Each constant of `cost.py` says to what it is fitted; here it is, but for the loads below."""
    cost, kv_bytes = Cost(SERVERS["OPT-13B"]), SERVERS["OPT-13B"].model.kv_bytes
    recompute = fmean(ms for _, ms in curves("fig19a")["Recompute"]) / 1000
    assert cost.seconds(Work(1, 256, 0)) == pytest.approx(recompute, rel=0.01)
    for name, transfer in (("Swap in", SWAP_IN), ("Swap out", SWAP_OUT)):
        for size in (1, 256):
            seconds = transfer.begin(256 // size, 40) + transfer.move(256 * kv_bytes)
            assert 1000 * seconds == pytest.approx(dict(curves("fig19a")[name])[size], rel=0.01)


@pytest.mark.parametrize(("panel", "system", "points", "seconds"), [
    ("fig12a", "vLLM", 2, 900), ("fig12b", "vLLM", 2, 1800),
    ("fig12c", "vLLM", 1, 900), ("fig12d", "vLLM", 1, 60), ("fig12e", "vLLM", 1, 60), ("fig12f", "vLLM", 1, 60),
    ("fig12a", "Orca (Max)", 1, 3600), ("fig12b", "Orca (Pow2)", 1, 3600), ("fig12c", "Orca (Max)", 1, 900),
    ("fig12d", "Orca (Pow2)", 1, 60), ("fig12e", "Orca (Max)", 1, 600), ("fig12f", "Orca (Max)", 1, 60)])
def test_the_constants_fit_the_lightest_loads(panel: str, system: str, points: int, seconds: float) -> None:
    """Within 10 %: a few constants go through all of them."""
    server, workload = PANELS[panel]
    for rate, latency in curves(panel)[system][:points]:
        ours = serve(system, arrivals(workload, rate, seconds), server).latency
        assert ours == pytest.approx(latency, rel=0.1), (rate, ours / latency)


@pytest.mark.parametrize("panel", ["fig12a", "fig12b", "fig12c"])
def test_fastertransformer_is_as_late_as_in_the_paper(panel: str) -> None:
    """An hour of requests: the first point is fitted to; the next two, where batches form and wait, are found."""
    server, workload = PANELS[panel]
    for (rate, latency), within in zip(curves(panel)["FasterTransformer"], (0.01, 0.04, 0.1)):
        requests = arrivals(workload, rate, 3600)
        ours = serve("FasterTransformer", requests, server, batch=BATCHES[server, workload]).latency
        assert ours == pytest.approx(latency, rel=within), (rate, ours / latency)


def test_more_and_faster_gpus() -> None:
    seconds = {name: Cost(server).seconds(Work(1, 1, 100)) for name, server in SERVERS.items()}
    assert seconds["OPT-13B"] == seconds["LLaMA-13B"] < seconds["OPT-66B"] < seconds["OPT-175B"]
    faster = Cost(SERVERS["OPT-175B"], FASTER_TRANSFORMER).seconds(Work(1, 1, 100))
    assert faster < seconds["OPT-175B"]


# ---- the workloads ---------------------------------------------------------------------------------------------------

def test_the_lengths_are_the_papers() -> None:
    pairs = lengths("ShareGPT")
    assert len(pairs) == 79_725 and pairs.mean(axis=0) == pytest.approx((161.18, 338.00), abs=0.005)
    alpaca = lengths("Alpaca")
    assert alpaca.mean(axis=0) == pytest.approx((19.31, 58.45), rel=0.01)
    for side, column in zip(("input", "output"), alpaca.T):
        bins = histogram("Alpaca", side)
        found, _ = np.histogram(column, len(bins.density), (bins.first, bins.last), density=True)
        assert np.abs(found - bins.density).sum() < 0.1 * sum(bins.density)
    with pytest.raises(InvalidConfig, match="'ShareGPT' or 'Alpaca'"):
        lengths("Shakespeare")


def test_the_histograms_of_sharegpt_are_those_of_its_pairs() -> None:
    for side, column in zip(("input", "output"), lengths("ShareGPT").T):
        bins = histogram("ShareGPT", side)
        found, _ = np.histogram(column, len(bins.density), (bins.first, bins.last), density=True)
        assert found == pytest.approx(bins.density, rel=0.02, abs=1e-5)


def test_arrivals_are_poisson_at_the_rate_and_the_same_every_time() -> None:
    found = arrivals("Alpaca", 20.0, 500.0)
    assert found == arrivals("Alpaca", 20.0, 500.0) != arrivals("Alpaca", 20.0, 500.0, seed=1)
    gaps = np.diff([request.time for request in found])
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert (gaps**2).mean() == pytest.approx(2 * gaps.mean()**2, rel=0.1), "exponential gaps"


def test_requests_are_the_first_of_the_data_set_in_another_order() -> None:
    found = [(prompt, output) for _, prompt, output in arrivals("ShareGPT", 1.0, 100.0)]
    first = [tuple(pair) for pair in lengths("ShareGPT")[:len(found)].tolist()]
    assert sorted(found) == sorted(first) and found != first
    few = workloads.requests(np.array([[1, 2], [3, 4]]), 1.0, 100.0)
    assert {(r.prompt, r.output) for r in few} == {(1, 2), (3, 4)}, "used in turn"


# ---- what cannot be served -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rate", "seconds"), [(0, 60), (1, 0), (-1, 60), (0.0001, 1), (float("nan"), 60),
                                              (1, float("nan")), (1, float("inf")), (1e9, 3600), (0.5, 1e-9)])
def test_a_rate_or_time_without_requests_is_named(rate: float, seconds: float) -> None:
    with pytest.raises(InvalidConfig, match="give"):
        arrivals("ShareGPT", rate, seconds)


@pytest.mark.parametrize(("lengths", "error"), [
    ([], InvalidConfig), ([(0, 5)], InvalidConfig), ([(5, 5), (5, 0)], InvalidConfig), ([(2000, 49)], RequestTooLarge)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_length_that_no_model_takes_is_named(system: str, lengths: list[tuple[int, int]],
                                               error: type[Exception]) -> None:
    with pytest.raises(error, match="give"):
        serve(system, [Request(0.0, *pair) for pair in lengths])


@pytest.mark.parametrize(("system", "options", "error"), [
    ("TGI", {}, InvalidConfig), ("vLLM", {"server": "GPT-2"}, InvalidConfig),
    ("vLLM", {"block_size": 0}, InvalidConfig), ("FasterTransformer", {"batch": 0}, InvalidConfig),
    ("vLLM", {"blocks": 10}, RequestTooLarge),
    ("Orca (Max)", {"blocks": 100}, RequestTooLarge), ("Orca (Oracle)", {"blocks": 10}, RequestTooLarge),
    ("vLLM", {"blocks": 70, "width": 6}, RequestTooLarge), ("vLLM", {"max_num_seqs": 0}, InvalidConfig),
    ("Orca (Max)", {"max_num_seqs": 1, "width": 2}, InvalidConfig), ("vLLM", {"blocks": 0}, RequestTooLarge),
    ("Orca (Pow2)", {"blocks": 0}, InvalidConfig), ("vLLM", {"width": 0}, InvalidParams),
])
def test_what_cannot_be_served_is_named(system: str, options: dict[str, int], error: type[Exception]) -> None:
    with pytest.raises(error, match="give|lower|let"):
        serve(system, [Request(0.0, 100, 180)], **options)


# ---- all five --------------------------------------------------------------------------------------------------------

def test_the_order_of_the_systems_is_the_papers() -> None:
    requests = arrivals("ShareGPT", 1.0, 450)
    at_one = {system: serve(system, requests, batch=5).latency for system in SYSTEMS}
    assert sorted(at_one, key=at_one.get, reverse=True) == list(SYSTEMS), at_one
    assert at_one["vLLM"] < 0.05, "vLLM is far from its limit"


def test_an_hour_at_two_requests_per_second_takes_less_than_20_seconds() -> None:
    """Five minutes of it, a twelfth; processor time, so that a busy machine does not count."""
    requests = arrivals("ShareGPT", 2.0, 300)
    start = time.process_time()
    serve("vLLM", requests)
    took = time.process_time() - start
    print(f"{len(requests)} requests, {sum(r.output for r in requests):,} tokens: {took:.2f} s")
    assert took < 20 / 12
