"""What the benchmark asks for: requests of random lengths, of a model in a real one's geometry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

REQUESTS = 32
MEAN_PROMPT, MEAN_OUTPUT, SHORTEST, LONGEST = 80, 100, 4, 512  # tokens
RANDOM = "opt-125m"  # random weights in this model's geometry: speed does not depend on what the weights say


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once.

    Attributes
    ----------
    prompts : list[list[int]]
        Token ids.
    output_lens : list[int]
        Tokens to generate for each, no fewer.
    """

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Tokens to generate for all."""
        return sum(self.output_lens)

    def blocks(self, block_size: int) -> list[int]:
        """KV blocks of each request at its full length."""
        return [-(-(len(prompt) + output) // block_size) for prompt, output in zip(self.prompts, self.output_lens)]


def make_workload(vocab_size: int, requests: int = REQUESTS) -> Workload:
    """The same requests every time: lognormal lengths, those of all prompts drawn first, and random token ids."""
    rng = np.random.default_rng(0)

    def lengths(mean: int) -> list[int]:
        """One for each request, lognormal with this mean and sigma 1, clipped."""
        drawn = rng.lognormal(np.log(mean) - 0.5, 1.0, requests)
        return np.clip(np.round(drawn), SHORTEST, LONGEST).astype(int).tolist()

    prompt_lens, output_lens = lengths(MEAN_PROMPT), lengths(MEAN_OUTPUT)
    return Workload([rng.integers(4, vocab_size, n).tolist() for n in prompt_lens], output_lens)


def make_checkpoint(folder: Path) -> str:
    """Save a model with random weights in the geometry of facebook/opt-125m; returns the folder as a string."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig()).save_pretrained(folder)  # whose defaults are that model's
    return str(folder)
