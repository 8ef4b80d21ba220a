"""What a request gives back: vLLM's `RequestOutput` and `CompletionOutput`."""

from __future__ import annotations

from dataclasses import dataclass

from .display import Shown
from .memory.table import BlockTable
from .params import BeamSearchParams, SamplingParams
from .sampling import Logprob
from .sequence import Sequence, SequenceGroup
from .text import Tokens


@dataclass(frozen=True)
class CompletionOutput:
    """One sequence of a request.

    Attributes
    ----------
    index : int
        Which of the request's sequences.
    text : str
        The generated text, without special tokens and without the stop token or text. While the request runs, the last
        characters are held back, as many as may turn out to begin a stop text.
    token_ids : list[int]
        The generated tokens, an end-of-sequence token included.
    cumulative_logprob : float
        Sum of the tokens' log probabilities under the model.
    logprobs : list[dict[int, Logprob]] or None
        Per token; None unless asked for.
    finish_reason : str or None
        "stop", "length", "abort", or None while it runs.
    stop_reason : int, str or None
        The stop token or text that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, repr=False)
class RequestOutput(Shown):
    """A request, as far as it has come.

    Attributes
    ----------
    request_id : str
        Counts up in order of arrival.
    prompt : str or None
        The text; None if it was given as token ids.
    prompt_token_ids : list[int]
        What the model read.
    outputs : list[CompletionOutput]
        One per sequence.
    finished : bool
        Whether all of them are done.
    block_tables : list[BlockTable]
        The block table of each sequence, as it was in the last iteration that ran it; empty before the first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    block_tables: list[BlockTable]

    def _rows(self) -> tuple[list[str], list[tuple[object, ...]], str]:
        rows = [(o.index, len(o.token_ids), o.finish_reason or "running", repr(o.text)) for o in self.outputs]
        prompt = f"{len(self.prompt_token_ids)} token ids" if self.prompt is None else repr(self.prompt)
        return ["output", "tokens", "finish reason", "text"], rows, f"request {self.request_id}: {prompt}"


@dataclass(frozen=True)
class BeamSearchSequence:
    """One result of a beam search.

    Attributes
    ----------
    tokens : list[int]
        Prompt and generated tokens.
    text : str
        The same as text, without special tokens.
    cum_logprob : float
        Cumulative log probability of the generated tokens.
    score : float
        That, over the generated length to the power of the length penalty; what the results are ordered by.
    finish_reason : str
        "stop" at the end-of-sequence token, or "length".
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    finish_reason: str


@dataclass(frozen=True, repr=False)
class BeamSearchOutput(Shown):
    """The results of a beam search, the best first."""

    sequences: list[BeamSearchSequence]

    def _rows(self) -> tuple[list[str], list[tuple[object, ...]]]:
        return ["beam", "score", "text"], [(i, f"{s.score:.4f}", repr(s.text)) for i, s in enumerate(self.sequences)]


def output_of(group: SequenceGroup) -> RequestOutput:
    """A snapshot of a request; later iterations do not change it."""
    seqs = group.seqs
    if isinstance(group.params, SamplingParams) and group.params.n < group.width:
        seqs = sorted(seqs, key=lambda seq: -seq.cumulative_logprob)[:group.params.n]
    outputs = [_completion(index, seq, group.params) for index, seq in enumerate(seqs)]
    tables = [seq.block_table.copy() for seq in seqs if seq.block_table is not None]
    return RequestOutput(str(group.request_id), group.prompt, group.prompt_token_ids, outputs, group.finished, tables)


def beam_output_of(group: SequenceGroup, tokens: Tokens) -> BeamSearchOutput:
    """The results of a finished beam search."""
    return BeamSearchOutput([
        BeamSearchSequence(seq.token_ids, tokens.decode(seq.token_ids), seq.cumulative_logprob, score,
                           seq.finish_reason)
        for score, seq in group.hypotheses])


def _completion(index: int, seq: Sequence, params: SamplingParams | BeamSearchParams) -> CompletionOutput:
    text, logprobs = seq.text, None
    if isinstance(params, SamplingParams):
        held = 0 if seq.finished else max(map(len, params.stop_strings), default=1) - 1
        text = text[:len(text) - held]
        logprobs = None if params.logprobs is None else list(seq.logprobs)
    return CompletionOutput(index, text, seq.output_token_ids, seq.cumulative_logprob, logprobs, seq.finish_reason,
                            seq.stop_reason)
