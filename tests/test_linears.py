"""Packed linear layers give what PyTorch's give, and no weight is kept twice without need."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

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
def test_an_opt_layer_applies_its_relu_once_and_within_the_product():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                       word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.5)
    model, ids = OPTForCausalLM(config).eval(), torch.arange(4, 20)[None]
    expected = model(ids, use_cache=False).logits
    pack_linears(model)
    layer = model.model.decoder.layers[1]
    assert (layer.fc1.after, layer.fc2.after, type(layer.activation_fn)) == ("relu", "none", nn.Identity)
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
