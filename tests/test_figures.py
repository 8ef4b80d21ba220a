"""Lengths, sharing, prefixes, rounds and block sizes: Figures 11 and 14 to 19 beside the paper's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from importlib.resources import files

import numpy as np
import pytest

from minipaged import LLM, BeamSearchParams
from minipaged.errors import InvalidConfig
from minipaged.reproduce import costs, lengths, paper, prompts, record_beams, serving, sharing
from minipaged.simulate import cost
from minipaged.simulate.beams import RecordedBeams
from minipaged.simulate.clock import serve
from minipaged.simulate.systems import SYSTEMS, make_system
from minipaged.simulate.workloads import Request, arrivals
from minipaged.trace import Trace


def test_figure_11_has_the_papers_means_and_histograms() -> None:
    sheet = lengths.figure_11({})
    assert [round(n.paper, 2) for n in sheet.numbers] == [161.31, 337.99, 19.31, 58.45]
    assert all(abs(n.ours / n.paper - 1) < 0.005 for n in sheet.numbers), sheet.numbers
    for panel in sheet.panels:
        for side in lengths.SIDES:
            ours, theirs = panel.ours[side], panel.paper[side]
            assert [x for x, _ in ours] == [x for x, _ in theirs] and len(ours) == 128
            width = ours[1][0] - ours[0][0]
            apart = sum(abs(a - b) for (_, a), (_, b) in zip(ours, theirs)) * width / 2
            assert sum(y for _, y in ours) * width == pytest.approx(1.0), "a density"
            assert apart < 0.02, f"{panel.title}, {side}: {apart:.1%} of the lengths lie in other bins"


# ---- beams -----------------------------------------------------------------------------------------------------------

def test_a_record_replays_to_the_engines_blocks() -> None:
    """A beam search of the engine, recorded and given to the simulator, has the same block tables at every iteration."""
    width, prompt, output, size = 3, [2, 5, 6, 7, 8], 24, 4
    with LLM("tiny-opt", block_size=size, num_gpu_blocks_override=64, trace=(trace := Trace())) as llm:
        stream = llm.stream([prompt], BeamSearchParams(beam_width=width, max_tokens=output, ignore_eos=True))
        pool, engine = llm.block_manager.device, []
        for _ in stream:
            tables = [tuple(table.blocks) for table in llm.block_manager.block_tables.values()]
            engine.append((sorted(map(len, tables)), pool.num_blocks - pool.num_free))
    digits = record_beams.parents(trace.events, 0, width)
    assert len(digits) == width * (output - 1) and digits[:width] == "0" * width
    system = make_system("vLLM", 64, size, width=width, beams=lambda request, step: [
        int(digit) for digit in digits[step * width:(step + 1) * width]])
    system.add(0, Request(0.0, len(prompt), output))
    pool, simulated = system.manager.device, []
    while system.has_unfinished:
        system.schedule()
        system.commit()
        tables = system.manager.block_tables.values()
        simulated.append((sorted(len(table.blocks) for table in tables), pool.num_blocks - pool.num_free))
    assert simulated == engine


def test_the_records_are_searches_of_each_width() -> None:
    for width in sharing.WIDTHS:
        beams = RecordedBeams(width)
        assert list(beams(0, 0)) == [0] * width, "the prompt is one sequence"
        assert all(len(beams(request, step)) == width and max(beams(request, step)) < width
                   for request in (0, 1, 40) for step in (1, 7, 2000))
        assert beams(5, 9) == beams(5 + 32, 9) and 1 < beams.mean_survivors < width
    beams, length = RecordedBeams(4), record_beams.TOKENS - 1
    half = length // 2
    assert [beams(3, step) for step in range(length, length + 200)] == [
        beams(3, step) for step in range(half, half + 200)], "past its end, its second half again"
    with pytest.raises(InvalidConfig, match="give one of 2, 4, 6"):
        RecordedBeams(3)


def test_request_i_does_as_search_i() -> None:
    path = files("minipaged") / "data" / "beams.json.gz"
    searches = json.loads(gzip.decompress(path.read_bytes()))["4"]
    beams, steps = RecordedBeams(4), 40
    assert len(set(searches)) == len(searches) == 32
    for request in (0, 1, 31, 32, 33, 70):
        digits = "".join(str(beam) for step in range(steps) for beam in beams(request, step))
        assert digits == searches[request % 32][:4 * steps], "one after the other, and then the first again"


# ---- Figures 14 and 15 -----------------------------------------------------------------------------------------------

def test_blocks_without_sharing_are_counted_by_hand() -> None:
    system = make_system("vLLM", 64, 4, width=3)
    system.add(0, Request(0.0, 9, 5))
    system.schedule()
    assert sharing.blocks_without_sharing(system) == 3 * 3, "a prompt in three blocks, once per sample to be"
    system.commit()
    system.schedule()
    pool = system.manager.device
    assert sharing.blocks_without_sharing(system) == 9 and pool.num_blocks - pool.num_free == 2 + 3


def test_figure_15_parallel_sampling_is_near_the_paper() -> None:
    """A shorter run than the figure's, before the pool is full of long requests."""
    ours = sharing.saving("Alpaca", "parallel sampling", 2, since=10, until=60)
    assert abs(ours - paper.printed("fig15")["parallel sampling"]["Alpaca"]["2"]) < 2, ours


def test_beams_save_several_times_what_samples_do() -> None:
    beams, samples = (sharing.saving("Alpaca", method, 4, since=5, until=15) for method in reversed(sharing.METHODS))
    assert 3 * samples < beams < 75, (beams, samples)


