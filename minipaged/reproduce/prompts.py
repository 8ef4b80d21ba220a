"""Long prompts: Figure 16, a prefix that all requests share, and Figure 17, rounds of a conversation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from ..simulate.clock import serve
from ..simulate.systems import SYSTEMS
from ..simulate.workloads import lengths, requests
from .paper import Point, curves
from .serving import BASIS, compared, differences, until_late
from .sheet import Curves, Figure, Job, Sheet

# ---- Figure 16 -------------------------------------------------------------------------------------------------------

PREFIXES = {"fig16a": 80, "fig16b": 341}
SENTENCE, TRANSLATION, SPREAD = 28, 42, 0.55  # tokens: means, and the standard deviation of their logarithms
ASSUMED = (f"Assumed, as the paper does not tell: sentences of {SENTENCE} tokens and translations of {TRANSLATION} in the "
           f"mean, log-normal ({SPREAD} standard deviations of the logarithm) and independent, some 21 words each.")


def translations(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of English sentences and of their German translations, [count, 2]; see `ASSUMED`."""
    draw = np.random.default_rng(seed)
    means = np.log([SENTENCE, TRANSLATION]) - SPREAD**2 / 2
    return np.maximum(1, np.rint(draw.lognormal(means, SPREAD, (count, 2)))).astype(int)


def translation_curve(panel: str, system: str, minutes: float) -> list[Point]:
    """A line of Figure 16: LLaMA-13B; vLLM alone keeps the prefix for all."""
    prefix = PREFIXES[panel]
    pairs = translations(5000) + [prefix, 0]
    return until_late(panel, system, lambda rate: serve(
        system, requests(pairs, rate, 60 * minutes), "LLaMA-13B", prefix=prefix).latency)


def figure_16_plan(minutes: float) -> dict[Any, Job]:
    """Two curves in each panel, from a quarter of the time: requests are many."""
    return {(panel, system): Job(translation_curve, (panel, system, minutes / 4))
            for panel in PREFIXES for system in ("vLLM", "Orca (Oracle)")}


def figure_16(found: dict[Any, list[Point]]) -> Sheet:
    """Latency against the request rate with one and with five examples before each sentence."""
    panels, numbers, ratios = [], [], []
    for panel, prefix in PREFIXES.items():
        ours = {system: found[panel, system] for system in ("Orca (Oracle)", "vLLM") if (panel, system) in found}
        panels.append(Curves(f"({panel[-1]}) prefix of {prefix} tokens", "requests/s", "s/token", ours, curves(panel),
                             BASIS, top=1.0))
        rates, divided = compared(panel, ours, ("Orca (Oracle)",), f"{BASIS}; lengths assumed")
        numbers += rates
        ratios += divided
    return Sheet("Figure 16: a shared prefix, LLaMA-13B, translation", panels, numbers + ratios,
                 ["By default a quarter of an hour of arrivals for each point.", ASSUMED,
                  "The paper says 1.67x and 3.58x, from where the curves begin to bend.",
                  "The prefix of 341 tokens ends within a block, which each request copies and goes on in (§4.4); the "
                  "artifact computes those 5 tokens again.", *differences(rates=numbers, ratios=ratios)])


# ---- Figure 17 -------------------------------------------------------------------------------------------------------

WINDOW = 1024  # tokens of the prompt, and of the output
NEW = 0.1  # of the rounds begin a conversation


def rounds(new: float = NEW, count: int = 20_000, seed: int = 0) -> np.ndarray:
    """Prompt and output tokens of the rounds of conversations, [count, 2] (§6.5).

    Questions and answers are ShareGPT's pairs, one after the other; the prompt is the last `WINDOW` tokens of all that
    was said so far and the question.

    Parameters
    ----------
    new : float
        Share of rounds that begin a conversation.
    """
    draw, history, found = random.Random(seed), 0, []
    for question, answer in lengths("ShareGPT")[:count].tolist():
        if draw.random() < new:
            history = 0
        answer = min(answer, WINDOW - 8)  # the artifact leaves 8 of 2048
        found.append((min(history + question, WINDOW), answer))
        history += question + answer
    return np.array(found)


def chat_curve(system: str, minutes: float, new: float = NEW) -> list[Point]:
    """A line of Figure 17."""
    pairs = rounds(new)
    return until_late("fig17", system, lambda rate: serve(system, requests(pairs, rate, 60 * minutes)).latency)


def figure_17_plan(minutes: float) -> dict[Any, Job]:
    """A curve for each system."""
    return {system: Job(chat_curve, (system, minutes)) for system in reversed(SYSTEMS[1:])}


def figure_17(found: dict[Any, list[Point]]) -> Sheet:
    """Latency against the request rate, prompts of up to 1024 tokens."""
    ours = {system: found[system] for system in SYSTEMS[1:] if system in found}
    rates, divided = compared("fig17", ours, SYSTEMS[1:4], BASIS)
    prompts = rounds()[:, 0]
    return Sheet("Figure 17: chatbot, OPT-13B, ShareGPT", [
        Curves("rounds of conversations", "requests/s", "s/token", ours, curves("fig17"), BASIS, top=1.0)],
        rates + divided,
        ["The paper says 2x; its figure has 1.4 to 1.6x at any one latency.",
         f"Assumed: one round in {1 / NEW:.0f} begins a conversation, for every system (the artifact's scripts for Orca; "
         f"those for vLLM say one in 2). {np.mean(prompts == WINDOW):.0%} of the prompts are {WINDOW} tokens long.",
         *differences(rates=rates, ratios=divided)])


FIGURES = {
    "fig16": Figure("a prefix that all requests share", figure_16_plan, figure_16),
    "fig17": Figure("rounds of a conversation", figure_17_plan, figure_17),
}
