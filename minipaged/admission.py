"""Which requests are refused when they arrive, before anything is allocated."""

from __future__ import annotations

from .errors import EmptyPrompt, InvalidParams, InvalidPrompt, PromptTooLong, RequestTooLarge, TokenOutOfVocabulary
from .params import BeamSearchParams, SamplingParams


def check_prompt(token_ids: list[int], vocab_size: int, max_model_len: int) -> None:
    """Refuse a prompt that the model cannot read and go on from.

    Raises
    ------
    EmptyPrompt, TokenOutOfVocabulary, PromptTooLong, InvalidPrompt
        Each with what to give instead.
    """
    if not token_ids:
        raise EmptyPrompt("the prompt has no token; give at least one")
    for token in token_ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise InvalidPrompt(f"a token id is {token!r}; give whole numbers")
        if not 0 <= token < vocab_size:
            raise TokenOutOfVocabulary(f"token id {token} is not in the model's vocabulary of {vocab_size} tokens")
    if len(token_ids) >= max_model_len:
        raise PromptTooLong(f"the prompt has {len(token_ids)} tokens and max_model_len is {max_model_len}; "
                            f"give at most {max_model_len - 1}, so that one can be generated")


def check_params(params: SamplingParams | BeamSearchParams, vocab_size: int, max_num_seqs: int) -> None:
    """Refuse parameters that do not go with the model or the engine.

    Raises
    ------
    InvalidParams
        A token id, a number of log probabilities or a beam width beyond the vocabulary.
    RequestTooLarge
        More sequences than one iteration runs.
    """
    if isinstance(params, SamplingParams):
        if any(not 0 <= token < vocab_size for token in params.stop_token_ids or []):
            raise InvalidParams(f"stop_token_ids {params.stop_token_ids} must lie within the vocabulary of "
                                f"{vocab_size} tokens")
        if (params.logprobs or 0) > vocab_size:
            raise InvalidParams(f"logprobs is {params.logprobs} and the vocabulary has {vocab_size} tokens; "
                                "ask for fewer")
    elif params.beam_width > vocab_size:
        raise InvalidParams(f"beam_width is {params.beam_width} and the vocabulary has {vocab_size} tokens; "
                            "give a smaller width")
    if params.width > max_num_seqs:
        raise RequestTooLarge(f"the request runs {params.width} sequences and max_num_seqs is {max_num_seqs}; "
                              "lower the one or raise the other")


def check_room(prompt_len: int, max_len: int, params: SamplingParams | BeamSearchParams, block_size: int,
               blocks_there: int, blocks: int) -> None:
    """Refuse what would not fit even alone; with this, nobody waits for ever.

    The prompt's full blocks are needed once, all others for each sequence. The keys and values of a sequence's last
    token are never needed.

    Parameters
    ----------
    max_len : int
        Tokens that a sequence may reach, prompt and output.
    blocks_there : int
        Full blocks that the prompt finds in a registered prefix.
    blocks : int
        Blocks of the pool that no prefix pins.

    Raises
    ------
    RequestTooLarge
        With the numbers.
    """
    total = -(-(max_len - 1) // block_size)
    shared = total if max_len - 1 == prompt_len else prompt_len // block_size
    needed = shared + params.width * (total - shared) - blocks_there
    if needed > blocks:
        raise RequestTooLarge(f"{prompt_len} prompt tokens and max_tokens {params.max_tokens} for {params.width} "
                              f"sequences need {needed} blocks of {block_size}, and the pool has {blocks}; "
                              "lower max_tokens or raise num_gpu_blocks_override")
