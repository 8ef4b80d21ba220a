"""The views beside the memory itself: the timeline says of each iteration what the engine did in it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_views import elements
from test_widget import busy
from traces import NASTY, Witness, figure_7, figure_8, request, small_pool_run, start
from workloads import make_workload, run

from minipaged import LLM, SamplingParams, Trace
from minipaged import trace as ev
from minipaged.errors import TraceError
from minipaged.replay import replay
from minipaged.trace import Event
from minipaged.views import View, compare_view, microscope, sharing_view, side_by_side, timeline_view
from minipaged.views.canvas import WIDTH
from minipaged.views.compare import first_difference
from minipaged.views.frame import labels, letters
from minipaged.views.sharing import (MAX_COLUMNS, Node, Run, Sharing, count_of, every, is_detailed, name_of, runs_of,
                                     sharing_of)
from minipaged.views.timeline import LEFT, LOOK, MEANING, RAREST, RIGHT, timeline_of


VIEWS = {"sharing": sharing_view, "timeline": lambda source, step: timeline_view(source)}


def workload_of(seed: int, checkpoint: Callable[[str], str]) -> list[Event]:
    """The trace of a random workload."""
    trace, workload = Trace(), make_workload(seed, lambda name: 512)
    run(workload, checkpoint(workload.name), trace)
    return trace.events


# ---- the timeline ----------------------------------------------------------------------------------------------------

def rows_of(text: str) -> dict[str, str]:
    """What a text timeline shows: name to one character per iteration; numbers are read from top to bottom."""
    body = text.split("\n\n")[1].splitlines()
    found, above = {}, []
    for line in body:
        name, cells = line[:14].strip(), line[14:]
        above.append(cells)
        if name:
            found[name], above = above, []
    length = len(found["device blocks"][-1])
    numbers = {name: [int("".join(row.ljust(length)[i] for row in rows)) for i in range(length)]
               for name, rows in found.items() if " " in name or name == "iteration"}
    return {name: numbers.get(name, rows[0].ljust(length)) for name, rows in found.items()}


def drawn_bars(svg: str, row: int, iterations: int) -> str:
    """The letters that one row of a drawn timeline stands for, read off its bars."""
    scale, found = (RIGHT - LEFT) / iterations, [" "] * iterations
    colours = {colour: letter for letter, (colour, *_) in LOOK.items()}
    tops = {letter: 52 + 96 + 14 + 24 * row + down for letter, (_, down, _) in LOOK.items()}
    for path in elements(svg, "path"):
        letter = colours.get(path.get("fill"))
        for x, y, wide in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", path.get("d")) if letter else ():
            if float(y) == tops[letter]:
                first, count = (float(x) - LEFT) / scale, float(wide) / scale
                assert abs(first - round(first)) < 0.1 and abs(count - round(count)) < 0.1
                found[round(first):round(first) + round(count)] = letter * round(count)
    return "".join(found)


@pytest.mark.parametrize("seed", range(60))
def test_the_timeline_is_what_the_engine_did(monkeypatch: pytest.MonkeyPatch, checkpoint: Callable, seed: int) -> None:
    witness = Witness(monkeypatch)
    events = workload_of(seed, checkpoint)
    line, view = timeline_of(events), timeline_view(events)
    assert len(witness.did) == line.iterations
    for step, did in enumerate(witness.did):
        assert {request: row[step] for request, row in line.rows.items() if row[step] != " "} == did, step + 1
    assert (line.device, line.host) == (witness.device, witness.host)
    shown = rows_of(view.text)
    assert {name: row for name, row in shown.items() if name.isupper()} == {
        letters(request): row for request, row in line.rows.items()}
    assert shown["device blocks"] == line.device and shown.get("host blocks", [0] * len(line.host)) == line.host
    assert shown["iteration"] == list(range(1, line.iterations + 1))
    assert [drawn_bars(view.svg, i, line.iterations) for i in range(len(line.rows))] == list(line.rows.values())
    heights = re.search(r'<path d="M84 148((?:V[\d.]+h[\d.]+)+)V148', view.svg.replace("148.0", "148"))[1]
    most = max(line.start.num_blocks, *line.host, 1)
    drawn = [round((148 - float(y)) / 96 * most, 1) for y in re.findall(r"V([\d.]+)", heights)]
    assert drawn == pytest.approx(line.device, abs=most / 96)


def test_a_swap_and_a_recomputation_over_time() -> None:
    assert timeline_view(small_pool_run().trace).text == """\
