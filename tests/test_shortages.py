"""Who gives way is anybody's choice: the engine keeps its promise, and the game counts right what the choice costs."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from functools import partial

import pytest
import workloads
from ipywidgets.widgets.widget import _instances

from minipaged import LLM, SamplingParams, Trace
from minipaged.errors import InvalidConfig
from minipaged.simulate.panel import Panel
from minipaged.simulate.shortages import (WAYS, Arrival, Game, Machine, every_choice, first_come_first_served, play,
                                          score_table)

COUNTING = Machine(step=1, sequence=0, prompt_token=0, block_out=0, block_in=0)  # a clock that counts iterations
# Notebook 07's two requests: in iteration 7 A, with 12 tokens stored, needs a block, and B, with 9, has the last.
SEVEN = Game([Arrival(0, 7, 10), Arrival(0, 4, 10)], num_blocks=6, block_size=4, machine=COUNTING)
FIVE = Game([Arrival(0, 210, 80), Arrival(200, 80, 90), Arrival(400, 240, 240), Arrival(400, 250, 70),
             Arrival(800, 30, 170)], num_blocks=10)


class AnyPolicy:
    """Chooses at random; counts what it was asked."""

    def __init__(self, seed: int) -> None:
        self.random, self.chosen = random.Random(seed), []

    def __call__(self, running: list) -> tuple:
        assert running and [group.request_id for group in running] == sorted(group.request_id for group in running)
        self.chosen.append((self.random.choice(running), self.random.choice(["swap", "recompute", None])))
        return self.chosen[-1]


# ---- the engine ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("half", range(2))
def test_whoever_gives_way_the_tokens_are_those_of_transformers(half: int, checkpoint, oracle, monkeypatch) -> None:
    run, chosen = workloads.run, 0
    for seed in range(1000 + half, 1060, 2):
        workload = workloads.make_workload(seed, lambda name: oracle(name).model.config.vocab_size)
        if len(workload.requests) < 4:  # they would seldom be short of blocks
            continue
        policy, trace = AnyPolicy(seed), Trace()
        settings = {**workload.settings, "preemption_policy": policy, "block_size": 1 + seed % 4, "chaos": None}
        workload = replace(workload, spare_blocks=min(workload.spare_blocks, 3),
                           arrivals=[0] * len(workload.requests), settings=settings)
        monkeypatch.setattr(workloads, "run", partial(run, trace=trace))
        workloads.check(workload, checkpoint(workload.name), oracle(workload.name))
        victims = [event.request for event in trace.events if event.kind == "preempt" and "no free" in event.why]
        assert victims == [group.request_id for group, _ in policy.chosen], "asked, and obeyed"
        chosen += len(victims)
    assert chosen >= 15, "or nothing is tested"


def test_the_policy_decides_who_and_how() -> None:
    prompts, params = [[5] * 7, [6] * 4], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for index, way in ((0, "swap"), (1, "recompute")):
        trace = Trace()
        with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=6, trace=trace,
                 preemption_policy=lambda running: (running[index], way)) as llm:
            llm.generate(prompts, params)
        first = next(event for event in trace.events if event.kind == "preempt")
        assert (first.step, first.request, first.how) == (7, index, way)


@pytest.mark.parametrize("answer", [lambda running: (None, "swap"), lambda running: (running[0], "wait"),
                                    lambda running: ("A", None)])
def test_a_policy_that_chooses_nobody_is_named_and_the_engine_goes_on(answer) -> None:
    prompts, params = [[5] * 7, [6] * 4], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=6, audit=True, preemption_policy=answer) as llm:
        with pytest.raises(InvalidConfig, match="give one of the running requests"):
            llm.generate(prompts, params)
        assert llm.block_manager.device.num_free == 6 and not llm.engine.scheduler.has_unfinished
        llm.generate(prompts[0], params)


# ---- the game --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("choice", "latencies", "run_again", "blocks_moved"), [
    (("B", "recompute"), {"A": 1.0, "B": 1.4}, 9, 0), (("B", "swap"), {"A": 1.0, "B": 1.4}, 0, 6),
    (("A", "recompute"), {"B": 1.0, "A": 1.4}, 12, 0), (("A", "swap"), {"B": 1.0, "A": 1.4}, 0, 6)])
def test_a_game_counted_by_hand(choice, latencies, run_again, blocks_moved) -> None:
    assert play(SEVEN).options == ["A", "B"] and play(SEVEN).step == 6 and play(SEVEN).score is None
    played = play(SEVEN, [choice])
    assert played.options == [] and played.latencies == pytest.approx(latencies) and played.time == 14
    assert played.score == pytest.approx((1.2, 1.4, run_again, blocks_moved))


def test_the_clock_of_the_machine() -> None:
    """One request alone: a prompt of 256 tokens, then two iterations for two more."""
    machine = Machine(step=100, sequence=10, prompt_token=1, block_out=0, block_in=0)
    assert play(Game([Arrival(50, 256, 3)], 5, machine=machine)).latencies == {"A": (3 * 110 + 256) / 3}
    swap, again = play(SEVEN._replace(machine=COUNTING._replace(block_out=5, block_in=7)), [("A", "swap")]), play(
        SEVEN._replace(machine=COUNTING._replace(prompt_token=1)), [("A", "recompute")])
    assert swap.time == 14 + 3 * 5 + 3 * 7, "three blocks out, three in"
    assert again.time == 14 + 7 + 4 + 13, "two prompts; and A's 7 + 6 tokens taken together as a new one"


def test_first_come_first_served_is_one_way_to_play() -> None:
    for way in WAYS:
        served, choices = play(FIVE, then=first_come_first_served(way)), []
        while options := play(FIVE, choices).options:
            choices.append((options[-1], way))
        assert play(FIVE, choices).score == served.score
        ended = [event.request for event in served.trace.events if event.kind == "finish"]
        assert ended[:2] == [0, 1] and len(ended) == 5
        preempted = [(event.request, event.how) for event in served.trace.events if event.kind == "preempt"]
        assert preempted == [(ord(name) - ord("A"), way) for name, way in choices]


def test_every_choice_is_every_choice() -> None:
    found = dict(every_choice(SEVEN))
    assert set(found) == {((name, way),) for name in "AB" for way in WAYS}
    found = dict(every_choice(FIVE))
    assert len(found) == len(set(found)) and all(play(FIVE, choices).score == score for choices, score in found.items())
    draw = random.Random(0)
    for _ in range(50):
        choices = ()
        while options := play(FIVE, choices).options:
            choices += ((draw.choice(options), draw.choice(WAYS)),)
        assert choices in found


def test_what_the_score_counts_is_in_the_trace() -> None:
    for choices, score in every_choice(FIVE):
        events = play(FIVE, choices).trace.events
        assert score.blocks_moved == sum(len(event.blocks) for event in events if event.kind.startswith("swap_"))
        written = sum(event.end - event.start for event in events if event.kind == "write")
        assert score.run_again == written - sum(a.prompt + a.output - 1 for a in FIVE.arrivals)


@pytest.mark.parametrize("choices", [[("E", "swap")], [("A", "wait")], [("B", "swap")] * 9, [("", "")]])
def test_a_choice_that_is_none_is_named(choices) -> None:
    with pytest.raises(InvalidConfig, match="give one of A, B|leave these out"):
        play(SEVEN, choices)


# ---- the panel -------------------------------------------------------------------------------------------------------

def test_the_panel_plays_the_same_game() -> None:
    others = {"latest first": play(FIVE, then=first_come_first_served("recompute")).score}
    panel = Panel(FIVE, others)
    enabled = [label for label, button in zip(panel._ways, panel._ways.values()) if not button.disabled]
    assert enabled == [(name, way) for name in "ABC" for way in WAYS]
    panel._ways["C", "swap"].click()
    assert panel.choices == [("C", "swap")] and "Who gives way, C, D, E?" in panel._said.value
    panel._back.click()
    assert panel.choices == [] and panel._back.disabled
    with pytest.raises(InvalidConfig):
        panel.choose("E", "swap")
    assert panel.choices == [], "a wrong choice changes nothing"
    panel._rest.click()
    data = panel._repr_mimebundle_()
    assert repr(panel) == data["text/plain"] and data["image/svg+xml"].startswith("<svg")
    own, latest = [line for line in repr(panel).splitlines() if line.startswith(("your", "latest"))]
    assert own.split()[-4:] == latest.split()[-4:] == list(map(str, score_table(others)[1][0][1:]))


def test_clicks_from_many_threads_are_taken_one_by_one() -> None:
    panel = Panel(FIVE, {})
    clicks = [threading.Thread(target=panel.choose, args=("C", "recompute")) for _ in range(2)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert panel.choices == [("C", "recompute")] * 2 and play(FIVE, panel.choices).score is not None


def test_a_closed_panel_leaves_no_widget() -> None:
    before = len(_instances)
    Panel(FIVE, {}).close()
    assert len(_instances) == before
