"""What a user may set: one request's sampling, and the engine. vLLM's names, defaults and meanings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from .chaos import Chaos
from .errors import InvalidConfig, InvalidParams

if TYPE_CHECKING:
    from .sequence import SequenceGroup


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    Parameters
    ----------
    n : int
        Samples to return. They share the prompt's blocks (§4.4); sample i draws from a generator seeded ``seed + i``.
    best_of : int or None
        Samples to draw; the ``n`` with the highest cumulative log probability are returned, the best first. None: n.
    temperature : float
        Below 1e-5 it is greedy decoding; else logits are divided by it.
    top_p : float
        Keep the most likely tokens whose probabilities add up to ``top_p``, in (0, 1].
    top_k : int
        Keep the ``top_k`` most likely tokens; 0 or -1 keeps all.
    max_tokens : int or None
        Tokens to generate at most; None: as many as ``max_model_len`` leaves.
    min_tokens : int
        No end-of-sequence and no stop token before so many generated tokens.
    stop : str or list[str] or None
        Texts that end the request; not part of the output text.
    stop_token_ids : list[int] or None
        Tokens that end the request.
    ignore_eos : bool
        Go on after the model's end-of-sequence token.
    seed : int or None
        The request draws from a generator of its own, seeded so; None: from the engine's seed.
    logprobs : int or None
        Report the log probabilities of so many most likely tokens (and of the chosen one).

    Raises
    ------
    InvalidParams
        An option is out of range.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check(InvalidParams, [
            *_whole(self, "n", "best_of", "top_k", "max_tokens", "min_tokens", "seed", "logprobs"),
            *((isinstance(stop, str) and stop != "", f"stop holds {stop!r}; give texts of one character or more")
              for stop in self.stop_strings),
            (all(isinstance(token, Integral) for token in self.stop_token_ids or []),
             f"stop_token_ids holds {self.stop_token_ids}; give whole numbers")])
        _check(InvalidParams, [
            (self.n >= 1, f"n is {self.n}; give 1 or more samples"),
            (self.width >= self.n, f"best_of is {self.best_of} and n is {self.n}; give best_of >= n"),
            (not self.greedy or self.width == 1,
             f"n or best_of is {self.width} at temperature 0, where all samples are the same; give a temperature"),
            (self.temperature >= 0, f"temperature is {self.temperature}; give 0 (greedy) or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; give a share in (0, 1]"),
            (self.top_k >= -1, f"top_k is {self.top_k}; give a number of tokens, or 0 for all"),
            (self.max_tokens is None or self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; give 1 or more"),
            (self.min_tokens >= 0, f"min_tokens is {self.min_tokens}; give 0 or more"),
            (self.max_tokens is None or self.min_tokens <= self.max_tokens,
             f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; give min_tokens <= max_tokens"),
            (self.logprobs is None or self.logprobs >= 0, f"logprobs is {self.logprobs}; give 0 or more"),
            (self.seed is None or -2**63 <= self.seed <= 2**64 - self.width,
             f"seed is {self.seed}; give one of 64 bits, with room for {self.width} samples above it"),
        ])

    @property
    def width(self) -> int:
        """Sequences that run at the same time once the prompt is through."""
        return self.n if self.best_of is None else self.best_of

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken; vLLM's bound, below which dividing by it is of no use."""
        return self.temperature < 1e-5

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


