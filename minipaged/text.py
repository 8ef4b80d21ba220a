"""Text to tokens and, token by token, back."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING

from .errors import InvalidPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .sequence import Sequence


CONTEXT = 5  # tokens of the prompt before the output that decoding starts with


class Tokens:
    """A model's tokenizer, or its absence: a checkpoint without one still runs on token ids.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or None
        With a Rust backend, as all supported models have.
    model : str
        For messages.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", model: str) -> None:
        self.tokenizer, self._model = tokenizer, model
        self._texts: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around it.

        Raises
        ------
        InvalidPrompt
            The model came without a tokenizer.
        """
        if self.tokenizer is None:
            raise InvalidPrompt(f"{self._model} has no tokenizer; give the prompt as a list of token ids")
        return self.tokenizer(text)["input_ids"]

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, without special ones; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself, special tokens included."""
        if token_id not in self._texts:
            self._texts[token_id] = f"<{token_id}>" if self.tokenizer is None else self.tokenizer.decode([token_id])
        return self._texts[token_id]

    def stream(self, prompt_token_ids: Iterable[int] = ()) -> "Detokenizer":
        """A decoder for the output behind a prompt."""
        return Detokenizer(self, list(prompt_token_ids)[-CONTEXT:])


class Detokenizer:
    """Decodes the output of one sequence as it grows, without special tokens.

    A character may take several tokens; its text comes with the last of them. And a token's text may depend on whether
    it stands at the beginning: so decoding starts a few tokens before the output.
    """

    def __init__(self, tokens: Tokens, before: list[int]) -> None:
        self._tokens, self._before = tokens, before
        if tokens.tokenizer is not None:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(ids=before, skip_special_tokens=True)

    def fork(self) -> "Detokenizer":
        """A decoder in the same state, for a fork of the sequence."""
        other = copy(self)
        if self._tokens.tokenizer is not None:
            other._stream = copy(self._stream)
        return other

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if self._tokens.tokenizer is None:
            return ""
        return self._stream.step(self._tokens.tokenizer.backend_tokenizer, token_id) or ""

    def rest(self, seq: "Sequence") -> str:
        """What is still held back when a sequence ends in the middle of a character."""
        whole = self._tokens.decode(self._before + seq.output_token_ids)[len(self._tokens.decode(self._before)):]
        return whole[len(seq.text):] if whole.startswith(seq.text) else ""
