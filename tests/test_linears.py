"""Packed linear layers give what PyTorch's give, and no weight is kept twice without need."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from minipaged import LLM, linears
from minipaged.linears import PackedLinear, pack_linears

packs = pytest.mark.skipif(linears._problem(torch.device("cpu"), torch.float32) is not None,
                           reason="this PyTorch packs no linear layers")


@packs
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (1, 8), (2, 31), (1, 257)])
@torch.inference_mode()
def test_products(dtype, tolerance, bias, rows):
    if linears._problem(torch.device("cpu"), dtype):
        pytest.skip("this processor has no products of bfloat16")
    torch.manual_seed(0)
    for width, out in (48, 96), (80, 7), (256, 512):
        linear = nn.Linear(width, out, bias, dtype=dtype)
        x = torch.randn(*rows, width).to(dtype)
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=tolerance, rtol=tolerance)


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
    assert pack_linears(model) == "linear layers packed by oneDNN"
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert inner() is None, "the weight lives on beside its copy"
    assert model.embedding.weight.shape == (40, 16)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@packs
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    alive, first, make = [], weakref.ref(model.model.decoder.layers[0].fc1.weight), linears.PackedLayer
    monkeypatch.setattr(linears, "PackedLayer", lambda layer: alive.append(first() is not None) or make(layer))
    pack_linears(model)
    assert alive == [True, False], "a layer's weights are given back before the next is packed"
    assert [weight() for weight in weights] == [None, None], "weights live on beside their copies"
    assert not any(type(module) is nn.Linear for module in model.modules())
    monkeypatch.setattr(linears.attention, "write_and_attend", causal)
    got = model(ids, position_ids=torch.arange(16)[None], use_cache=False, paged_batch="batch").logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def causal(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: str,
           scale: float) -> torch.Tensor:
    """Attention of one sequence that begins with these tokens; each tensor [tokens, heads, head_dim]."""
    assert batch == "batch" and layer in (0, 1)
    heads_first = (x.transpose(0, 1) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
    return out.transpose(0, 1).contiguous()


def opt_config(**changes: object) -> OPTConfig:
    return OPTConfig(vocab_size=64, hidden_size=24, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=64, **({"word_embed_proj_dim": 24} | changes))


@packs
@pytest.mark.parametrize("changes", [dict(do_layer_norm_before=False), dict(activation_function="gelu"),
                                     dict(word_embed_proj_dim=16), dict(_remove_final_layer_norm=True)])
def test_another_decoder_than_opts_usual_one_is_left_to_transformers(changes):
    model, ids = OPTForCausalLM(opt_config(**changes)).eval(), torch.arange(4, 20)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        pack_linears(model)
        assert not any(type(module) is nn.Linear for module in model.modules())
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ops", [SimpleNamespace(),
                                 SimpleNamespace(_reorder_linear_weight=lambda *_: torch.zeros(2).view(3))])
def test_without_the_operators_a_model_stays_as_it_is(ops, monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    model = Tied()
    assert "does not pack float32" in pack_linears(model)
    assert type(model.inner) is nn.Linear
    with LLM("tiny-opt", num_gpu_blocks_override=4, device="cpu") as llm:
        assert llm.generate("Four score", use_tqdm=False)[0].outputs[0].token_ids


def test_a_gpu_is_left_alone():
    assert "no CPU but meta" in pack_linears(Tied().to("meta"))
