"""Requests and the sequences they grow into (§4.5: "sequence groups")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory.table import BlockTable
    from .params import BeamSearchParams, SamplingParams
    from .text import Detokenizer


class Status(Enum):
    """Where a sequence is; the scheduler moves it (§4.5)."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One row of tokens, its progress, and what was sampled on the way.

    Attributes
    ----------
    seq_id : int
        Unique in the engine; the key of its block table.
    token_ids : list[int]
        Prompt and output, one list.
    prompt_len : int
        How many of ``token_ids`` are the prompt's.
    num_computed : int
        Leading tokens whose keys and values are in the cache. While a sequence decodes this is all but the token
        sampled last, whose KV the next iteration computes (§4.3).
    block_table : BlockTable or None
        A copy of its table as the last iteration that ran it used it, for showing.
    generator : torch.Generator or None
        The randomness of this sequence alone, so that a batch never changes its draws.
    """

    seq_id: int
    token_ids: list[int]
    prompt_len: int
    num_computed: int = 0
    status: Status = Status.WAITING
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Any]] = field(default_factory=list)
    generator: Any = None
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    detokenizer: Detokenizer | None = None
    block_table: BlockTable | None = None

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.prompt_len:]

    @property
    def num_generated(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_new(self) -> int:
        """Tokens that the next iteration has to run through the model."""
        return len(self.token_ids) - self.num_computed

    @property
    def finished(self) -> bool:
        """Whether it generates no more."""
        return self.status is Status.FINISHED

    def fork(self, seq_id: int) -> Sequence:
        """A sequence with the same tokens and progress; its blocks are the manager's to share."""
        return replace(self, seq_id=seq_id, token_ids=list(self.token_ids), logprobs=list(self.logprobs),
                       detokenizer=self.detokenizer and self.detokenizer.fork())


@dataclass(eq=False)
class SequenceGroup:
    """The sequences of one request, scheduled and preempted together (§4.5).

    Attributes
    ----------
    request_id : int
        Counts up in order of arrival: first come, first served reads it as the arrival time.
    max_len : int
        Tokens that a sequence of it may reach, prompt and output.
    seed : int
        Sample i draws from a generator seeded ``seed + i``.
    hypotheses : list[tuple[float, Sequence]]
        Beam search: the best finished sequences so far with their scores, the best first.
    """

    request_id: int
    seqs: list[Sequence]
    params: SamplingParams | BeamSearchParams
    prompt: str | None
    max_len: int
    seed: int
    hypotheses: list[tuple[float, Sequence]] = field(default_factory=list)

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt, which all its sequences begin with."""
        return self.seqs[0].token_ids[:self.seqs[0].prompt_len]

    @property
    def width(self) -> int:
        """Sequences that run at the same time once the prompt is through."""
        return self.params.width

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that still generate."""
        return [seq for seq in self.seqs if seq.status is not Status.FINISHED]

    @property
    def num_generated(self) -> int:
        """Generated tokens of all its sequences."""
        return sum(seq.num_generated for seq in self.seqs)

    @property
    def finished(self) -> bool:
        """Whether all its sequences are done."""
        return all(seq.finished for seq in self.seqs)
