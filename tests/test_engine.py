"""What requests do to the engine: stopping, streaming, refusing, interrupting, closing."""

from __future__ import annotations

import _thread
import gc
import random
import threading
import time
import weakref

import numpy as np
import psutil
import pytest
import torch

import minipaged
from minipaged import LLM, BeamSearchParams, SamplingParams, Trace
from minipaged.errors import (EmptyPrompt, EngineClosed, InvalidConfig, InvalidParams, InvalidPrompt, MissingWeights,
                              PromptTooLong, RequestsRefused, RequestTooLarge, TokenOutOfVocabulary, UnknownModel,
                              UnsupportedModel)

GREEDY = SamplingParams(temperature=0, max_tokens=8)
FOUR_SCORE = "Four score and seven years ago our"


@pytest.fixture
def llm():
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=64, audit=True) as llm:
        yield llm
        assert_all_free(llm)


def assert_all_free(llm: LLM) -> None:
    manager = llm.block_manager
    assert manager.device.num_free == manager.device.num_blocks and not manager.block_tables
    assert not llm.engine.scheduler.has_unfinished


# ---- what comes out ----------------------------------------------------------------------------------------------

def test_the_papers_example(llm):
    output, = llm.generate(FOUR_SCORE, SamplingParams(temperature=0, max_tokens=6))
    assert output.outputs[0].text == " fathers brought forth on this continent"
    assert output.prompt == FOUR_SCORE and output.prompt_token_ids[0] == 2 and len(output.prompt_token_ids) == 8
    assert output.finished and output.outputs[0].finish_reason == "length"


def test_prompts_as_text_ids_and_lists(llm):
    ids = llm.get_tokenizer()(FOUR_SCORE)["input_ids"]
    wanted = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids
    for prompts, count in [(ids, 1), ([FOUR_SCORE], 1), ([ids, FOUR_SCORE], 2), (tuple(ids), 1), (np.array(ids), 1),
                           ({"prompt": FOUR_SCORE}, 1), ([{"prompt_token_ids": ids}, torch.tensor(ids)], 2)]:
        outputs = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [wanted] * count


def test_defaults_are_vllms():
    p = SamplingParams()
    assert (p.temperature, p.top_p, p.top_k, p.max_tokens, p.min_tokens) == (1.0, 1.0, 0, 16, 0)
    config = minipaged.EngineConfig("tiny-opt")
    assert (config.block_size, config.gpu_memory_utilization, config.swap_space, config.max_num_seqs) == (16, .9, 4, 256)


def test_stream_gives_each_token_as_it_comes(llm):
    texts = [output.outputs[0].text for output in llm.stream(FOUR_SCORE, GREEDY)]
    assert len(texts) == 8
    assert all(later.startswith(earlier) and later != earlier for earlier, later in zip(texts, texts[1:]))
    assert texts[-1] == llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].text


def test_leaving_a_stream_early_frees_its_blocks(llm):
    for _ in llm.stream(FOUR_SCORE, GREEDY):
        assert llm.block_manager.device.num_free < 64
        break
    assert_all_free(llm)


def test_two_streams_and_a_generate_share_the_engine(llm):
    wanted = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids
    first, second = llm.stream(FOUR_SCORE, GREEDY), llm.stream(FOUR_SCORE, GREEDY)
    next(first), next(second)
    assert llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids == wanted
    assert list(first)[-1].outputs[0].token_ids == wanted
    assert list(second)[-1].outputs[0].token_ids == wanted