5 requests over 30 iterations; at most 11 of 11 physical blocks in use

                       111111111122222222223
iteration     123456789012345678901234567890
A             PDDDDDDDDDDDDD
B             PDDDDDDDDDDDDD
C             PDDDDDDDwwwwwwRDDDDD
D             PDDDDwwwwwwwwwRDDDDDDDD
E             PwwwwwwwwwwwwwRDDwwwRDDDDDDDDD
              1   1111     1111
device blocks 089910117899901118997995566667

P prefill  D decode  w waiting  R recomputed"""


def long_run(steps: int) -> list[Event]:
    """One request that decodes for so many iterations, and is swapped out for one of them, in the middle."""
    out, back = [ev.Preempt(steps // 2, 0, "", "swap"), ev.SwapOut(steps // 2, 0, [[0, 0]])], steps // 2 + 1
    return [start(num_host_blocks=1), *request(0, "a b", [0]),
            *(event for step in range(2, steps + 1) for event in (
                out if step == steps // 2 else [ev.SwapIn(step, 0, [[0, 0]])] * (step == back)
                + [ev.Write(step, 0, 2, 3)]))]


def test_many_iterations_share_a_column_and_nothing_rare_is_lost() -> None:
    view = timeline_view(long_run(2000))
    shown = rows_of(view.text)
    assert shown["A"] == "P" + "D" * 48 + "S" + "D" * 50 and "a column is 20 iterations" in view.text
    assert shown["iteration"] == list(range(1, 2001, 20)) and sum(shown["host blocks"]) == 1
    assert max(map(len, view.text.splitlines())) < 120
    bars = drawn_bars(view.svg, 0, 400)
    assert (bars.count("S"), bars.index("S"), bars[0], set(bars)) == (1, 199, "P", set("PDS"))
    assert set(RAREST) == set(MEANING) and len(view.svg.encode()) < 20_000


def test_many_requests_are_counted() -> None:
    events = busy(2000)
    view, line = timeline_view(events), timeline_of(sorted(events, key=lambda event: event.step))
    rows = re.findall(r"^(\d+)-(\d+) +(\d+) +\d+ +(\d+) +(\d+)$", view.text, re.MULTILINE)
    assert len(rows) == 24 and (rows[0][0], rows[-1][1]) == ("1", "2000")
    for first, last, device, prefill, decode in (map(int, row) for row in rows):
        within = range(first - 1, last)
        assert device == max(line.device[i] for i in within)
        columns = [[row[i] for row in line.rows.values()] for i in within]
        assert [prefill, decode] == [max(column.count(letter) for column in columns) for letter in "PD"]
    assert len(view.svg.encode()) < 20_000 and "prefill" in view.svg and "at most 32" in view.svg


@pytest.mark.parametrize("seqs", [4, 20, 30])
def test_a_drawn_timeline_is_small(seqs: int) -> None:
    view = timeline_view(busy(60, seqs=seqs, blocks=64, size=64))
    assert len(view.svg.encode()) < 20_000
    for text in elements(view.svg, "text"):
        assert all(0 <= float(x) <= WIDTH for x in text.get("x").split())


# ---- the sharing view ------------------------------------------------------------------------------------------------

def paths_of(nodes: list[Node], way: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Each sequence of a tree, with what became of it: its blocks in order, and whether they are on the host."""
    for node in nodes:
        here = (*way, node.block)
        yield from ((end, here, node.host) for end in node.ends)
        yield from paths_of(node.children, here)


