"""Packed linear layers give what PyTorch's give, and no weight is kept twice without need."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from minipaged import LLM, SamplingParams, Trace, backends, compiled, linears, products
from minipaged.backends import choose_linears
from minipaged.linears import PackedLinear

BATCH = SimpleNamespace(prompts=[0])
DTYPES = [pytest.param(dtype, marks=pytest.mark.skipif(bool(problem), reason=str(problem)))
          for dtype in (torch.float32, torch.bfloat16)
          if (problem := products.problem(torch.zeros(2, 2, dtype=dtype))) or True]
packs = DTYPES[0].marks[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (1, 8), (2, 31), (1, 257)])
@torch.inference_mode()
def test_a_layer(dtype, bias, rows):
    """Of rows that do not lie together, and of numbers of a row that do not."""
    torch.manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    same = partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    one, wide = (nn.Linear(48, out, bias, dtype=dtype) for out in (103, 2048))
    x = torch.randn(*rows, 48).to(dtype)
    want = one(x)
    same(PackedLinear(one)(x), want)
    apart = torch.zeros(*rows, 96, dtype=dtype)
    apart[..., ::2] = x
    same(PackedLinear(one)(apart[..., ::2]), want)
    same(PackedLinear(one)(torch.stack([x, x], 1)[:, 0]), want)
    aligned = PackedLinear(wide)(x)
    same(aligned, wide(x))
    apart = aligned[..., 0].numel() == 1 or aligned.stride(-2) * dtype.itemsize % 4096 == 64
    assert apart, "rows would drive each other out of the cache"
    back = nn.Linear(2048, 5, bias, dtype=dtype)
    same(PackedLinear(back)(aligned), back(aligned))


class Tied(nn.Module):
    """An embedding that is the output layer's weight too, and a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embedding(ids)))


@packs
@torch.inference_mode()
def test_a_model_is_packed_whole_and_its_weights_are_given_back():
    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([1, 5, 39])
    expected, inner = model(ids), weakref.ref(model.inner.weight)
    assert choose_linears(model) == f"linear layers packed in panels of {products.COLUMNS}"
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert inner() is None, "the weight lives on beside its copy"
    assert model.embedding.weight.shape == (40, 16)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_opts_decoder_computes_what_transformers_does(bias, dtype, monkeypatch):
    config, ids = opt_config(enable_bias=bias), torch.arange(4, 20)[None]
    torch.manual_seed(0)
    model = OPTForCausalLM(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4)  # the norms and biases too, which a new model has at 1 and 0
    expected = model(ids, use_cache=False).logits
    weights = [weakref.ref(model.model.decoder.layers[1].self_attn.q_proj.weight),
               weakref.ref(model.model.decoder.layers[1].fc2.weight)]
    alive, first, make = [], weakref.ref(model.model.decoder.layers[0].fc1.weight), linears.norm
    monkeypatch.setattr(linears, "norm", lambda layer: alive.append(first() is not None) or make(layer))
    choose_linears(model)
    assert alive == 2 * [True] + 3 * [False], "a layer's weights are given back before the next is packed"
    assert [weight() for weight in weights] == [None, None], "weights live on beside their copies"
    assert not any(type(module) is nn.Linear for module in model.modules())
    monkeypatch.setattr(linears.attention, "write_and_attend", causal)
    got = model(ids, position_ids=torch.arange(16)[None], use_cache=False, paged_batch=BATCH).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@packs
def test_an_iteration_without_prompts_is_one_call(monkeypatch):
    """And the output layer's; a prompt's attention is PyTorch's, so that each layer is a call there. Same tokens."""
    calls, params = [], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    monkeypatch.setattr(linears, "run", lambda works: calls.append(len(works)) or compiled.run(works))
    prompts = [[10, 11, 12, 13], [14, 15, 16]]
    with LLM("tiny-opt", num_gpu_blocks_override=8, device="cpu") as llm:
        layers, runner = llm.engine.runner.hf_config.num_hidden_layers, llm.engine.runner
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        each = (layers + 2) * [1]
        assert calls == each + 5 * [3 * layers + 1, 1]
        runner.backend = replace(runner.backend, works=None)
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == together
        assert calls[len(each) + 10:] == 6 * each


def causal(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: object,
           scale: float) -> torch.Tensor:
    """Attention of one sequence that begins with these tokens; each tensor [tokens, heads, head_dim]."""
    assert batch is BATCH and layer in (0, 1)
    heads_first = (x.transpose(0, 1) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
    return out.transpose(0, 1).contiguous()


def opt_config(**changes: object) -> OPTConfig:
    return OPTConfig(vocab_size=64, hidden_size=24, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=64, **({"word_embed_proj_dim": 24} | changes))


@packs
@pytest.mark.parametrize("changes", [dict(do_layer_norm_before=False), dict(activation_function="gelu"),
                                     dict(word_embed_proj_dim=16), dict(_remove_final_layer_norm=True),
                                     dict(layer_norm_elementwise_affine=False)])
def test_another_decoder_than_opts_usual_one_is_left_to_transformers(changes):
    model, ids = OPTForCausalLM(opt_config(**changes)).eval(), torch.arange(4, 20)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        choose_linears(model)
        assert not any(type(module) is nn.Linear for module in model.modules())
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_packed_stays_as_it_is_and_says_why(monkeypatch):
    odd = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)).bfloat16()
    monkeypatch.setattr(products, "FEATURES", "+fma,+avx512bf16")
    for model, why in ((Tied().to("meta"), "no CPU but meta"), (Tied().half(), "not in float16"),
                       (odd, "3 inputs, which are no pairs")):
        assert choose_linears(model).startswith("linear layers as PyTorch has them, since ")
        assert why in choose_linears(model)
        assert [type(module) is nn.Linear for module in model.modules()].count(True) == 2
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert "numba, which compiles their products, is not installed" in choose_linears(Tied())


def test_an_older_processor_generates_all_the_same(monkeypatch):
    monkeypatch.setattr(products, "FEATURES", "+sse2")
    trace = Trace()
    with LLM("tiny-opt", num_gpu_blocks_override=4, device="cpu", trace=trace) as llm:
        assert llm.generate("Four score", use_tqdm=False)[0].outputs[0].token_ids
    assert trace.events[0].attention_reason.endswith("as PyTorch has them, since this processor lacks fma")
