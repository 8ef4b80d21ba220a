"""The loop: schedule, move blocks, run the model, sample, commit; one iteration a step (§4.3)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

import torch

from . import trace as ev
from .errors import (EmptyPrompt, InvalidConfig, InvalidParams, InvalidPrompt, PromptTooLong, RequestTooLarge,
                     TokenOutOfVocabulary)
from .memory.audit import audit, audit_writes
from .memory.manager import BlockSpaceManager
from .output_processor import OutputProcessor
from .params import SamplingParams
from .runner import ModelRunner
from .scheduler import Scheduler
from .sequence import Sequence, SequenceGroup
from .text import Tokens

if TYPE_CHECKING:
    from .params import BeamSearchParams, EngineConfig
    from .trace import Trace


class LLMEngine:
    """Serves requests, iteration by iteration.

    Parameters
    ----------
    config : EngineConfig
        The model and the pools.
    trace : Trace or None
        Receives what the engine does.

    Raises
    ------
    InvalidConfig and the errors of `ModelRunner`
        The configuration does not fit the model or the machine.
    """

    def __init__(self, config: "EngineConfig", trace: "Trace | None" = None) -> None:
        self.config, self.trace = config, trace
        self.runner = ModelRunner(config)
        self.tokens = Tokens(self.runner.tokenizer, config.model)
        self.max_model_len = self.runner.max_model_len
        budget = config.max_num_batched_tokens or max(2560, self.max_model_len)
        if budget < self.max_model_len:
            raise InvalidConfig(f"max_num_batched_tokens is {budget}, less than max_model_len, {self.max_model_len}: "
                                "the longest prompt could never run; raise the one or lower the other")
        self.manager = BlockSpaceManager(config.block_size, self.runner.num_gpu_blocks, self.runner.num_cpu_blocks,
                                         enable_prefix_caching=config.enable_prefix_caching, trace=trace)
        self.scheduler = Scheduler(self.manager, config.max_num_seqs, budget, config.preemption_mode, config.chaos)
        self._request_ids, self._seq_ids = count(), count()
        self.output_processor = OutputProcessor(self.manager, self.tokens, self.runner.eos_token_ids, self._seq_ids,
                                                trace)
        self._lock = threading.RLock()
        self._clean: set[int] = set()  # free blocks that hold NaN already
        self._tell(ev.Start, schema=ev.SCHEMA, model=config.model, block_size=config.block_size,
                   num_blocks=self.runner.num_gpu_blocks, num_host_blocks=self.runner.num_cpu_blocks,
                   max_model_len=self.max_model_len, bytes_per_token=self.runner.bytes_per_token,
                   attention=self.runner.attention, attention_reason=self.runner.attention_reason)

    # ---- requests --------------------------------------------------------------------------------------------

    def check(self, token_ids: list[int], params: "SamplingParams | BeamSearchParams") -> None:
        """Refuse a request that could never be served, before anything is allocated.

        Raises
        ------
        EmptyPrompt, TokenOutOfVocabulary, PromptTooLong, InvalidPrompt
            The prompt.
        InvalidParams
            A token id or a number of log probabilities outside the vocabulary.
        RequestTooLarge
            At full length it has more blocks than the pool.
        """
        vocab = self.runner.vocab_size
        if not token_ids:
            raise EmptyPrompt("the prompt has no token; give at least one")
        for token in token_ids:
            if not isinstance(token, int):
                raise InvalidPrompt(f"a token id is {token!r}; give whole numbers")
            if not 0 <= token < vocab:
                raise TokenOutOfVocabulary(f"token id {token} is not in the model's vocabulary of {vocab} tokens")
        if len(token_ids) >= self.max_model_len:
            raise PromptTooLong(f"the prompt has {len(token_ids)} tokens and max_model_len is {self.max_model_len}; "
                                f"give at most {self.max_model_len - 1}, so that one can be generated")
        if isinstance(params, SamplingParams):
            if any(not 0 <= t < vocab for t in params.stop_token_ids or []) or (params.logprobs or 0) > vocab:
                raise InvalidParams(f"stop_token_ids {params.stop_token_ids} and logprobs {params.logprobs} must lie "
                                    f"within the vocabulary of {vocab} tokens")
        elif params.beam_width > vocab:
            raise InvalidParams(f"beam_width is {params.beam_width} and the vocabulary has {vocab} tokens; "
                                "give a smaller width")
        if params.width > self.config.max_num_seqs:
            raise RequestTooLarge(f"the request runs {params.width} sequences and max_num_seqs is "
                                  f"{self.config.max_num_seqs}; lower the one or raise the other")
        self._check_room(token_ids, params, self.manager.device.num_blocks - self.manager.num_pinned)

    def _check_room(self, token_ids: list[int], params: "SamplingParams | BeamSearchParams", blocks: int) -> None:
        """Refuse what would not fit if it were alone with the pinned prefixes; with this, nobody waits for ever.

        The prompt's full blocks are needed once, all others for each sequence; those of a registered prefix are there.
        """
        longest = self._max_len(token_ids, params) - 1  # the keys and values of the last token are never needed
        total = self.manager.blocks_for(longest)
        shared = total if longest == len(token_ids) else len(token_ids) // self.config.block_size
        needed = shared + params.width * (total - shared) - self.manager.num_pinned_full(token_ids)
        if needed > blocks:
            raise RequestTooLarge(f"{len(token_ids)} prompt tokens and max_tokens {params.max_tokens} for "
                                  f"{params.width} sequences need {needed} blocks of {self.config.block_size}, and the "
                                  f"pool has {blocks}; lower max_tokens or raise num_gpu_blocks_override")

    def add_request(self, token_ids: list[int], params: "SamplingParams | BeamSearchParams",
                    prompt: str | None = None) -> SequenceGroup:
        """Queue a request.

        Parameters
        ----------
        token_ids : list[int]
            The prompt.
        prompt : str or None
            Its text, to be given back with the output.

        Raises
        ------
        The errors of `check`.
        """
        self.check(token_ids, params)
        with self._lock:
            request_id = next(self._request_ids)
            seq = Sequence(next(self._seq_ids), list(token_ids), len(token_ids), detokenizer=self.tokens.stream())
            seed = (self.config.seed * 1_000_003 + request_id) * 1_009 % 2**63  # apart by more than any n
            if isinstance(params, SamplingParams):
                seed = seed if params.seed is None else params.seed
                if params.temperature > 0:
                    seq.generator = torch.Generator(self.runner.device).manual_seed(seed)
            group = SequenceGroup(request_id, [seq], params, prompt, self._max_len(token_ids, params), seed)
            if self.trace is not None:
                self._tell(ev.Add, request=request_id, seq=seq.seq_id, token_ids=list(token_ids),
                           texts=[self.tokens.text_of(token) for token in token_ids])
            self.scheduler.add(group)
        return group

    def abort(self, group: SequenceGroup) -> None:
        """End a request now; its blocks are free when this returns. A finished request stays as it is."""
        with self._lock, _uninterrupted():
            for seq in group.unfinished:
                self.output_processor.finish(group, seq, "abort")
            self.scheduler.remove(group)

    def register_prefix(self, token_ids: list[int]) -> None:
        """Compute a prefix once and keep its blocks for all prompts that begin with it (§4.4).

        Its last block need not be full: a prompt that goes on in it gets a copy of it. The blocks stay until the
        engine is closed.

        Parameters
        ----------
        token_ids : list[int]
            The prefix, as it stands at the beginning of the prompts.

        Raises
        ------
        The errors of `check`; RequestTooLarge also if a request in the queues would have no room beside it.
        """
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        self.check(token_ids, params)
        left = self.manager.device.num_blocks - self.manager.num_pinned - self.manager.blocks_for(len(token_ids))
        for group in self.scheduler.unfinished:
            self._check_room(group.seqs[0].token_ids[:group.seqs[0].prompt_len], group.params, left)
        group = self.add_request(token_ids, params)
        try:
            while not group.num_generated:
                self.step()
            reader = group.seqs[0].fork(next(self._seq_ids))
            self._tell(ev.Fork, request=group.request_id, parent=group.seqs[0].seq_id, seq=reader.seq_id)
            self.manager.fork(group.seqs[0], reader)
            self.manager.prefixes[reader.seq_id] = list(token_ids)
        finally:
            self.abort(group)

    def _max_len(self, token_ids: list[int], params: "SamplingParams | BeamSearchParams") -> int:
        longest = self.max_model_len
        return longest if params.max_tokens is None else min(longest, len(token_ids) + params.max_tokens)

    # ---- one iteration ---------------------------------------------------------------------------------------

    def step(self) -> list[SequenceGroup]:
        """Run one iteration; returns the requests that got a token, none if none waits or runs.

        An interrupt waits for the end of the iteration. If anything else fails half-way, every request that was
        running goes back to the waiting queue to be recomputed: no request and no block is lost.
        """
        with self._lock, _uninterrupted():
            try:
                return self._step() if self.scheduler.has_unfinished else []
            except BaseException:
                self.scheduler.recover()
                raise

    @torch.inference_mode()
    def _step(self) -> list[SequenceGroup]:
        if self.trace is not None:
            self.trace.step += 1
            self._tell(ev.Begin)
        out = self.scheduler.schedule()
        if self.config.audit:
            audit_writes(self.manager, out.seqs)
        cache = self.runner.cache
        cache.swap_out(out.blocks_to_swap_out)
        cache.swap_in(out.blocks_to_swap_in)
        cache.copy_blocks(out.blocks_to_copy)
        groups = [group for group, _ in out.scheduled]
        if groups:
            logits = self.runner.run(out.seqs, [self.manager.get_block_table(seq) for seq in out.seqs])
            self.output_processor.process(out.scheduled, logits)
        for group in groups:
            if group.finished:
                self.scheduler.remove(group)
        if self.config.audit:
            self._audit()
        return groups

    def _audit(self) -> None:
        audit(self.manager)
        free = set(self.manager.device.free_list)
        self.runner.cache.poison(sorted(free - self._clean))
        self._clean = free

    def _tell(self, event: type[ev.Event], **what: object) -> None:
        if self.trace is not None:
            self.trace.emit(event, **what)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C (a notebook's stop button) until the block ends.

    Python delivers it to the main thread alone, so elsewhere, and where it has no handler (at interpreter exit), there
    is nothing to hold back.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            before(*caught[-1])