def shown_ways(text: str) -> dict[tuple[str, ...], str]:
    """What a text tree shows: the boxes from the root to each line, and what stands behind the last one."""
    found, way = {}, []
    for line in text.splitlines():
        pattern = r"([│├└─ ]*)((?:host )?blocks? [\d …]*\d) +(×\d+(?: new| copy of \d+)?|freed)(?: |$)(.*)"
        if match := re.fullmatch(pattern, line):
            way = [*way[:len(match[1]) // 3], f"{match[2]} {match[3]}"]
            found[tuple(way)] = match[4].strip()
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_is_what_the_engine_holds(monkeypatch: pytest.MonkeyPatch, checkpoint: Callable, seed: int) -> None:
    witness = Witness(monkeypatch)
    events = workload_of(seed, checkpoint)
    for step in random.Random(seed).choices(range(1, len(witness.tables) + 1), k=8):
        tables, counts = witness.tables[step - 1], witness.ref_counts[step - 1]
        in_use = {block for block, count in enumerate(witness.ref_counts[step - 2][0]) if count and step > 1}
        tree, state = sharing_of(events, step), replay(events, step)
        names = labels(state)
        alive = {names[seq]: (tuple(table), state.on_host(seq)) for seq, table in tables.items()}
        shown = {end.split(" ")[0]: (path, host) for end, path, host in paths_of(tree.roots)}
        assert {name: shown[name] for name in alive} == alive, step
        ways = {(host, path[:i]) for path, host in shown.values() for i in range(1, len(path) + 1)}
        assert len(ways) == sum(1 for _ in every(tree.roots)), "one branch for what begins alike"
        for node in every(tree.roots):
            assert node.readers == counts[node.host][node.block] and (node.mark == "freed") == (not node.readers)
        used = {block for block, count in enumerate(counts[0]) if count}
        gone = {node.block for node in every(tree.roots) if node.mark == "freed" and not node.host}
        assert len(used | gone) == witness.device[step - 1], "what the model had, and what was freed after it"
        came = {node.block for node in every(tree.roots) if node.mark.startswith(("new", "copy"))}
        swapped = {block for event in events if isinstance(event, ev.SwapIn) and event.step == step
                   for _, block in event.blocks}
        assert used - in_use - swapped <= came <= used
        entries = sum(len(path) for path, host in alive.values() if not host)
        assert (tree.entries, tree.used) == (entries, len(used))
        view = sharing_view(events, step)
        assert f"{len(used)} blocks in use, {entries} without sharing" in view.text or not entries
        check_tree(view, tree)


def check_tree(view: View, tree: Sharing) -> None:
    """The text and the drawing show each box of the tree, and where it hangs."""
    detailed = is_detailed(tree)

    def boxes(runs: list[Run], way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Run]]:
        for box in runs:
            here = (*way, f"{name_of(box)} {count_of(box)}")
            yield here, box
            yield from boxes(box.children, here)

    shown, wanted = shown_ways(view.text), dict(boxes(runs_of(tree.roots, detailed), ()))
    assert shown.keys() == wanted.keys()
    for way, box in wanted.items():
        assert shown[way].startswith(", ".join(box.last.ends)) and (detailed or "|" not in shown[way])
    counts = [count_of(box) for _, box in boxes(runs_of(tree.roots, detailed, MAX_COLUMNS), ())]
    drawn = [text.text for text in elements(view.svg, "text") if text.get("text-anchor") == "end"]
    assert sorted(drawn) == sorted(counts)


def test_figure_8_as_a_tree() -> None:
    assert sharing_view(figure_8()).text == """\
after iteration 2: 3 blocks in use, 4 without sharing; sharing saves 1 of 4 (25%)

A1 copies block 1 to 3

block 7     ×2                Four | score | and | seven
├─ block 3  ×1 copy of 1  A1  years | ago | our | fathers
└─ block 1  ×1            A2  years | ago | our | mothers"""


def test_a_dropped_beam_is_crossed_out() -> None:
    events = [*figure_8(), ev.Fork(2, 0, 1, 2), ev.Share(2, 2, 0, 7), ev.Share(2, 2, 1, 1), ev.Free(2, 0, [7, 3], False),
              ev.Finish(2, 0, 0, "dropped")]
    view = sharing_view(events)
    assert view.text.endswith("""\
A1 copies block 1 to 3; A3 forks from A2; A1 ends (dropped)

block 7     ×2                          Four | score | and | seven
├─ block 1  ×2     A2, A3 (fork of A2)  years | ago | our | mothers
└─ block 3  freed  A1 (dropped)         years | ago | our | fathers""")
    assert len([path for path in elements(view.svg, "path") if path.get("stroke") == "#d55e00"]) == 1
    assert "freed" not in sharing_view([*events, ev.Begin(3)]).text


@pytest.mark.parametrize(("seqs", "size"), [(2, 4), (8, 16), (30, 64)])
def test_a_drawn_tree_is_small(seqs: int, size: int) -> None:
    events = busy(40, seqs=seqs, blocks=64, size=size)
    for step in (10, 40):
        view = sharing_view(events, step)
        assert len(view.svg.encode()) < 20_000
        assert all(0 <= float(text.get("x")) <= WIDTH for text in elements(view.svg, "text"))


def test_of_very_many_branches_the_rest_is_counted() -> None:
    events = busy(5, seqs=60)
    view, tree = sharing_view(events), sharing_of(events)
    hidden = re.search(r"(\d+) blocks of 28 more branches are not shown", view.text)
    shown = [int(n) for line in re.findall(r"^[│├└─ ]*blocks? ([\d ]+?)  ", view.text, re.MULTILINE) for n in line.split()]
    assert len(shown) + int(hidden[1]) == sum(1 for _ in every(tree.roots)) and hidden[0] in view.svg


# ---- two traces side by side -----------------------------------------------------------------------------------------

def both_ways() -> list[list[Event]]:
    """The same requests in six blocks, where the second is swapped out, and where it is recomputed."""
    traces = {mode: Trace() for mode in ("swap", "recompute")}
    for mode, trace in traces.items():
        with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=6, preemption_mode=mode, trace=trace) as llm:
            llm.generate([list(range(10, 17)), list(range(20, 24))],
                         SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    return [trace.events for trace in traces.values()]


def test_the_first_difference_is_where_the_engine_first_did_something_else() -> None:
    swap, recompute = both_ways()
    first = next(event.step for event in swap if isinstance(event, ev.Preempt))
    assert first_difference((swap, recompute)) == first == 7 and first_difference((swap, list(swap))) is None
    assert first_difference((swap, swap[:-1])) == swap[-1].step, "one of them ends earlier"
    other = [replace(event, num_blocks=99) if isinstance(event, ev.Start) else event for event in swap]
    assert first_difference((swap, other)) is None, "the size of the pool is nothing that happens"
    changed = [replace(event, text="other") if event == swap[-3] else event for event in swap]
    assert isinstance(swap[-3], ev.Sample) and first_difference((swap, changed)) == swap[-3].step


@pytest.mark.parametrize("pane", ["memory", *VIEWS])
def test_both_are_shown_at_the_same_step(pane: str) -> None:
    pair, names = both_ways(), ("swap <b>", "recompute")
    for step, said in ((6, "the first difference is in step 7"), (7, "in this step, 7"), (9, "Different since step 7")):
        view = compare_view(*pair, names=names, step=step, pane=pane)
        assert said in view.text.splitlines()[0] and said in view.svg
        for name, events in zip(names, pair):
            still = microscope(events, step, pane=pane)
            assert f"== {name} ==\n{still!r}" in view.text
        root = ElementTree.fromstring(view.svg)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}svg"))) == 3 and "<b>" not in view.svg


