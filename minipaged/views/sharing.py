"""Who shares which blocks (§4.4): the block tables as a tree, in which tables that begin alike have one branch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import TraceError
from ..replay import MemoryState, replay, until_run
from ..trace import Allocate, Copy, Event, Finish, Fork, Free
from .frame import labels, visible
from .text import CELL, cut, elided

DETAILED, SMALL = 28, 8  # so many blocks of so many slots are drawn with their tokens; else runs of blocks in one box
MAX_COLUMNS = 9          # of a drawing
MAX_ROOTS = 32           # branches that have nothing in common; of more, only the blocks are counted


@dataclass
class Node:
    """A physical block, behind those that the tables which name it have before it.

    Attributes
    ----------
    block, host : int, bool
        Its number, and in which pool.
    readers : int
        Its reference count after the iteration.
    mark : str
        "new", "copy of 3" or "freed", if the iteration did that.
    words : list[str]
        What is in its filled slots, as `visible` shows it.
    ends : list[str]
        The sequences whose tables end here, and what became of them.
    children : list[Node]
        The blocks that follow in these tables.
    """

    block: int
    host: bool
    readers: int = 0
    mark: str = ""
    words: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)


@dataclass(frozen=True)
class Sharing:
    """The blocks after an iteration, with those that its choices set free.

    Attributes
    ----------
    step, block_size : int
        The iteration, and the slots of a block.
    roots : list[Node]
        The first blocks of all tables.
    entries, used : int
        Blocks of the device without sharing, that is, entries of its tables; and blocks in use.
    news : list[str]
        Who forked and who ended.
    """

    step: int
    block_size: int
    roots: list[Node]
    entries: int
    used: int
    news: list[str]


def sharing_of(events: list[Event], step: int | None = None) -> Sharing:
    """The tree after so many iterations (None: after all).

    Raises
    ------
    TraceError
        There is no such step.
    """
    step = events[-1].step if step is None else step
    if not 0 <= step <= events[-1].step:
        raise TraceError(f"step {step}: this trace has the steps 0 to {events[-1].step}")
    earlier = [event for event in events if event.step < step]
    here = [event for event in events if event.step == step]
    running, after = replay(earlier + here[:until_run(here)] if step else here), replay(earlier + here)
    roots: list[Node] = []
    for state in (after, running):  # what ended in this iteration is what only the earlier of the two moments has
        for seq in state.tables:
            if state is after or seq not in after.tables:
                _grow(roots, state, seq, _end(after, seq, here))
    for node in every(roots):
        _mark(node, after, here)
    tables = [table for seq, table in after.tables.items() if not after.on_host(seq)]
    return Sharing(step, after.start.block_size, roots, sum(map(len, tables)), sum(map(bool, after.ref_counts)), _news(after, here))


def _grow(roots: list[Node], state: MemoryState, seq: int, end: str) -> None:
    """Add a sequence's table to the tree."""
    level, host, node = roots, state.on_host(seq), None
    for logical, block in enumerate(state.tables[seq]):
        node = next((node for node in level if (node.block, node.host) == (block, host)), None)
        if node is None:
            level.append(node := Node(block, host))
        words = list(map(visible, state.slots(seq, logical)))
        node.words = max(node.words, words, key=len)  # who has filled most knows all that is in it
        level = node.children
    if node is not None:
        node.ends.append(end)


def _end(state: MemoryState, seq: int, here: list[Event]) -> str:
    """A sequence's name, and what this iteration made of it."""
    names = labels(state)
    forked = [f" (fork of {names[event.parent]})" for event in here if isinstance(event, Fork) and event.seq == seq]
    ended = [f" ({event.reason})" for event in here if isinstance(event, Finish) and event.seq == seq]
    return "".join([names[seq], *forked, *ended])


def _mark(node: Node, after: MemoryState, here: list[Event]) -> None:
    counts = after.host_ref_counts if node.host else after.ref_counts
    node.readers = counts[node.block]
    if not node.readers:
        node.mark = "freed"
    elif not node.host:
        copied = [f"copy of {event.src}" for event in here if isinstance(event, Copy) and event.dst == node.block]
        taken = ["new" for event in here if isinstance(event, Allocate) and event.block == node.block]
        node.mark = (copied + taken + [""])[0]


