"""`minipaged bench`: what it asks for, what it counts, what it prints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from minipaged import LLM, SamplingParams, Trace, cli
from minipaged.bench import make_field, report
from minipaged.bench.contenders import ContenderFailed, Minipaged, PaddedGenerate, Run
from minipaged.bench.workload import Workload, make_checkpoint, make_workload
from minipaged.loading import load_config

SMALL = Workload([[10 + i] * n for i, n in enumerate([30, 3, 17, 20, 33])], [24, 9, 16, 30, 12])


def test_the_requests_are_the_same_every_time_and_as_long_as_they_are_said_to_be():
    load = make_workload(50272)
    assert (len(load.prompts), load.prompt_tokens, load.output_tokens) == (32, 1806, 3967)
    assert load == make_workload(50272)
    lengths = [*map(len, load.prompts), *load.output_lens]
    assert min(lengths) >= 4 and max(lengths) <= 512
    assert all(4 <= token < 50272 for prompt in load.prompts for token in prompt)
    assert sum(load.blocks(1)) == 1806 + 3967 and sum(load.blocks(16)) == 376


def test_the_checkpoint_has_the_geometry_of_opt_125m(tmp_path):
    _, config = load_config(make_checkpoint(tmp_path))
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.ffn_dim,
            config.vocab_size) == (12, 768, 12, 3072, 50272)


def test_every_contender_generates_every_token():
    field = make_field("tiny-opt", "float32", ["full", "quarter"], True, SMALL)
    assert [(contender.name, contender.pool) for contender in field[:3]] == [
        ("minipaged", "full"), ("minipaged", "quarter"), ("minipaged, swapping", "quarter")]
    assert [contender.pool for contender in field[3:]] == ["full", "quarter"] * 2
    for contender in field:
        run = contender.run(SMALL)
        assert run.tokens == SMALL.output_tokens and run.seconds >= sum(run.steps)
        assert contender.run(SMALL).tokens == run.tokens, "the last run left something behind"


def test_what_is_counted_is_what_the_trace_says():
    """Blocks in use at the most, and preemptions, of the same requests with a trace."""
    contender = Minipaged("tiny-opt", "float32", "quarter", 5)
    run, trace = contender.run(SMALL), Trace()
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in SMALL.output_lens]
    with LLM("tiny-opt", num_gpu_blocks_override=5, trace=trace) as llm:
        llm.generate(SMALL.prompts, params)
    preempted = sum(event.kind == "preempt" for event in trace.events)
    assert run.preemptions == preempted > 0
    assert run.peak_blocks == 5 and len(run.steps) == trace.step
    running = [sum(-(-(len(prompt) + step) // 16) for prompt, length in zip(SMALL.prompts, SMALL.output_lens)
                   if step < length) for step in range(max(SMALL.output_lens))]
    assert Minipaged("tiny-opt", "float32", "full", 99).run(SMALL).peak_blocks == max(running)


def test_swapping_leaves_nothing_to_be_computed_again():
    trace, default = Trace(), Minipaged("tiny-opt", "float32", "quarter", 5)
    swapping = Minipaged("tiny-opt", "float32", "quarter", 5, preemption_mode="swap")
    swapping.llm.engine.record(trace)
    run = swapping.run(SMALL)
    assert {event.how for event in trace.events if event.kind == "preempt"} == {"swap"}
    assert run.preemptions == default.run(SMALL).preemptions > 0 and run.tokens == SMALL.output_tokens


def test_steps_in_which_all_decode_are_told_apart():
    run = Minipaged("tiny-opt", "float32", "full", 99).run(SMALL)
    assert len(run.steps) == max(SMALL.output_lens)
    assert run.decodes == run.steps[1:min(SMALL.output_lens)], "neither the prompts nor fewer requests"


def test_medians_and_ratios():
    ours, theirs = Minipaged.__new__(Minipaged), SimpleNamespace(name="theirs", pool="full")
    ours.name, ours.pool, ours.blocks = "minipaged", "full", 8
    ours.llm = SimpleNamespace(engine=SimpleNamespace(runner=SimpleNamespace(backend=SimpleNamespace(reason="why"))))
    runs = [[Run(100, seconds, (0.1, 0.2, 0.3), (0.2,), 7, 2) for seconds in (1.0, 2.0, 10.0)],
            [Run(100, seconds) for seconds in (4.0, 4.0, 100.0)]]
    mine, other = report([ours, theirs], runs, SMALL, "model").splitlines()[3:5]
    assert mine.split()[:7] == ["minipaged", "full", "50.0", "200.00", "200.00", "3", "7"] and mine.endswith("2")
    assert other.split()[:4] == ["theirs", "full", "25.0", "4.00"], "4, 2 and 10 times: not the ratio of the medians"


def test_a_contender_that_stops_early_is_no_contender():
    model = SimpleNamespace(device="cpu", generate=lambda ids, **_: torch.cat([ids, ids[:, :2]], 1))
    with pytest.raises(ContenderFailed, match="generated 10 tokens where 91"):
        PaddedGenerate(model, "full", 1.0).run(SMALL)


def test_the_command_prints_the_table(capsys):
    assert cli.main(["bench", "--model", "tiny-opt", "--requests", "1", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    load = make_workload(4096, 1)
    assert f"1 requests at once, {load.prompt_tokens:,} prompt and {load.output_tokens:,} output tokens" in out
    assert out.count("minipaged  ") == 2 and "Attention: " in out
    print(out)


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--requests", "-1"], ["--dtype", "int8"], ["--pool", "half"]])
def test_options_that_make_no_sense(wrong):
    with pytest.raises(SystemExit):
        cli.main(["bench", *wrong])
