"""Preemption without need, so that tests and notebooks meet it at any step and by either way."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Literal

from .errors import InvalidConfig

if TYPE_CHECKING:
    from .sequence import SequenceGroup


class Chaos:
    """Chooses running requests to preempt before an iteration.

    Parameters
    ----------
    rate : float
        Probability that a running request is preempted in an iteration, in [0, 1).
    at : dict[int, list[int]] or None
        Iteration (from 1) to the requests preempted in it, by their number in order of arrival.
    how : "swap", "recompute" or "either"
        By which way; "either" tosses a coin.
    seed : int
        Of the choices.

    Raises
    ------
    InvalidConfig
        The rate is out of range (at 1 nothing would ever finish), or the way unknown.
    """

    def __init__(self, rate: float = 0.0, at: dict[int, list[int]] | None = None,
                 how: Literal["swap", "recompute", "either"] = "either", seed: int = 0) -> None:
        if not 0 <= rate < 1 or how not in ("swap", "recompute", "either"):
            raise InvalidConfig(f"chaos with rate {rate} and how {how!r}; give a rate in [0, 1), and swap, recompute "
                                "or either")
        self.rate, self.at, self.how = rate, at or {}, how
        self._random = random.Random(seed)

    def victims(self, iteration: int, running: Items["SequenceGroup"],
                ) -> list[tuple["SequenceGroup", Literal["swap", "recompute"]]]:
        """Whom to preempt now, and how."""
        chosen = [group for group in running
                  if group.request_id in self.at.get(iteration, ()) or self._random.random() < self.rate]
        return [(group, self._random.choice(("swap", "recompute")) if self.how == "either" else self.how)
                for group in chosen]