@dataclass(frozen=True)
class BeamSearchParams:
    """How one request is decoded by beam search (§4.4).

    Parameters
    ----------
    beam_width : int
        Candidates kept at each step, k in the paper, and results returned.
    max_tokens : int
        Tokens to generate at most.
    ignore_eos : bool
        Go on after the model's end-of-sequence token.
    length_penalty : float
        A finished candidate's score is its cumulative log probability over the number of its generated tokens to this
        power, as in transformers (vLLM counts the prompt's tokens too).
    early_stopping : bool or "never"
        When to stop once ``beam_width`` candidates have finished, as in transformers. True: at once. False: when the
        best running one, scored at its present length, is no better than the worst finished one. "never": the same,
        but a positive ``length_penalty`` scores it at its greatest length, so that no better one is missed.

    Raises
    ------
    InvalidParams
        An option is out of range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _check(InvalidParams, _whole(self, "beam_width", "max_tokens"))
        _check(InvalidParams, [
            (self.beam_width >= 1, f"beam_width is {self.beam_width}; give 1 or more"),
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; give 1 or more"),
            (abs(self.length_penalty) <= 10, f"length_penalty is {self.length_penalty}; give -10 to 10"),
            (self.early_stopping in (True, False, "never"),
             f"early_stopping is {self.early_stopping!r}; give True, False or 'never'"),
        ])

    @property
    def width(self) -> int:
        """Sequences that run at the same time once the prompt is through."""
        return self.beam_width


@dataclass(frozen=True)
class EngineConfig:
    """How the engine is built.

    Parameters
    ----------
    model : str
        ``"tiny-opt"`` (bundled), a local folder, or a name on the Hugging Face hub.
    dtype : str
        "auto", "float32", "float16" or "bfloat16". "auto" is the checkpoint's own type on a GPU (float16 where
        that is float32) and float32 on a CPU, where half precision is slower and less exact.
    block_size : int
        Tokens per KV block, B of §4.1, from 1 to 256.
    num_gpu_blocks_override : int or None
        Blocks in the device pool; None: as many as ``gpu_memory_utilization`` allows.
    gpu_memory_utilization : float
        Share of the GPU's memory for weights and KV blocks; activations need the rest. On a CPU, share of the free
        main memory for KV blocks, and at most 4 GiB.
    swap_space : float
        GiB of main memory for swapped-out blocks (§4.5).
    max_model_len : int or None
        Tokens of a sequence at most, prompt and output; None: what the model was made for.
    max_num_seqs : int
        Sequences in one iteration at most.
    max_num_batched_tokens : int or None
        Tokens in one iteration at most; None: 2560, or ``max_model_len`` if that is more.
    seed : int
        Seeds the requests that bring no seed of their own.
    device : str
        "auto", "cpu", "cuda", "cuda:1", …
    attention : str
        "auto", "eager" (Eq. 4 as written), "torch" (plain PyTorch), "cpu" (compiled) or "triton"; "auto" is "triton"
        on a GPU and "cpu" on a CPU.
    enable_prefix_caching : bool
        Find the full blocks of earlier prompts and outputs again, instead of computing them anew (§4.4).
    preemption_mode : "swap", "recompute" or None
        How a request gives way when blocks run out (§4.5). None is vLLM v0.1's rule: a single sequence is recomputed,
        several are swapped.
    preemption_policy : function or None
        Who gives way, and how: gets the running requests in order of arrival, and returns one of them and "swap",
        "recompute" or None. None: the latest, by ``preemption_mode``.
    audit : bool
        Check the books after every step, and poison freed blocks with NaN. Off, unless the environment variable
        MINIPAGED_AUDIT is 1, as under `minipaged lab` and in the tests.
    chaos : Chaos or None
        Preempt without need, for tests and demonstrations.

    Raises
    ------
    InvalidConfig
        An option is out of range.
    """

    model: str
    dtype: str = "auto"
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.9
    swap_space: float = 4.0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    attention: Literal["auto", "eager", "torch", "cpu", "triton"] = "auto"
    enable_prefix_caching: bool = False
    preemption_mode: Literal["swap", "recompute"] | None = None
    preemption_policy: Callable[[list[SequenceGroup]], tuple[SequenceGroup, str | None]] | None = None
    audit: bool = field(default_factory=lambda: os.environ.get("MINIPAGED_AUDIT") == "1")
    chaos: Chaos | None = None

    def __post_init__(self) -> None:
        _check(InvalidConfig, [
            (1 <= self.block_size <= 256, f"block_size is {self.block_size}; give 1 to 256 tokens per block"),
            (0 < self.gpu_memory_utilization <= 1,
             f"gpu_memory_utilization is {self.gpu_memory_utilization}; give a share in (0, 1]"),
            (self.swap_space >= 0, f"swap_space is {self.swap_space}; give GiB, 0 for none"),
            (self.dtype in ("auto", "float32", "float16", "bfloat16"),
             f"dtype is {self.dtype!r}; give auto, float32, float16 or bfloat16"),
            (self.attention in ("auto", "eager", "torch", "cpu", "triton"),
             f"attention is {self.attention!r}; give auto, eager, torch, cpu or triton"),
            (self.preemption_mode in ("swap", "recompute", None),
             f"preemption_mode is {self.preemption_mode!r}; give swap, recompute or None"),
            *((value is None or value >= 1, f"{name} is {value}; give 1 or more") for name, value in vars(self).items()
              if name in ("num_gpu_blocks_override", "max_model_len", "max_num_seqs", "max_num_batched_tokens")),
        ])


def _whole(params: object, *names: str) -> list[tuple[bool, str]]:
    values = {name: getattr(params, name) for name in names}
    return [(value is None or isinstance(value, Integral), f"{name} is {value!r}; give a whole number")
            for name, value in values.items()]


def _check(error: type[Exception], rules: list[tuple[bool, str]]) -> None:
    for holds, message in rules:
        if not holds:
            raise error(message)