def test_side_by_side_is_stepped_together(tmp_path: Path) -> None:
    pair = both_ways()
    view = side_by_side(*pair, names=("swap", "recompute"), pane="memory")
    assert view.step == 7 and view.last == max(events[-1].step for events in pair)
    assert repr(view) == compare_view(*pair, names=("swap", "recompute"), pane="memory").text
    view.step = view.last
    with pytest.raises(TraceError, match="the steps 0 to"):
        view.step = view.last + 1
    view.to_html(tmp_path / "pair.html")
    text = (tmp_path / "pair.html").read_text("utf-8")
    assert '"names": ["swap", "recompute"]' in text and text.count("</script>") == 2
    for bad in ([], pair[0][1:]):
        with pytest.raises(TraceError):
            side_by_side(pair[0], bad)


# ---- what every view must do -----------------------------------------------------------------------------------------



each_view = pytest.mark.parametrize(("pane", "view_of"), VIEWS.items())


@each_view
def test_a_notebook_stores_the_open_view(pane: str, view_of: Callable) -> None:
    events = small_pool_run().trace.events
    view, still = microscope(events, step=6, pane=pane), view_of(events, 6)
    data, _ = view._repr_mimebundle_()
    assert (data["text/plain"], data["image/svg+xml"]) == (still.text, still.svg) and repr(view) == still.text
    view.pane = "memory"
    assert repr(view).startswith("after iteration 6")
    with pytest.raises(TraceError, match="choose one of memory, sharing, timeline"):
        view.pane = "moemry"
    with pytest.raises(TraceError, match="choose one of memory, sharing, timeline"):
        microscope(events, pane="timelin")


