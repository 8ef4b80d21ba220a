"""Be the scheduler: choose who gives way at each shortage of blocks, and by which way, and be scored (§4.5).

The scheduler and the block manager are the real ones; a clock takes the place of the model, so that a whole run takes
milliseconds and a choice can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Items
from statistics import fmean
from typing import NamedTuple

from .. import trace as ev
from ..errors import InvalidConfig
from ..memory.manager import BlockSpaceManager
from ..params import SamplingParams
from ..scheduler import PreemptionMode, PreemptionPolicy, Scheduler, SchedulerOutputs
from ..sequence import Sequence, SequenceGroup

Table = tuple[list[str], list[tuple[object, ...]], str]  # as `display.text_table` and `html_table` take it
Choice = tuple[str, str]  # name of the request that gives way, "A" the first to arrive; "swap" or "recompute"
WAYS = ("recompute", "swap")


class Arrival(NamedTuple):
    """A request: when it arrives in ms, the tokens of its prompt, and those that it will generate."""

    time: float
    prompt: int
    output: int


class Machine(NamedTuple):
    """Milliseconds that things take: OPT-13B on an A100 with blocks of 64 tokens.

    An iteration takes ``step`` and ``sequence`` for each of its sequences, a fit to the decoding rates of Figure 1.
    Figure 19a has 38.3 ms for recomputing 256 tokens, 16.7 ms for swapping them out and 18.2 ms for swapping them in.
    """

    step: float = 25.6
    sequence: float = 0.44
    prompt_token: float = 38.3 / 256
    block_out: float = 16.7 / 4
    block_in: float = 18.2 / 4

    def milliseconds(self, out: SchedulerOutputs) -> float:
        """How long an iteration takes, with all that goes before it."""
        prompt_tokens = sum(seq.num_new for seq in out.seqs if not seq.num_computed)
        return (self.step + self.sequence * len(out.seqs) + self.prompt_token * prompt_tokens
                + self.block_out * len(out.blocks_to_swap_out) + self.block_in * len(out.blocks_to_swap_in))


class Game(NamedTuple):
    """Requests in order of arrival, and the pool and the machine that serve them."""

    arrivals: Items[Arrival]
    num_blocks: int
    block_size: int = 64
    machine: Machine = Machine()


class Score(NamedTuple):
    """What a run cost; of everything less is better.

    Attributes
    ----------
    mean, worst : float
        Of the requests' normalized latencies, ms from arrival to end per generated token (§6.1).
    run_again : int
        Tokens whose keys and values were computed once more.
    blocks_moved : int
        Swapped out or in.
    """

    mean: float
    worst: float
    run_again: int
    blocks_moved: int


class Played(NamedTuple):
    """A run, as far as the choices lead.

    Attributes
    ----------
    options : list[str]
        At the shortage that waits for the next choice, the running requests; empty if all requests were served.
    score : Score or None
        None as long as a choice is wanted.
    latencies : dict[str, float]
        Normalized latency of each request that was served.
    time : float
        Milliseconds so far.
    step : int
        The last whole iteration: that before the shortage.
    trace : Trace
        All that happened, to be looked at like any other.
    """

    options: list[str]
    score: Score | None
    latencies: dict[str, float]
    time: float
    step: int
    trace: ev.Trace


def play(game: Game, choices: Items[Choice] = (), then: PreemptionPolicy | None = None) -> Played:
    """Serve the requests; the same choices always lead to the same run.

    Parameters
    ----------
    choices : sequence of (request, way)
        One for each shortage, in order: who gives way, "A" is who came first, and "recompute" or "swap".
    then : PreemptionPolicy or None
        Decides when the choices are used up, as `first_come_first_served` does. None: the run stops at that shortage.

    Raises
    ------
    InvalidConfig
        A choice names no running request or no way, or there are more choices than shortages.
    """
    return _Run(game, list(choices), then).play()


def first_come_first_served(way: PreemptionMode) -> PreemptionPolicy:
    """The latest request gives way (§4.5), always by this way."""
    return lambda running: (running[-1], way)


def every_choice(game: Game, choices: tuple[Choice, ...] = ()) -> Iterator[tuple[tuple[Choice, ...], Score]]:
    """All ways to play a game to its end, with their scores: many, unless shortages are few."""
    played = play(game, choices)
    if played.score is not None:
        yield choices, played.score
    for name in played.options:
        for way in WAYS:
            yield from every_choice(game, (*choices, (name, way)))


def score_table(scores: dict[str, Score]) -> Table:
    """Several scores by name, one below the other."""
    rows = [(name, f"{score.mean:.1f}", f"{score.worst:.1f}", score.run_again, score.blocks_moved)
            for name, score in scores.items()]
    header = ["", "mean ms/token", "worst ms/token", "tokens run again", "blocks moved"]
    return header, rows, "of everything less is better"


def situation(game: Game, played: Played) -> Table:
    """Each request: where it is, what it has generated, and what giving way would cost it by either way.

    This is what a scheduler knows: not how many tokens are still to come.
    """
    state, machine = played.trace.state(played.step), game.machine
    rows = []
    for number, arrival in enumerate(game.arrivals):
        name, status = name_of(number), state.status.get(number, "not here yet")
        generated = len(state.tokens[number]) - arrival.prompt if number in state.tokens else 0
        prompt = f"{arrival.prompt} + {generated}" if number in state.tokens else ""
        again = moved = ""
        if name in played.options:
            tokens, blocks = state.num_tokens[number], len(state.tables[number])
            again = f"{tokens} tokens again, {machine.prompt_token * tokens:.0f} ms"
            moved = f"{blocks} blocks out and in, {(machine.block_out + machine.block_in) * blocks:.0f} ms"
        elif name in played.latencies:
            status = f"done: {played.latencies[name]:.1f} ms/token"
        rows.append((name, status, prompt, again, moved))
    header = ["request", "where", "prompt + generated", "by recomputation", "by swapping"]
    return header, rows, headline(played)


def headline(played: Played) -> str:
    """What the run has come to, in a sentence."""
    seconds = f"after {played.time / 1000:.2f} s"
    if not played.options:
        return f"All requests are served, {seconds}."
    return f"Iteration {played.step + 1}, {seconds}: too few free blocks. Who gives way, {', '.join(played.options)}?"


def name_of(number: int) -> str:
    """A for the request that arrives first, then B, C, …"""
    return chr(ord("A") + number)


class _Undecided(Exception):
    """A shortage without a choice for it; carries the names of the running requests."""


class _Run:
    """One run of a game."""

    def __init__(self, game: Game, choices: list[Choice], then: PreemptionPolicy | None) -> None:
        self.game, self.choices, self.then, self.trace = game, choices[::-1], then, ev.Trace()
        manager = BlockSpaceManager(game.block_size, game.num_blocks, game.num_blocks, watermark=0, trace=self.trace)
        self.scheduler = Scheduler(manager, len(game.arrivals), max_num_batched_tokens=10**9, policy=self._choose)
        self.arriving = list(enumerate(game.arrivals))[::-1]
        self.time, self.latencies = 0.0, {}
        self.run_again = self.blocks_moved = 0
        self.trace.emit(ev.Start, schema=ev.SCHEMA, model="a clock", block_size=game.block_size,
                        num_blocks=game.num_blocks, num_host_blocks=game.num_blocks, max_model_len=10**9,
                        bytes_per_token=0, attention="none", attention_reason="a clock takes its place")

    def play(self) -> Played:
        """Run until all requests are served, or a shortage comes for which no choice was made."""
        options: list[str] = []
        try:
            while self.arriving or self.scheduler.has_unfinished:
                self._arrive()
                self._iterate()
        except _Undecided as shortage:
            options = shortage.args[0]
        if not options and self.choices:
            raise InvalidConfig(f"all requests were served before the choices {self.choices[::-1]}; leave these out")
        found = self.latencies.values()
        score = None if options else Score(fmean(found), max(found), self.run_again, self.blocks_moved)
        return Played(options, score, self.latencies, self.time, self.trace.step - bool(options), self.trace)

    def _choose(self, running: list[SequenceGroup]) -> tuple[SequenceGroup, PreemptionMode | None]:
        by_name = {name_of(group.request_id): group for group in running}
        if not self.choices:
            if self.then is None:
                raise _Undecided(list(by_name))
            return self.then(running)
        name, way = self.choices.pop()
        if name not in by_name or way not in WAYS:
            raise InvalidConfig(f"the choice is {name!r}, {way!r}; give one of {', '.join(by_name)}, and 'recompute' "
                                "or 'swap'")
        return by_name[name], way

    def _arrive(self) -> None:
        if not self.scheduler.has_unfinished:
            self.time = max(self.time, self.arriving[-1][1].time)
        while self.arriving and self.arriving[-1][1].time <= self.time:
            number, arrival = self.arriving.pop()
            seq = Sequence(number, [0] * arrival.prompt, arrival.prompt)
            self.scheduler.add(SequenceGroup(number, [seq], SamplingParams(), None, arrival.prompt + arrival.output, 0))
            self.trace.emit(ev.Add, request=number, seq=number, token_ids=list(seq.token_ids),
                            texts=[f"{name_of(number)}{position}" for position in range(arrival.prompt)])

    def _iterate(self) -> None:
        self.trace.begin_step()
        out = self.scheduler.schedule()
        self.time += self.game.machine.milliseconds(out)
        self.blocks_moved += len(out.blocks_to_swap_out) + len(out.blocks_to_swap_in)
        for group, (seq,) in out.scheduled:
            if seq.num_generated and not seq.num_computed:
                self.run_again += len(seq.token_ids) - 1  # the newest would run in any case
            seq.num_computed = len(seq.token_ids)
            self.trace.emit(ev.Sample, seq=seq.seq_id, token_id=0, logprob=0.0,
                            text=f"{name_of(group.request_id)}{len(seq.token_ids)}")
            seq.token_ids.append(0)
            if len(seq.token_ids) == group.max_len:
                self._end(group, seq)

    def _end(self, group: SequenceGroup, seq: Sequence) -> None:
        arrival = self.game.arrivals[group.request_id]
        self.latencies[name_of(group.request_id)] = (self.time - arrival.time) / arrival.output
        self.trace.emit(ev.Finish, request=group.request_id, seq=seq.seq_id, reason="length")
        self.scheduler.remove(group)