def test_stop_text_stop_token_and_end_of_sequence(llm):
    tokens = llm.get_tokenizer()
    stopped = llm.generate(FOUR_SCORE, SamplingParams(temperature=0, max_tokens=9, stop="ght fo"))[0].outputs[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (" fathers brou", "stop", "ght fo")
    shown = [out.outputs[0].text for out in llm.stream(FOUR_SCORE, SamplingParams(temperature=0, stop="brought forth"))]
    assert shown[-1] == " fathers " and all(shown[-1].startswith(text) for text in shown), "a stop text was shown"
    forth = tokens.encode(" forth", add_special_tokens=False)[0]
    stopped = llm.generate(FOUR_SCORE, SamplingParams(temperature=0, stop_token_ids=[forth]))[0].outputs[0]
    assert (stopped.token_ids[-1], stopped.finish_reason, stopped.stop_reason) == (forth, "stop", forth)
    assert stopped.text == " fathers brought"
    later = llm.generate(FOUR_SCORE, SamplingParams(temperature=0, stop_token_ids=[forth], min_tokens=5))[0].outputs[0]
    assert forth not in later.token_ids[:5] and len(later.token_ids) >= 5


def test_end_of_sequence_stops_unless_ignored(llm):
    llm.engine.output_processor.eos_token_ids = set(llm.get_tokenizer().encode(" forth", add_special_tokens=False))
    ended = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0]
    assert (len(ended.token_ids), ended.finish_reason, ended.stop_reason) == (3, "stop", None)
    assert len(llm.generate(FOUR_SCORE, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
               .outputs[0].token_ids) == 8


def test_max_tokens_none_fills_the_context():
    with LLM("tiny-opt", max_model_len=40, audit=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        assert len(llm.generate(FOUR_SCORE, params)[0].outputs[0].token_ids) == 40 - 8


def test_logprobs(llm, oracle):
    out = llm.generate(FOUR_SCORE, SamplingParams(temperature=0, max_tokens=3, logprobs=2))[0].outputs[0]
    ids = llm.get_tokenizer()(FOUR_SCORE)["input_ids"]
    for i, (token, ranked) in enumerate(zip(out.token_ids, out.logprobs)):
        with torch.inference_mode():
            truth = oracle("tiny-opt").model(torch.tensor([ids + out.token_ids[:i]])).logits[0, -1].log_softmax(-1)
        assert list(ranked) == truth.topk(2).indices.tolist()
        assert ranked[token].rank == 1 and abs(ranked[token].logprob - truth[token].item()) < 1e-4
    assert abs(out.cumulative_logprob - sum(r[t].logprob for t, r in zip(out.token_ids, out.logprobs))) < 1e-4


def test_a_chosen_token_outside_the_top_is_reported_with_its_rank(llm):
    out = llm.generate(FOUR_SCORE, SamplingParams(temperature=5.0, max_tokens=6, logprobs=1, seed=3))[0].outputs[0]
    ranks = [ranked[token].rank for token, ranked in zip(out.token_ids, out.logprobs)]
    assert max(ranks) > 1
    assert all(len(ranked) == (1 if rank == 1 else 2) for ranked, rank in zip(out.logprobs, ranks))


def test_text_of_characters_that_take_several_tokens(llm):
    """Streamed text never shows half a character, and ends up as the tokenizer decodes the whole."""
    text = "naïve 世界 🙂"
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream, grown = llm.engine.tokens.stream(), ""
    for token in ids:
        grown += stream.push(token)
        assert "\ufffd" not in grown and text.startswith(grown)
    assert grown == text


# ---- blocks ------------------------------------------------------------------------------------------------------

def test_blocks_are_taken_only_as_tokens_need_them(llm):
    """8 prompt tokens (with the leading </s>) fill 2 blocks; the 9th token in the cache takes the third."""
    tables = [output.block_tables[0] for output in llm.stream(FOUR_SCORE, GREEDY)]
    assert [(len(t.blocks), t.num_tokens) for t in tables] == [(2, 8), *[(3, n) for n in (9, 10, 11, 12)],
                                                              *[(4, n) for n in (13, 14, 15)]]


def test_most_allocated_slots_hold_tokens():
    """32 requests of ShareGPT-like lengths, block size 16: at most one block of each is partly filled."""
    rng, filled, allocated = random.Random(0), 0, 0
    prompts = [[rng.randrange(4, 4000) for _ in range(min(1500, max(4, round(rng.lognormvariate(5.4, 0.9)))))]
               for _ in range(32)]
    with LLM("tiny-opt", num_gpu_blocks_override=1200, audit=True) as llm:
        for _ in llm.stream(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)):
            for table in llm.block_manager.block_tables.values():
                filled, allocated = filled + table.num_tokens, allocated + 16 * len(table.blocks)
                assert len(table.blocks) * 16 - table.num_tokens < 16
    print(f"{filled / allocated:.3f} of the allocated slots hold tokens; "
          f"mean prompt {sum(map(len, prompts)) / 32:.0f} tokens")
    assert filled / allocated >= 0.96


def test_first_come_first_served_and_the_latest_gives_way():
    trace = Trace()
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=8, audit=True, trace=trace) as llm:
        outputs = llm.generate([FOUR_SCORE] * 4, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    finished = [event.request for event in trace.events if event.kind == "finish"]
    preempted = [event.request for event in trace.events if event.kind == "preempt"]
    assert finished == [0, 1, 2, 3], "a later request overtook an earlier one"
    assert preempted and 0 not in preempted
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


# ---- bad input ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, params, error, says", [
    ("tokens:", GREEDY, EmptyPrompt, "no token"),
    ([5] * 2048, GREEDY, PromptTooLong, "2047"),
    ([5, 4096], GREEDY, TokenOutOfVocabulary, "4096"),
    ([5, -1], GREEDY, TokenOutOfVocabulary, "-1"),
    ([[5, 2.5]], GREEDY, InvalidPrompt, "list of token ids"),
    ([True, False], GREEDY, InvalidPrompt, "whole numbers"),
    (b"text", GREEDY, InvalidPrompt, "neither"),
    ([5], {"temperature": 0}, InvalidParams, "SamplingParams"),
    (3, GREEDY, InvalidPrompt, "neither"),
    ([5] * 250, GREEDY, RequestTooLarge, "65 blocks of 4, and the pool has 64"),
    ([5], SamplingParams(stop_token_ids=[9999]), InvalidParams, "9999"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_bad_prompt_is_refused_before_anything_is_allocated(llm, prompt, params, error, says):
    with pytest.raises(error, match=says):
        llm.generate([] if prompt == "tokens:" else prompt, params)
    assert_all_free(llm)


@pytest.mark.parametrize("options", [dict(max_tokens=0), dict(temperature=-1), dict(top_p=0), dict(top_p=1.1),
                                     dict(top_k=-2), dict(min_tokens=5, max_tokens=4), dict(logprobs=-1),
                                     dict(stop=""), dict(min_tokens=-1), dict(n=0), dict(n=2, temperature=0),
                                     dict(best_of=1, n=2), dict(max_tokens=2.5), dict(seed=2**64), dict(stop=[3]),
                                     dict(stop_token_ids=["a"]), dict(temperature=float("nan"))], ids=str)
def test_bad_sampling_params(options):
    with pytest.raises(InvalidParams, match=next(iter(options))):
        SamplingParams(**options)


@pytest.mark.parametrize("options, error", [
    (dict(block_size=0), InvalidConfig), (dict(block_size=257), InvalidConfig),
    (dict(num_gpu_blocks_override=0), InvalidConfig), (dict(gpu_memory_utilization=0), InvalidConfig),
    (dict(dtype="int8"), InvalidConfig), (dict(attention="magic"), InvalidConfig), (dict(swap_space=-1), InvalidConfig),
    (dict(max_model_len=4096), InvalidConfig), (dict(max_num_batched_tokens=100), InvalidConfig),
    (dict(max_model_len=16, max_num_batched_tokens=100), InvalidConfig),
    (dict(device="abacus"), InvalidConfig), (dict(gpu_memory_utilization=1e-12), InvalidConfig),
], ids=str)
def test_bad_config(options, error):
    with pytest.raises(error):
        LLM("tiny-opt", **options)


def test_unknown_model_no_weights_and_unsupported_architecture(tmp_path):
    from transformers import GPT2Config, MistralConfig

    with pytest.raises(UnknownModel, match="tiny-opt"):
        LLM("no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match="save_pretrained"):
        LLM(str(tmp_path / "empty"))
    for config in (GPT2Config(), MistralConfig()):
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        (folder / "model.safetensors").touch()
        with pytest.raises(UnsupportedModel, match="supported are opt"):
            LLM(str(folder))


def test_sliding_window_is_refused(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModel, match="sliding-window"):
        LLM(str(tmp_path))


def test_a_broken_weights_file_is_named(tmp_path, checkpoint):
    import shutil

    shutil.copytree(checkpoint("opt"), tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(MissingWeights, match="cannot be read"):
        LLM(str(tmp_path / "cut"))


def test_one_bad_request_loses_no_other(llm):
    wanted = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids
    with pytest.raises(RequestsRefused) as caught:
        llm.generate([FOUR_SCORE, [5] * 4000, FOUR_SCORE], GREEDY)
    assert [type(error) for error in caught.value.exceptions] == [PromptTooLong]
    first, refused, last = caught.value.outputs
    assert refused is None and first.outputs[0].token_ids == last.outputs[0].token_ids == wanted


# ---- interrupts and failures -------------------------------------------------------------------------------------

def test_interrupting_generate_leaves_every_block_free(llm):
    """A real Ctrl-C in the middle; another request that was running beside is not lost."""
    wanted = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids
    beside = llm.stream(FOUR_SCORE, GREEDY)
    next(beside)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            llm.generate([FOUR_SCORE] * 4, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert list(beside)[-1].outputs[0].token_ids == wanted
    assert_all_free(llm)
    assert llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids == wanted


@pytest.mark.parametrize("where", ["schedule", "run", "sample"])
def test_a_failure_inside_an_iteration_loses_no_block(llm, monkeypatch, where):
    """The requests of others go on, by recomputation, and give the same tokens; where tokens were being sampled, which
    cannot be done twice, they are aborted."""
    import minipaged.output_processor as processor

    wanted = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids
    beside = llm.stream([FOUR_SCORE] * 2, GREEDY)
    next(beside)
    target, name = {"schedule": (llm.block_manager.device, "allocate"), "run": (llm.engine.runner, "run"),
                    "sample": (processor, "sample")}[where]

    def fail(*args, **kwargs):
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        with pytest.raises(MemoryError):
            llm.generate([FOUR_SCORE, "It was the best"], GREEDY)
    llm.engine._audit()
    outputs = list(beside)
    if where == "sample":
        assert [output.outputs[0].finish_reason for output in outputs[-2:]] == ["abort", "abort"]
    else:
        assert outputs[-1].outputs[0].token_ids == wanted
    assert_all_free(llm)
    assert llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids == wanted


def test_abort_frees_the_blocks_at_once(llm):
    group = llm.engine.add_request([5, 6, 7], GREEDY)
    llm.engine.step()
    assert llm.block_manager.device.num_free < 64
    llm.engine.abort(group)
    assert_all_free(llm)
    assert group.seqs[0].finish_reason == "abort"


def test_abort_by_number_ends_a_stream(llm):
    stream = llm.stream(FOUR_SCORE, GREEDY)
    llm.abort(next(stream).request_id)
    assert [output.outputs[0].finish_reason for output in stream] == ["abort"]
    assert_all_free(llm)


def test_a_stream_that_is_collected_in_the_middle_of_an_iteration(llm, monkeypatch):
    """The garbage collector may close a forgotten stream anywhere; its request ends after the iteration."""
    wanted = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids
    forgotten = [llm.stream(FOUR_SCORE, GREEDY)]
    next(forgotten[0])
    run = llm.engine.runner.run

    def collect(*args):
        forgotten.clear()
        return run(*args)

    monkeypatch.setattr(llm.engine.runner, "run", collect)
    assert llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids == wanted
    assert_all_free(llm)


def test_a_failure_between_forks_leaves_no_block_behind(llm, monkeypatch):
    """Sample 2 of 3 cannot be made: its sibling was forked already, but belongs to no request yet."""
    from minipaged.sequence import Sequence

    fork, calls = Sequence.fork, []

    def fail_second(self, seq_id):
        calls.append(seq_id)
        if len(calls) == 2:
            raise MemoryError("planted")
        return fork(self, seq_id)

    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "fork", fail_second)
        with pytest.raises(MemoryError):
            llm.generate(FOUR_SCORE, SamplingParams(n=3, seed=0))
    llm.engine._audit()
    assert_all_free(llm)


def test_a_trace_that_cannot_be_written_does_not_stop_the_engine(tmp_path):
    trace = Trace(tmp_path / "trace.jsonl")
    trace._file.close()
    trace._file = open("/dev/full", "w", buffering=1)
    with pytest.warns(UserWarning, match="trace file ends here"):
        with LLM("tiny-opt", num_gpu_blocks_override=8, trace=trace) as llm:
            assert llm.generate([5, 6], GREEDY)[0].finished
            assert_all_free(llm)


def test_a_prefix_and_a_request_swapped_out_do_not_wait_for_each_other():
    """Swapped in, the group would need copies of the prefix's blocks, for which there is no room: it is recomputed."""
    prefix = list(range(10, 34))
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=14, audit=True) as llm:
        llm.register_prefix(prefix)
        params = SamplingParams(n=2, max_tokens=12, seed=1, ignore_eos=True)
        outputs = llm.generate([prefix + [40 + i] for i in range(3)], params)
        alone = [llm.generate(prefix + [40 + i], params)[0] for i in range(3)]
    assert [[o.token_ids for o in out.outputs] for out in outputs] == [[o.token_ids for o in a.outputs] for a in alone]


def test_a_second_thread_waits_for_its_turn(llm):
    wanted = llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].token_ids
    results = []
    threads = [threading.Thread(target=lambda: results.append(llm.generate(FOUR_SCORE, GREEDY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [out[0].outputs[0].token_ids for out in results] == [wanted] * 4


# ---- what stays behind -------------------------------------------------------------------------------------------

def test_making_the_llm_again_does_not_grow_memory():
    """As re-running its notebook cell does: the same name, no close(), and no help from the garbage collector."""
    process, sizes = psutil.Process(), []
    gc.disable()
    try:
        for _ in range(8):
            llm = LLM("tiny-opt", num_gpu_blocks_override=1000)
            llm.engine.runner.cache.data.zero_()  # 190 MB, touched
            llm.generate("Once upon a time", GREEDY)
            sizes.append(process.memory_info().rss >> 20)
    finally:
        gc.enable()
    # Each is made while the one before is alive, so that two places in memory may take turns.
    assert max(sizes[-2:]) - max(sizes[2:4]) < 100, sizes
    del llm


def test_close_gives_everything_back_and_says_so():
    llm = LLM("tiny-opt", num_gpu_blocks_override=8)
    alive = [weakref.ref(thing) for thing in (llm.engine, llm.engine.runner.model, llm.engine.runner.cache)]
    stream = llm.stream("Once", GREEDY)
    next(stream)
    threads = threading.active_count()
    llm.close()
    llm.close()
    stream.close()
    del stream
    gc.collect()
    assert not any(ref() for ref in alive)
    assert threading.active_count() <= threads
    with pytest.raises(EngineClosed, match="make a new one"):
        llm.generate("Once", GREEDY)


def test_ready_quickly():
    """Beyond what importing torch and transformers' OPT takes."""
    start = time.perf_counter()
    LLM("tiny-opt").close()
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    with LLM("tiny-opt", dtype=dtype, num_gpu_blocks_override=16, audit=True) as llm:
        assert str(llm.engine.runner.cache.data.dtype) == f"torch.{dtype}"
        assert llm.generate(FOUR_SCORE, GREEDY)[0].outputs[0].text.startswith(" fathers brought forth")


def test_a_checkpoint_without_a_tokenizer_takes_ids_only(checkpoint):
    with LLM(checkpoint("llama"), num_gpu_blocks_override=16) as llm:
        assert len(llm.generate([5, 6, 7], SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2
        with pytest.raises(InvalidPrompt, match="no tokenizer"):
            llm.generate("text", GREEDY)


def test_core_objects_show_themselves_escaped(llm):
    trace = Trace()
    evil = SamplingParams(temperature=0, max_tokens=1)
    output, = llm.generate("<img src=x onerror=alert(1)>", evil)
    stream = llm.stream(FOUR_SCORE, GREEDY)
    table = next(stream).block_tables[0]
    for thing in (output, table, llm.block_manager, trace):
        assert "<table>" in thing._repr_html_() and "<img" not in thing._repr_html_()
    assert "&lt;img src=x" in output._repr_html_()
    assert repr(table).splitlines()[2].split() == ["0", str(table.blocks[0]), "4/4"]
    assert " ".join(map(str, table.blocks)) in repr(llm.block_manager)
    stream.close()


def test_the_audit_is_on_here_and_an_option_elsewhere(monkeypatch):
    assert minipaged.EngineConfig("tiny-opt").audit
    monkeypatch.delenv("MINIPAGED_AUDIT")
    assert not minipaged.EngineConfig("tiny-opt").audit


def test_samples_beside_a_beam_search_are_drawn_from_their_own_prompt():
    """In the first iteration there are as many draws as rows of logits, and both draws are from the second row."""
    samples = SamplingParams(n=2, temperature=1, seed=1, max_tokens=4)
    with LLM("tiny-opt", num_gpu_blocks_override=40) as llm:
        alone = llm.generate([[50, 60, 70]], samples)[0]
        _, beside = llm.generate([[91, 81, 71], [50, 60, 70]], [BeamSearchParams(beam_width=2, max_tokens=4), samples])
    assert [o.token_ids for o in beside.outputs] == [o.token_ids for o in alone.outputs]
