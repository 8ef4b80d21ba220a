"""Small checkpoints with random weights, in the geometry and file format of the real ones."""

from __future__ import annotations

from pathlib import Path

import torch

# So many that sequences of random tokens end now and then.
END_TOKENS = list(range(2, 10))

GEOMETRIES = {
    "opt-125m": dict(vocab_size=50272, hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12,
                     max_position_embeddings=2048, word_embed_proj_dim=768),
    "opt": dict(vocab_size=512, hidden_size=48, ffn_dim=96, num_hidden_layers=2, num_attention_heads=3,
                max_position_embeddings=1024, word_embed_proj_dim=48),
    "llama": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=1024),
    "qwen2": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=1, max_position_embeddings=1024),
    "qwen3": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6,
                  num_key_value_heads=2, head_dim=24, max_position_embeddings=1024),
}


def make_checkpoint(name: str, folder: Path) -> str:
    """Save a model of that geometry with random weights; returns the folder.

    The weights are drawn wider than for training, so that logits differ by more than rounding does.
    """
    from transformers import AutoModelForCausalLM, CONFIG_MAPPING

    family = "opt" if name.startswith("opt") else name
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**GEOMETRIES[name], pad_token_id=1, bos_token_id=2, eos_token_id=2,
                                    **({"init_std": 0.08} if family == "opt" else {"initializer_range": 0.15}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = END_TOKENS
    model.save_pretrained(folder / name)
    return str(folder / name)
