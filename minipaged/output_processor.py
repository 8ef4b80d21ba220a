"""What new tokens do to requests: samples fork, beams fork and die, sequences end (§4.4, §5.2)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
import torch

from . import trace as ev
from .beam import Candidate, best_candidates, is_done, split_candidates
from .memory.manager import BlockSpaceManager
from .params import BeamSearchParams
from .sampling import Logprob, Sampled, sample
from .sequence import Sequence, SequenceGroup, Status
from .text import Tokens

class OutputProcessor:
    """Turns the logits of an iteration into longer, forked and finished sequences.

    Parameters
    ----------
    manager : BlockSpaceManager
        Told to fork and free; its trace is told of forks, samples and ends.
    tokens : Tokens
        Text of tokens.
    eos_token_ids : set[int]
        The model's end-of-sequence tokens.
    seq_ids : Iterator[int]
        Numbers for forked sequences.
    """

    def __init__(self, manager: BlockSpaceManager, tokens: Tokens, eos_token_ids: set[int],
                 seq_ids: Iterator[int]) -> None:
        self.manager, self.tokens, self.eos_token_ids = manager, tokens, eos_token_ids
        self._seq_ids = seq_ids

    def process(self, scheduled: list[tuple[SequenceGroup, list[Sequence]]], logits: torch.Tensor) -> None:
        """Commit one iteration.

        Parameters
        ----------
        scheduled : list[tuple[SequenceGroup, list[Sequence]]]
            What ran.
        logits : Tensor [sequences, vocabulary] float32
            After the last token of each sequence.
        """
        draws: list[tuple[SequenceGroup, Sequence, int]] = []
        beams: list[tuple[SequenceGroup, list[Sequence], int]] = []
        row = 0
        for group, seqs in scheduled:
            for seq in seqs:
                self.manager.mark_computed(seq)
                seq.num_computed = len(seq.token_ids)
                seq.block_table = self.manager.get_block_table(seq).copy()
            if isinstance(group.params, BeamSearchParams):
                beams.append((group, seqs, row))
            else:
                draws += [(group, seq, row + i) for i, seq in enumerate(seqs)]
                if len(group.seqs) < group.width:  # the prompt has just been computed
                    children = [self._sample_fork(group, index) for index in range(1, group.width)]
                    group.seqs += children
                    draws += [(group, child, row) for child in children]
            row += len(seqs)
        for group, seqs, row in beams:
            self._beam_step(group, group.params, seqs, logits[row:row + len(seqs)].log_softmax(-1))
        if draws:
            groups, seqs, rows = zip(*draws)
            chosen = logits if rows == tuple(range(len(logits))) else logits[list(rows)]  # all: no copy
            for group, seq, token in zip(groups, seqs, sample(chosen, seqs, [g.params for g in groups],
                                                              self.eos_token_ids)):
                self._append(group, seq, token)

    # ---- samples ---------------------------------------------------------------------------------------------

    def _sample_fork(self, group: SequenceGroup, index: int) -> Sequence:
        child = self._fork(group, group.seqs[0])
        child.generator = torch.Generator(group.seqs[0].generator.device).manual_seed(group.seed + index)
        return child

    def _fork(self, group: SequenceGroup, parent: Sequence) -> Sequence:
        child = parent.fork(next(self._seq_ids))
        self.manager.trace.emit(ev.Fork, request=group.request_id, parent=parent.seq_id, seq=child.seq_id)
        self.manager.fork(parent, child)
        return child

    def _append(self, group: SequenceGroup, seq: Sequence, token: Sampled) -> None:
        new_text = self._extend(seq, token.token_id, token.logprob)
        if token.ranked:
            seq.logprobs.append({t: Logprob(lp, rank, self.tokens.text_of(t)) for t, lp, rank in token.ranked})
        reason = self._finish_reason(group, seq, len(new_text))
        if reason is not None:
            self.finish(group, seq, reason)

    def _extend(self, seq: Sequence, token_id: int, logprob: float) -> str:
        """Add a token; returns the text that it completes."""
        seq.token_ids.append(token_id)
        seq.cumulative_logprob += logprob
        new_text = seq.detokenizer.push(token_id)
        seq.text += new_text
        self.manager.trace.emit(ev.Sample, seq=seq.seq_id, token_id=token_id, text=self.tokens.text_of(token_id),
                        logprob=round(logprob, 4))
        return new_text

    def _finish_reason(self, group: SequenceGroup, seq: Sequence, new_chars: int) -> str | None:
        p, token = group.params, seq.token_ids[-1]
        if seq.num_generated >= p.min_tokens:
            if token in self.eos_token_ids and not p.ignore_eos:
                return "stop"
            if token in (p.stop_token_ids or []):
                seq.text, seq.stop_reason = seq.text[:len(seq.text) - new_chars], token
                return "stop"
            for stop in p.stop_strings:
                found = seq.text.find(stop, max(0, len(seq.text) - new_chars - len(stop) + 1))
                if found >= 0:
                    seq.text, seq.stop_reason = seq.text[:found], stop
                    return "stop"
        return "length" if len(seq.token_ids) >= group.max_len else None

    # ---- beams -----------------------------------------------------------------------------------------------

    def _beam_step(self, group: SequenceGroup, p: BeamSearchParams, seqs: list[Sequence],
                   logprobs: torch.Tensor) -> None:
        eos = set() if p.ignore_eos else self.eos_token_ids
        at_end = seqs[0].num_generated + 1 + seqs[0].prompt_len >= group.max_len
        candidates = best_candidates(logprobs, [seq.cumulative_logprob for seq in seqs],
                                     max(2, 1 + len(eos)) * p.beam_width)
        ended = [at_end or candidate.token_id in eos for candidate in candidates]
        running, finished = split_candidates(candidates, ended, p.beam_width)
        for candidate in finished:
            self._add_hypothesis(group, p, seqs[candidate.parent], candidate,
                                 "stop" if candidate.token_id in eos else "length")
        if not running or is_done(group, p, running[0].cumulative_logprob, seqs[0].num_generated + 1):
            for seq in seqs:
                self.finish(group, seq, "dropped")
            group.seqs = [seq for _, seq in group.hypotheses]
        else:
            self.advance_beams(group, seqs, running)

    def _add_hypothesis(self, group: SequenceGroup, p: BeamSearchParams, parent: Sequence, candidate: Candidate,
                        reason: str) -> None:
        """Keep a finished candidate, if it is among the best; it needs no blocks any more."""
        score = candidate.cumulative_logprob / (parent.num_generated + 1) ** p.length_penalty
        if len(group.hypotheses) == p.beam_width and score <= group.hypotheses[-1][0]:
            return
        seq = parent.fork(next(self._seq_ids))
        self.manager.trace.emit(ev.Fork, request=group.request_id, parent=parent.seq_id, seq=seq.seq_id)
        self._extend(seq, candidate.token_id, candidate.cumulative_logprob - parent.cumulative_logprob)
        self.finish(group, seq, reason)
        insort(group.hypotheses, (score, seq), key=lambda hypothesis: -hypothesis[0])
        del group.hypotheses[p.beam_width:]

    def advance_beams(self, group: SequenceGroup, seqs: list[Sequence], running: list[Candidate]) -> None:
        """Replace the running beams: the first child of a beam continues it, further ones fork it, and a beam without
        children frees its blocks (§4.4, Figure 9).

        Parameters
        ----------
        seqs : list[Sequence]
            The running beams; `Candidate.parent` counts in it.
        running : list[Candidate]
            Those that replace them, the best first.
        """
        survivors: dict[int, Sequence] = {}
        children = []
        for candidate in running:  # forked before any token is added, so that all of a beam's children begin alike
            parent = seqs[candidate.parent]
            children.append(self._fork(group, parent) if candidate.parent in survivors else parent)
            survivors[candidate.parent] = parent
        for index, seq in enumerate(seqs):
            if index not in survivors:
                self.finish(group, seq, "dropped")
        for seq, candidate in zip(children, running):
            self._extend(seq, candidate.token_id, candidate.cumulative_logprob - seq.cumulative_logprob)
            seq.cumulative_logprob = candidate.cumulative_logprob  # not a sum of differences: rounding would add up
        group.seqs = children

    # ---- the end ---------------------------------------------------------------------------------------------

    def finish(self, group: SequenceGroup, seq: Sequence, reason: str) -> None:
        """End a sequence: its blocks go back, its text is completed."""
        self.manager.free(seq)
        seq.status, seq.finish_reason = Status.FINISHED, reason
        if seq.stop_reason is None and reason != "abort":
            seq.text += seq.detokenizer.rest(seq)
        seq.detokenizer = seq.generator = None
        self.manager.trace.emit(ev.Finish, request=group.request_id, seq=seq.seq_id, reason=reason)
