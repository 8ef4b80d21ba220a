"""The loop: schedule, move blocks, run the model, sample, commit; one iteration a step (§4.3)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

import torch

from . import trace as ev
from .admission import check_params, check_prompt, check_room
from .errors import InvalidConfig, NotIdle, PromptTooLong
from .memory.audit import audit, audit_writes
from .memory.manager import BlockSpaceManager
from .output_processor import OutputProcessor
from .outputs import RequestOutput, output_of
from .params import SamplingParams
from .runner import ModelRunner
from .scheduler import Scheduler
from .sequence import Sequence, SequenceGroup
from .text import Tokens

if TYPE_CHECKING:
    from .params import BeamSearchParams, EngineConfig


class LLMEngine:
    """Serves requests, iteration by iteration.

    Parameters
    ----------
    config : EngineConfig
        The model and the pools.
    trace : Trace
        Receives what the engine does.

    Raises
    ------
    InvalidConfig and the errors of `ModelRunner`
        The configuration does not fit the model or the machine.
    """

    def __init__(self, config: "EngineConfig", trace: ev.Trace = ev.NO_TRACE) -> None:
        self.config = config
        self.runner = ModelRunner(config)
        self.tokens = Tokens(self.runner.tokenizer, config.model)
        self.max_model_len = self.runner.max_model_len
        budget = config.max_num_batched_tokens or max(2560, self.max_model_len)
        if budget < self.max_model_len:
            raise InvalidConfig(f"max_num_batched_tokens is {budget}, less than max_model_len, {self.max_model_len}: "
                                "the longest prompt could never run; raise the one or lower the other")
        if budget < config.max_num_seqs:
            raise InvalidConfig(f"max_num_batched_tokens is {budget}, less than max_num_seqs, {config.max_num_seqs}: "
                                "each sequence takes a token an iteration; raise the one or lower the other")
        self.manager = BlockSpaceManager(config.block_size, self.runner.num_gpu_blocks, self.runner.num_cpu_blocks,
                                         enable_prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(self.manager, config.max_num_seqs, budget, config.preemption_mode, config.chaos,
                                   config.preemption_policy)
        self._request_ids, self._seq_ids = count(), count()
        self.output_processor = OutputProcessor(self.manager, self.tokens, self.runner.eos_token_ids, self._seq_ids)
        self._lock = threading.RLock()
        self._stepping = False
        self._committing: list[SequenceGroup] = []
        self._to_abort: list[SequenceGroup] = []
        # Free blocks that hold NaN already, or were never used: a pool of gigabytes is not touched before it is needed.
        self._clean = set(range(self.manager.device.num_blocks))
        self.record(trace)

    def record(self, trace: ev.Trace) -> None:
        """From now on, tell this trace what happens.

        Raises
        ------
        NotIdle
            A sequence has blocks or waits for them; a trace begins with an empty pool.
        """
        with self._lock:
            if self.manager.block_tables or self.scheduler.has_unfinished:
                raise NotIdle("a trace begins with an empty pool, and here requests are unfinished or prefixes are "
                              "registered; make the LLM with trace=Trace()")
            self.manager.trace = trace
            trace.emit(ev.Start, schema=ev.SCHEMA, model=self.config.model, block_size=self.config.block_size,
                       num_blocks=self.runner.num_gpu_blocks, num_host_blocks=self.runner.num_cpu_blocks,
                       max_model_len=self.max_model_len, bytes_per_token=self.runner.bytes_per_token,
                       attention=self.runner.backend.name,
                       attention_reason=f"{self.runner.backend.reason}; {self.runner.linears}")

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
        check_prompt(token_ids, self.runner.vocab_size, self.max_model_len)
        check_params(params, self.runner.vocab_size, self.config.max_num_seqs)
        self._check_room(token_ids, params, self.manager.device.num_blocks - self.manager.num_pinned)

    def _check_room(self, token_ids: list[int], params: "SamplingParams | BeamSearchParams", blocks: int) -> None:
        check_room(len(token_ids), self._max_len(token_ids, params), params, self.config.block_size,
                   self.manager.num_pinned_full(token_ids), blocks)

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
        with self._lock, _uninterrupted():
            request_id = next(self._request_ids)
            seq = Sequence(next(self._seq_ids), list(token_ids), len(token_ids),
                           detokenizer=self.tokens.stream(token_ids))
            seed = (self.config.seed * 1_000_003 + request_id) * 1_009 % 2**63  # apart by more than any n
            if isinstance(params, SamplingParams):
                seed = seed if params.seed is None else params.seed
                if not params.greedy:
                    seq.generator = torch.Generator(self.runner.device).manual_seed(seed)
            group = SequenceGroup(request_id, [seq], params, prompt, self._max_len(token_ids, params), seed)
            self.manager.trace.emit(ev.Add, request=request_id, seq=seq.seq_id, token_ids=list(token_ids),
                                    texts=[self.tokens.text_of(token) for token in token_ids])
            self.scheduler.add(group)
        return group

    def abort(self, *groups: SequenceGroup) -> None:
        """End requests now; their blocks are free when this returns. A finished request stays as it is."""
        with self._lock, _uninterrupted():
            if self._stepping:  # the garbage collector closes a forgotten stream in the middle of an iteration
                self._to_abort += groups
            else:
                self._abort(groups)

    def _abort(self, groups: Iterable[SequenceGroup]) -> None:
        for group in groups:
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
        with self._lock:
            self.check(token_ids, params)
            if len(token_ids) > self.max_model_len - 2:
                raise PromptTooLong(f"the prefix has {len(token_ids)} tokens, max_model_len is {self.max_model_len}; "
                                    f"give at most {self.max_model_len - 2}, so that prompts can go on behind it")
            left = self.manager.device.num_blocks - self.manager.num_pinned - self.manager.blocks_for(len(token_ids))
            for group in self.scheduler.unfinished:
                self._check_room(group.prompt_token_ids, group.params, left)
            group = self.add_request(token_ids, params)
            try:
                while not group.num_generated:
                    self.step()
                with _uninterrupted():
                    reader = group.seqs[0].fork(next(self._seq_ids))
                    self.manager.trace.emit(ev.Fork, request=group.request_id, parent=group.seqs[0].seq_id,
                                            seq=reader.seq_id)
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

        An interrupt waits for the end of the iteration. If anything else fails in it, no block is lost, and the
        requests that it ran are recomputed; if it fails while tokens are being committed, which cannot be done twice,
        they are aborted.
        """
        with self._lock, _uninterrupted():
            self._stepping = True
            try:
                return self._step() if self.scheduler.has_unfinished else []
            except BaseException:
                self._abort(self._committing)
                self.scheduler.recover()
                raise
            finally:
                self._stepping, self._committing = False, []
                self._abort(self._to_abort)
                self._to_abort = []

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Hold iterations back while somebody reads what the last one left."""
        with self._lock:
            yield

    def snapshot(self, groups: list[SequenceGroup]) -> list[RequestOutput]:
        """These requests as one iteration left them all."""
        with self._lock:
            return [output_of(group) for group in groups]

    @torch.inference_mode()
    def _step(self) -> list[SequenceGroup]:
        self.manager.trace.begin_step()
        out = self.scheduler.schedule()
        if self.config.audit:
            self._clean &= set(self.manager.device.free_list)
            audit_writes(self.manager, out.seqs)
        cache = self.runner.cache
        cache.swap_out(out.blocks_to_swap_out)
        cache.swap_in(out.blocks_to_swap_in)
        cache.copy_blocks(out.blocks_to_copy)
        groups = [group for group, _ in out.scheduled]
        if groups:
            logits = self.runner.run(out.seqs, [self.manager.get_block_table(seq) for seq in out.seqs])
            self._committing = groups
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