def test_figure_15_has_ranges_where_the_paper_has_no_more() -> None:
    found = {("ShareGPT", "parallel sampling", 2, seed): 16.0 + seed for seed in range(3)}
    (number,) = sharing.figure_15(found).numbers
    assert number.ours == 17.0 and number.paper == (16.2, 30.5) and number.ratio == "inside"


# ---- Figures 16 and 17 -----------------------------------------------------------------------------------------------

def test_translations_have_the_means_that_are_said() -> None:
    pairs = prompts.translations(20_000)
    assert pairs.mean(axis=0) == pytest.approx([prompts.SENTENCE, prompts.TRANSLATION], rel=0.02) and pairs.min() >= 1


def at_rates(monkeypatch: pytest.MonkeyPatch, *rates: float) -> None:
    """Let curves have just these points."""
    monkeypatch.setattr(prompts, "until_late", lambda panel, system, latency_at: [(r, latency_at(r)) for r in rates])


def test_a_shared_prefix_serves_more(monkeypatch: pytest.MonkeyPatch) -> None:
    at_rates(monkeypatch, 20.0)
    (vllm,), (oracle,) = (prompts.translation_curve("fig16b", system, 0.5) for system in ("vLLM", "Orca (Oracle)"))
    assert vllm[1] < 0.08 and oracle[1] > 5 * vllm[1], (vllm, oracle)


def test_rounds_remember_what_was_said() -> None:
    found = prompts.rounds(new=0.0, count=200)
    assert found[-1, 0] == found[:, 0].max() == 1024 and found[:, 1].max() <= 1016
    pairs = lengths.lengths("ShareGPT")[:2].tolist()
    assert found[1, 0] == min(1024, sum(pairs[0]) + pairs[1][0])
    alone = prompts.rounds(new=1.0, count=200)
    assert np.array_equal(alone[:, 0], np.minimum(lengths.lengths("ShareGPT")[:200, 0], 1024)), "no history"


def test_the_orcas_behave_alike_in_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """§6.5: prompts of 1024 tokens and up to as many outputs: buddy allocation rounds all three to the same chunk."""
    at_rates(monkeypatch, 0.4, 0.8)
    found = {system: dict(prompts.chat_curve(system, 6)) for system in SYSTEMS[1:]}
    few, many = ([found[system][rate] for system in SYSTEMS[1:4]] for rate in (0.4, 0.8))
    assert max(few) < 1.3 * min(few) and max(many) < 1.5 * min(many), found
    assert 2 * found["vLLM"][0.8] < min(many), found


# ---- Figures 18 and 19 -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("workload", "panel"), [("ShareGPT", "fig12a"), ("Alpaca", "fig12d")])
def test_the_rates_behind_figure_18b_are_near_the_papers_own(workload: str, panel: str) -> None:
    """Its Figure 12 has vLLM's latencies in blocks of 16 as well."""
    latency = dict(paper.curves("fig18b")[workload])[16]
    at = paper.crossing(serving.paper_curve(panel, "vLLM"), latency)
    assert costs.RATES[workload] == pytest.approx(at, rel=0.07)


def test_small_blocks_cost_the_kernel_more_and_large_ones_nothing() -> None:
    server = cost.SERVERS["OPT-13B"]
    reading = {size: cost.Cost(server, block_size=size).seconds(cost.Work(10, 10, 5000)) for size in costs.SIZES}
    assert reading[16] == reading[32] == reading[256]
    once = reading[16] - cost.Cost(server).seconds(cost.Work(10, 10, 0))
    more = [(reading[size] - reading[16]) / once for size in (8, 4, 2, 1)]
    assert more == pytest.approx([cost.PER_HALVING * halvings for halvings in (1, 2, 3, 4)])


def test_good_sizes() -> None:
    assert costs.good_sizes([(1, 9.0), (2, 2.4), (4, 1.0), (8, 2.5), (16, 2.6)]) == (2, 8)
    assert costs.good_sizes(paper.curves("fig18b")["ShareGPT"]) == (16, 128)


@pytest.mark.parametrize(("figure", "panel"), [(costs.figure_18, 1), (costs.figure_19, 1)])
def test_curves_by_block_size_show_what_was_run(figure: Callable, panel: int) -> None:
    found = {("ShareGPT", "recompute", 8): 0.5, ("ShareGPT", "recompute", 32): 0.1, ("ShareGPT", "swap", 32): 0.2,
             ("Alpaca", "recompute", 32): 0.3}
    sheet = figure(found)
    ours = sheet.panels[panel].ours
    assert ours.get("ShareGPT", ours.get("Recompute")) == [(8, 0.5), (32, 0.1)]
    assert ours.get("Alpaca", ours.get("Swap")) in ([(32, 0.3)], [(32, 0.2)])
    fitted = [n.what for n in sheet.numbers if n.ours is not None and n.basis.startswith("fitted: ")]
    assert ["size 8," in fitted[0], "size 32," in fitted[1]] == [True, True], "what was fitted is said beside it"


def test_under_load_requests_give_way_as_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(costs.RATES, "ShareGPT", 4.0)  # so that some must
    swapped, again = (costs.under_load("ShareGPT", 16, how, 1.0) for how in ("swap", "recompute"))
    requests = arrivals("ShareGPT", 4.0, 60.0)
    assert swapped == serve("vLLM", requests, preemption="swap").latency
    assert again == serve("vLLM", requests, preemption="recompute").latency != swapped


def test_under_load_a_large_block_is_late() -> None:
    small, large = (costs.under_load("Alpaca", size, "recompute", 0.5) for size in (16, 256))
    assert large > 2 * small, (small, large)
