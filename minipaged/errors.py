"""Every error a user can cause, by name; each message says what was wrong and what to do."""

from __future__ import annotations

from typing import Any


class MinipagedError(Exception):
    """Base class of all errors raised on purpose by minipaged."""


class InvalidConfig(MinipagedError, ValueError):
    """An engine option is out of range or does not go with another."""


class InvalidParams(MinipagedError, ValueError):
    """A sampling option is out of range or does not go with another."""


class InvalidPrompt(MinipagedError, ValueError):
    """A prompt of no known form; base class of the other prompt errors."""


class EmptyPrompt(InvalidPrompt):
    """A prompt without a single token."""


class PromptTooLong(InvalidPrompt):
    """A prompt that leaves no room for a generated token within ``max_model_len``."""


class TokenOutOfVocabulary(InvalidPrompt):
    """A token id that the model's embedding does not have."""


class RequestTooLarge(MinipagedError, ValueError):
    """A request that would not fit the block pool even if it were alone in it."""


class UnknownModel(MinipagedError, ValueError):
    """A model name that is neither bundled, nor a folder, nor to be had from the hub."""


class MissingWeights(UnknownModel):
    """A model folder with a configuration and no weights."""


class UnsupportedModel(MinipagedError, ValueError):
    """An architecture whose attention the paged cache cannot hold."""


class OutOfBlocks(MinipagedError, RuntimeError):
    """An allocator was asked for more blocks than it has free."""


class DoubleFree(MinipagedError, RuntimeError):
    """A block without readers was freed."""


class EngineClosed(MinipagedError, RuntimeError):
    """An LLM was used after ``close()``."""


class NotRunning(MinipagedError, LookupError):
    """A sequence was asked for that has no blocks on the device now."""


class NotIdle(MinipagedError, RuntimeError):
    """Something was asked of an engine that is in the middle of its work."""


class AuditError(MinipagedError, AssertionError):
    """The block tables, reference counts and free lists contradict each other."""


class TraceError(MinipagedError, ValueError):
    """A trace file that is truncated, of another schema version, or no trace at all."""


class RequestsRefused(ExceptionGroup, MinipagedError):
    """Some requests of a batch were refused; the others were served.

    Attributes
    ----------
    exceptions : tuple[MinipagedError, ...]
        One named error per refused request.
    outputs : list[RequestOutput | None]
        The served requests in the order of the prompts; None where one was refused.
    """

    outputs: list[Any]

    def derive(self, excs: Any) -> "RequestsRefused":
        """Keep ``outputs`` when ``except*`` splits the group."""
        group = RequestsRefused(self.message, excs)
        group.outputs = self.outputs
        return group
