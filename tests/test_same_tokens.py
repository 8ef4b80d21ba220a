"""The engine's promise: the tokens are those that transformers gives each prompt alone."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from minipaged import LLM, SamplingParams, Trace
from minipaged.loading import BUNDLED

# Log-uniform from 1 to 600, with both ends and the neighbourhood of block boundaries.
LENGTHS = [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 600]


def make_prompts(vocab: int, count: int = 64, seed: int = 0, longest: int = 600) -> list[list[int]]:
    """Random token ids (no special tokens) of 1 to ``longest`` tokens."""
    rng = random.Random(seed)
    lengths = [n for n in LENGTHS if n <= longest][:count]
    lengths += [round(longest ** rng.random()) for _ in range(count - len(lengths))]
    return [[rng.randrange(4, vocab) for _ in range(n)] for n in lengths]


def vocab_of(oracle) -> int:
    return oracle.model.config.vocab_size


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
@pytest.mark.parametrize("name", ["tiny-opt", "opt-125m", "llama", "qwen3"])
def test_64_prompts_at_once(name, block_size, checkpoint, oracle):
    """All prompts in one batch; the pool and the budget are large enough that no request waits for another."""
    truth = oracle(name)
    prompts, max_tokens = make_prompts(vocab_of(truth)), 4 if name == "opt-125m" else 8
    with LLM(checkpoint(name), block_size=block_size, num_gpu_blocks_override=16_000 // block_size + 64,
             max_num_batched_tokens=16_000, audit=True) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
        assert llm.block_manager.device.num_free == llm.block_manager.device.num_blocks
    for prompt, output in zip(prompts, outputs):
        truth.assert_greedy(prompt, output.outputs[0].token_ids, max_tokens)


@pytest.mark.parametrize("attention", ["cpu", "eager"])
@pytest.mark.parametrize("name", ["tiny-opt", "opt", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("block_size, blocks", [(1, 90), (4, 24), (16, 7), (64, 3)])
def test_a_pool_that_preempts_all_the_time(name, attention, block_size, blocks, checkpoint, oracle):
    truth, trace = oracle(name), Trace()
    prompts = make_prompts(vocab_of(truth), count=10, longest=40)
    if block_size == 64:  # these must grow over the end of their first block
        prompts = [(prompt * 60)[:50 + i] for i, prompt in enumerate(prompts)]
    with LLM(checkpoint(name), block_size=block_size, num_gpu_blocks_override=blocks, attention=attention,
             audit=True, trace=trace) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    preemptions = sum(event.kind == "preempt" for event in trace.events)
    assert preemptions >= (2 if name == "qwen2" else 4)  # whose random weights come to an end token soon
    for prompt, output in zip(prompts, outputs):
        truth.assert_greedy(prompt, output.outputs[0].token_ids, 24)


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7), dict(top_k=5), dict(top_p=0.8),
                                     dict(temperature=1.3, top_k=40, top_p=0.9)], ids=str)
@pytest.mark.parametrize("name", ["tiny-opt", "qwen3"])
def test_seeded_sampling_alone_and_in_any_batch(name, options, checkpoint, oracle):
    """Alone in transformers after manual_seed, alone here, and in a batch that preempts: the same draws."""
    truth = oracle(name)
    prompts = make_prompts(vocab_of(truth), count=8, longest=30)
    params = [SamplingParams(max_tokens=20, seed=100 + i, **options) for i in range(len(prompts))]
    wanted = [truth.sampled(prompt, 20, 100 + i, **options) for i, prompt in enumerate(prompts)]
    with LLM(checkpoint(name), block_size=4, num_gpu_blocks_override=40, audit=True) as llm:
        alone = [llm.generate(prompt, p)[0].outputs[0].token_ids for prompt, p in zip(prompts, params)]
        batched = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    assert alone == wanted
    assert batched == wanted


def test_unseeded_sampling_is_reproducible_but_not_repeated(checkpoint):
    params = SamplingParams(max_tokens=16)
    with LLM("tiny-opt", seed=1) as first, LLM("tiny-opt", seed=1) as second, LLM("tiny-opt", seed=2) as other:
        a, b = (first.generate("The king", params)[0].outputs[0].token_ids for _ in range(2))
        assert second.generate("The king", params)[0].outputs[0].token_ids == a
        assert other.generate("The king", params)[0].outputs[0].token_ids != a
        assert a != b


@pytest.mark.parametrize("name", ["tiny-opt", "opt", "llama", "qwen3"])
def test_bfloat16(name, checkpoint):
    """Each token has the best logit that transformers computes in bfloat16, or ties with it: a number of that type has
    eight bits, and the two add up in different orders."""
    source = BUNDLED.get(name, checkpoint(name))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    prompts = make_prompts(model.config.vocab_size, count=12, longest=60)
    with LLM(checkpoint(name), dtype="bfloat16", block_size=4, num_gpu_blocks_override=200) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    best = chosen = 0
    for prompt, output in zip(prompts, outputs):
        tokens = torch.tensor(output.outputs[0].token_ids)
        with torch.inference_mode():
            logits = model(torch.cat([torch.tensor(prompt), tokens])[None]).logits[0, len(prompt) - 1:-1].float()
        behind = logits.amax(-1) - logits[torch.arange(len(tokens)), tokens]
        assert (behind <= logits.abs().amax(-1) * 2 ** -6).all(), behind.max()
        best, chosen = best + int((behind == 0).sum()), chosen + len(tokens)
    assert best >= 0.9 * chosen


def test_attention_backends_agree(checkpoint):
    """Logits of mixed prompts and single tokens, Eq. 4 as written against the fast paths, in float32."""
    logits = {}
    for attention in ("eager", "torch", "cpu"):
        with LLM(checkpoint("qwen3"), block_size=4, attention=attention) as llm:
            engine, seen = llm.engine, []
            run = engine.runner.run
            engine.runner.run = lambda *args: seen.append(run(*args)) or seen[-1].clone()
            llm.generate(make_prompts(512, count=6, longest=30), SamplingParams(temperature=0, max_tokens=6))
        logits[attention] = torch.cat(seen)
    for attention in ("torch", "cpu"):
        torch.testing.assert_close(logits["eager"], logits[attention], atol=1e-5, rtol=1e-5)
