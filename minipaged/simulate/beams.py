"""Which beams go on from which, as real beam searches of tiny-opt had it: the simulator's own tokens are all zeros."""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files
from statistics import fmean

from ..errors import InvalidConfig


@cache
def _records() -> dict[str, list[str]]:
    """By beam width, a text of digits per search; `minipaged/data/beams.json.gz` says how they were made."""
    return json.loads(gzip.decompress((files("minipaged") / "data" / "beams.json.gz").read_bytes()))


@cache
def _searches(width: int) -> list[list[list[int]]]:
    """By search and iteration, the parent of each beam."""
    return [[[int(digit) for digit in text[at:at + width]] for at in range(0, len(text), width)]
            for text in _records()[str(width)]]


class RecordedBeams:
    """Decides for `systems.ContinuousBatching` how beams fork and die: request i does as search i of the records did.

    A request longer than a search goes on as the second half of the search did, again and again.

    Parameters
    ----------
    width : int
        Beams of a request.

    Raises
    ------
    InvalidConfig
        There are no records of this width.
    """

    def __init__(self, width: int) -> None:
        if str(width) not in (known := _records()):
            recorded = ", ".join(filter(str.isdigit, known))
            raise InvalidConfig(f"no beam search of width {width} was recorded; give one of {recorded}")
        self._searches = _searches(width)

    def __call__(self, request: int, step: int) -> list[int]:
        """The parent of each beam after ``step`` tokens, as an index into the beams before; all 0 at step 0."""
        search = self._searches[request % len(self._searches)]
        half = len(search) // 2
        return search[step if step < len(search) else half + (step - half) % (len(search) - half)]

    @property
    def mean_survivors(self) -> float:
        """Beams that go on at a token, in the mean over all records."""
        return fmean(len(set(parents)) for search in self._searches for parents in search[1:])
