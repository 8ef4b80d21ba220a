"""Records which beams go on from which, in real beam searches of tiny-opt: `minipaged/data/beams.json.gz`.

    python -m minipaged.reproduce.record_beams

The simulator has no model, and lengths alone do not tell where beams part; it replays these records.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from ..trace import Add, Begin, Event, Finish, Fork, Trace

WIDTHS = (2, 4, 6)
PROMPTS = 2 * (12, 16, 20, 24, 32, 48, 64, 96, 8, 14, 18, 22, 28, 40, 128, 256)  # tokens
TOKENS = 768  # generated in each search
FILE = Path(__file__).parent.parent / "data" / "beams.json.gz"
ABOUT = ("Which beams go on from which. By beam width, one text per search: for each iteration so many digits, the "
         "i-th of them the number of the beam that beam i goes on from. A beam that goes on keeps its number; its "
         "further children take the numbers of beams that die.")
SOURCE = (f"{len(PROMPTS)} beam searches of {TOKENS} tokens per width by minipaged's engine with tiny-opt, end tokens "
          "ignored, after prompts that the model itself wrote (behind its end token, temperature 1, seed 0, 1, ...), "
          f"of {', '.join(map(str, PROMPTS))} tokens. Made by python -m minipaged.reproduce.record_beams.")


def parents(events: Iterable[Event], request: int, width: int) -> str:
    """The digits of one beam search that no other request held up, out of the forks and ends in its trace: `ABOUT`.

    The last iteration has none, as nothing goes on from its tokens.
    """
    number: dict[int, int] = {}  # of each running beam, by sequence
    digits = ""
    for _, iteration in groupby(events, attrgetter("step")):
        here = [event for event in iteration if getattr(event, "request", request) == request]
        forks, ends = ([event for event in here if isinstance(event, kind)] for kind in (Fork, Finish))
        number |= {event.seq: 0 for event in here if isinstance(event, Add)}
        if not any(isinstance(event, Begin) for event in here) or any(end.reason == "length" for end in ends):
            continue
        free = [number.pop(end.seq) for end in ends] or range(1, width)  # the first forks find no beam dead
        goes_on_from = {slot: number[fork.parent] for slot, fork in zip(free, forks)}
        number |= {fork.seq: slot for slot, fork in zip(free, forks)}
        digits += "".join(str(goes_on_from.get(beam, beam)) for beam in range(width))
    return digits


def record() -> dict[str, object]:
    """Run the searches, all of a width together."""
    from .. import LLM, BeamSearchParams, SamplingParams

    found: dict[str, object] = {"about": ABOUT, "source": SOURCE}
    for width in WIDTHS:
        with LLM("tiny-opt", num_gpu_blocks_override=16_384, trace=(trace := Trace())) as llm:
            writing = [SamplingParams(max_tokens=length, ignore_eos=True, seed=seed)
                       for seed, length in enumerate(PROMPTS)]
            written = llm.generate([[llm.get_tokenizer().eos_token_id]] * len(PROMPTS), writing)
            trace.events.clear()
            llm.generate([output.outputs[0].token_ids for output in written],
                         BeamSearchParams(beam_width=width, max_tokens=TOKENS, ignore_eos=True), use_tqdm=True)
        requests = [event.request for event in trace.events if isinstance(event, Add)]
        found[str(width)] = [parents(trace.events, request, width) for request in requests]
    return found


if __name__ == "__main__":
    FILE.write_bytes(gzip.compress(json.dumps(record(), indent=0).encode(), mtime=0))
