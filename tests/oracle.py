"""transformers' own ``generate`` on the same weights, one prompt at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import minipaged

TIE = 1e-4


class Oracle:
    """A model as transformers runs it, without minipaged.

    Parameters
    ----------
    source : str
        A checkpoint folder, or "tiny-opt".
    """

    def __init__(self, source: str) -> None:
        if source == "tiny-opt":
            source = str(Path(minipaged.__file__).parent / "tiny_opt")
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        eos = self.model.generation_config.eos_token_id
        self.eos = set(eos) if isinstance(eos, list) else {eos}
        self._known: dict[tuple, object] = {}

    def _generate(self, prompt: list[int], **options: object) -> object:
        ids = torch.tensor([prompt])
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The greedy continuation of one prompt alone."""
        key = ("greedy", tuple(prompt), max_tokens)
        if key not in self._known:
            out = self._generate(prompt, max_new_tokens=max_tokens, do_sample=False)
            self._known[key] = out[0, len(prompt):].tolist()
        return self._known[key]

    def sampled(self, prompt: list[int], max_tokens: int, seed: int, **options: float) -> list[int]:
        """The continuation sampled alone after ``torch.manual_seed(seed)``; top_k is off unless given."""
        key = ("sampled", tuple(prompt), max_tokens, seed, tuple(options.items()))
        if key not in self._known:
            torch.manual_seed(seed)
            out = self._generate(prompt, max_new_tokens=max_tokens, do_sample=True, **{"top_k": 0, **options})
            self._known[key] = out[0, len(prompt):].tolist()
        return self._known[key]

    def beams(self, prompt: list[int], width: int, max_tokens: int, **options: object,
              ) -> list[tuple[list[int], float]]:
        """The results of a beam search alone, the best first: generated tokens, and score."""
        key = ("beams", tuple(prompt), width, max_tokens, tuple(options.items()))
        if key not in self._known:
            out = self._generate(prompt, max_new_tokens=max_tokens, do_sample=False, num_beams=width,
                                 num_return_sequences=width, return_dict_in_generate=True, output_scores=True, **options)
            rows = []
            for tokens, beams, score in zip(out.sequences.tolist(), out.beam_indices, out.sequences_scores.tolist()):
                rows.append((tokens[len(prompt):len(prompt) + int((beams >= 0).sum())], score))
            self._known[key] = rows
        return self._known[key]

    def assert_greedy(self, prompt: list[int], got: list[int], max_tokens: int) -> None:
        """``got`` is the greedy continuation; where the two best logits tie within 1e-4 it may follow either."""
        want = self.greedy(prompt, max_tokens)
        if got == want:
            return
        at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        assert at < len(got) and at < len(want), f"lengths differ: {len(got)} and {len(want)}"
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + want[:at]])).logits[0, -1]
        gap = (logits[want[at]] - logits[got[at]]).item()
        assert abs(gap) < TIE, f"token {at} is {got[at]} instead of {want[at]}, whose logit is {gap:.2e} higher"
