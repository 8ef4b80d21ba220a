"""The beam step: which candidates go on, and which are finished (§4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .params import BeamSearchParams
    from .sequence import SequenceGroup


@dataclass(frozen=True)
class Candidate:
    """One more token for one beam.

    Attributes
    ----------
    parent : int
        Index of the beam among the running ones.
    cumulative_logprob : float
        Of the beam with this token.
    """

    parent: int
    token_id: int
    cumulative_logprob: float


def best_candidates(logprobs: torch.Tensor, cumulative: list[float], count: int) -> list[Candidate]:
    """The ``count`` most likely extensions of all running beams together, the best first.

    Parameters
    ----------
    logprobs : Tensor [beams, vocabulary] float32
        Log probabilities of the next token.
    cumulative : list[float]
        Cumulative log probability of each beam.
    """
    vocab = logprobs.shape[1]
    scores = (logprobs + torch.tensor(cumulative, device=logprobs.device)[:, None]).flatten()  # [beams * vocabulary]
    best = scores.topk(min(count, len(scores)))
    return [Candidate(index // vocab, index % vocab, score)
            for score, index in zip(best.values.tolist(), best.indices.tolist())]


def split_candidates(candidates: list[Candidate], ended: list[bool], width: int,
                     ) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates that run on, and candidates that finish now.

    A candidate that ends finishes only if it is among the ``width`` best; the others are there so that enough are left
    to run on.
    """
    running = [c for c, end in zip(candidates, ended) if not end][:width]
    finished = [c for c, end in zip(candidates[:width], ended) if end]
    return running, finished


def is_done(group: "SequenceGroup", params: "BeamSearchParams", best_running: float, generated: int) -> bool:
    """Whether no running beam can improve on the finished ones, as `BeamSearchParams` defines it.

    Parameters
    ----------
    best_running : float
        Cumulative log probability of the best running beam.
    generated : int
        Tokens that it has generated.
    """
    if len(group.hypotheses) < params.beam_width:
        return False
    if params.early_stopping is True:
        return True
    if params.early_stopping == "never" and params.length_penalty > 0:
        generated = group.max_len - group.seqs[0].prompt_len
    return best_running / generated ** params.length_penalty <= group.hypotheses[-1][0]
