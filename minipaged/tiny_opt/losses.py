"""How well a model foretells text: cross entropy, in nats per token."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from transformers import OPTForCausalLM

from .corpus import EOS, VOCAB_SIZE


def token_losses(model: OPTForCausalLM, rows: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Cross entropy (nats) of each target of rows of tokens."""
    logits = model(rows[:, :-1], position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def window_losses(model: OPTForCausalLM, window: list[int]) -> torch.Tensor:
    """The losses of one held-out window that begins at position 0."""
    return token_losses(model, torch.tensor([window]), None)


def evaluate(model: OPTForCausalLM, held_out: dict[str, list[int]], pool: ThreadPoolExecutor,
             size: int = 1024) -> dict[str, float]:
    """Mean loss per file and in total; every held-out token but the first of its file is predicted once."""
    losses = {}
    for name, tokens in held_out.items():
        windows = [tokens[i:i + size + 1] for i in range(0, len(tokens) - 1, size)]
        losses[name] = torch.cat(list(pool.map(lambda window: window_losses(model, window), windows)))
    losses["total"] = torch.cat(list(losses.values()))
    return {name: values.mean().item() for name, values in losses.items()}


def unigram_losses(train: list[list[int]], held_out: dict[str, list[int]]) -> dict[str, float]:
    """The same for a model that knows only how frequent each token is (training counts, plus one)."""
    counts = Counter(token for document in train for token in [EOS, *document])
    log_total = math.log(sum(counts.values()) + VOCAB_SIZE)
    cost = {name: [log_total - math.log(counts[t] + 1) for t in tokens[1:]] for name, tokens in held_out.items()}
    cost["total"] = [c for costs in list(cost.values()) for c in costs]
    return {name: sum(costs) / len(costs) for name, costs in cost.items()}
