"""From logits to tokens: greedy, or drawn from the sequence's own generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .params import SamplingParams
    from .sequence import Sequence


@dataclass(frozen=True)
class Logprob:
    """Log probability of a token under the model, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class Sampled:
    """The next token of a sequence.

    Attributes
    ----------
    logprob : float
        Of the token, under the model's own distribution (before temperature, top_k and top_p).
    ranked : list[tuple[int, float, int]]
        (token, logprob, rank) of the most likely tokens and of this one; empty unless asked for.
    """

    token_id: int
    logprob: float
    ranked: list[tuple[int, float, int]]


def sample(logits: torch.Tensor, seqs: list["Sequence"], params: list["SamplingParams"],
           eos_token_ids: set[int]) -> list[Sampled]:
    """Choose the next token of every sequence.

    Parameters
    ----------
    logits : Tensor [sequences, vocabulary] float32
        Changed in place where ``min_tokens`` forbids the end.
    seqs, params : lists of the same length
        Row i belongs to ``seqs[i]``, decoded as ``params[i]`` says.
    eos_token_ids : set[int]
        The model's end-of-sequence tokens.
    """
    logprobs = logits.log_softmax(-1)
    for row, (seq, p) in enumerate(zip(seqs, params)):
        if seq.num_generated < p.min_tokens:
            logits[row, sorted(eos_token_ids | set(p.stop_token_ids or []))] = float("-inf")
    # On a CPU numpy's takes a sixth of the time of PyTorch's.
    tokens = (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    for row, (seq, p) in enumerate(zip(seqs, params)):
        if not p.greedy:
            tokens[row] = _draw(logits[row], p, seq.generator)
    chosen = logprobs[torch.arange(len(tokens)), tokens].tolist()
    return [Sampled(token, logprob, _rank(logprobs[row], token, p.logprobs))
            for row, (token, logprob, p) in enumerate(zip(tokens, chosen, params))]


def _draw(logits: torch.Tensor, p: "SamplingParams", generator: torch.Generator) -> int:
    """One draw, with the filters in the order of transformers' ``generate``: temperature, top_k, top_p."""
    logits = logits / p.temperature  # [vocabulary]
    if p.top_k > 0:
        smallest_kept = logits.topk(min(p.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if p.top_p < 1:
        ascending, order = logits.sort()
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - p.top_p
        drop[-1] = False
        logits = logits.masked_fill(drop.scatter(0, order, drop), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).item()


def _rank(logprobs: torch.Tensor, token: int, count: int | None) -> list[tuple[int, float, int]]:
    if count is None:
        return []
    top = logprobs.topk(count)
    ranked = [(t, lp, rank) for rank, (t, lp) in enumerate(zip(top.indices.tolist(), top.values.tolist()), 1)]
    if token not in top.indices:
        ranked.append((token, logprobs[token].item(), int((logprobs > logprobs[token]).sum()) + 1))
    return ranked