def _news(state: MemoryState, here: list[Event]) -> list[str]:
    names, freed = labels(state), {event.seq for event in here if isinstance(event, Free)}
    forks = [f"{names[event.seq]} forks from {names[event.parent]}" for event in here
             if isinstance(event, Fork) and event.seq in state.tables]
    ends = [f"{names[event.seq]} ends ({event.reason})" for event in here
            if isinstance(event, Finish) and event.seq in freed]
    copies = [f"{names[event.seq]} copies block {event.src} to {event.dst}" for event in here if isinstance(event, Copy)]
    return copies + forks + ends


def every(nodes: list[Node]) -> Iterator[Node]:
    """These blocks and all behind them."""
    for node in nodes:
        yield node
        yield from every(node.children)


# ---- what both renderings show: a run of blocks that have the same readers is one box, if blocks are many -------------

@dataclass
class Run:
    """Blocks one behind the other with the same readers and the same mark.

    Attributes
    ----------
    nodes : list[Node]
        At least one.
    children : list[Run]
        What follows; empty if it would not fit.
    hidden : int
        Blocks that follow and are not in ``children``.
    """

    nodes: list[Node]
    children: list["Run"]
    hidden: int = 0

    @property
    def last(self) -> Node:
        """The block at the end of the run."""
        return self.nodes[-1]


def is_detailed(tree: Sharing) -> bool:
    """Whether each block gets a box of its own with its tokens."""
    small = tree.block_size <= SMALL and sum(1 for _ in every(tree.roots)) <= DETAILED
    return small and _depth(tree.roots) <= MAX_COLUMNS - 2


def runs_of(nodes: list[Node], single: bool, room: int = 10**6) -> list[Run]:
    """The tree as runs, each of a single block if wanted, in so many columns."""
    runs = []
    for node in nodes:
        chain = [node]
        while not single and len(chain[-1].children) == 1 and not chain[-1].ends and _alike(chain[-1]):
            chain += chain[-1].children
        behind = chain[-1].children
        fits = room > 1
        runs.append(Run(chain, runs_of(behind, single, room - 1) if fits else [],
                        0 if fits else sum(1 for _ in every(behind))))
    return runs


def _alike(node: Node) -> bool:
    [child] = node.children
    return (child.readers, child.mark, child.host) == (node.readers, node.mark, node.host)


def _depth(nodes: list[Node]) -> int:
    return max((1 + _depth(node.children) for node in nodes), default=0)


def summary(tree: Sharing) -> str:
    """One line: the measure of §6.3, blocks saved by sharing over the blocks without sharing."""
    when = f"after iteration {tree.step}" if tree.step else "before the first iteration"
    if not tree.entries:
        return f"{when}: no block in use"
    saved = tree.entries - tree.used
    return (f"{when}: {tree.used} blocks in use, {tree.entries} without sharing; "
            f"sharing saves {saved} of {tree.entries} ({(200 * saved + tree.entries) // (2 * tree.entries)}%)")


def name_of(run: Run) -> str:
    """What a box is called."""
    what = ("host " if run.last.host else "") + ("block " if len(run.nodes) == 1 else "blocks ")
    return what + elided([node.block for node in run.nodes])


def count_of(run: Run) -> str:
    """Its reference count, and what the iteration did to it."""
    return run.last.mark if run.last.mark == "freed" else f"×{run.last.readers} {run.last.mark}".strip()


# ---- as text ---------------------------------------------------------------------------------------------------------

def render(tree: Sharing) -> str:
    """A block a line, or a run of blocks: its place in the tree, its reference count, who ends there, its tokens."""
    detailed = is_detailed(tree)
    lines = [line for run in runs_of(tree.roots[:MAX_ROOTS], detailed) for line in _lines(run, detailed)]
    widths = [max(map(len, column)) for column in list(zip(*lines))[:3]]
    body = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[3]]).rstrip() for line in lines]
    parts = [summary(tree), "; ".join(tree.news), "\n".join(body), left_out(tree)]
    return "\n\n".join(part for part in parts if part)


def _lines(run: Run, detailed: bool, indent: str = "", branch: str = "", below: str = "") -> Iterator[list[str]]:
    words = " | ".join(cut(word, CELL) for word in run.last.words) if detailed else ""
    yield [indent + branch + name_of(run), count_of(run), ", ".join(run.last.ends), words]
    for child in run.children:
        last = child is run.children[-1]
        yield from _lines(child, detailed, indent + below, *(("└─ ", "   ") if last else ("├─ ", "│  ")))


def left_out(tree: Sharing) -> str:
    """A line on the branches that are not shown."""
    blocks = sum(1 for _ in every(tree.roots[MAX_ROOTS:]))
    return f"{blocks} blocks of {len(tree.roots) - MAX_ROOTS} more branches are not shown" if blocks else ""