@each_view
def test_text_of_others_stays_data(tmp_path: Path, pane: str, view_of: Callable) -> None:
    events = [start(num_blocks=12, num_host_blocks=0), *request(0, NASTY, list(range(5)))]
    events = [replace(events[0], model="]]></script><img src=x onerror=alert(1)>"), *events[1:]]
    view = view_of(events, 1)
    root = ElementTree.fromstring(view.svg)
    assert {node.tag.split("}")[1] for node in root.iter()} <= {"svg", "title", "rect", "path", "text"}
    assert all(char.isprintable() or char == "\n" for char in view.text + view.svg)
    assert "<img" not in view.svg and "</script" not in view.svg and "]]>" not in view.svg
    microscope(events, 1, pane=pane).to_html(tmp_path / "view.html")
    text = (tmp_path / "view.html").read_text("utf-8")
    assert "<img" not in text and text.count("</script>") == 2 and "]]>" not in text


@each_view
def test_the_drawings_can_be_read_anywhere(pane: str, view_of: Callable) -> None:
    for source in (figure_7(), small_pool_run().trace, busy(40)):
        view = view_of(source, 4)
        root = ElementTree.fromstring(view.svg)
        assert root.get("width") == "100%" and root.get("height") is None and root.get("viewBox")
        assert root.get("role") == "img" and root[0].text == root.get("aria-label")
        assert not any(node.get("id") or node.tag.endswith("style") for node in root.iter())
        assert view == view_of(source, 4) and view.svg == view_of(source, 4).svg, "the same in every run"


@each_view
@pytest.mark.parametrize("events", [[], figure_7()[1:], [figure_7()[0], ev.Free(1, 3, [0], False)]])
def test_what_is_no_trace_is_refused(pane: str, view_of: Callable, events: list[Event]) -> None:
    with pytest.raises(TraceError):
        view_of(events, 0)


@each_view
def test_an_engine_that_has_done_nothing(pane: str, view_of: Callable) -> None:
    assert view_of([start()], 0).text
