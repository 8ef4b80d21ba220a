"""The views beside the memory itself: the timeline says of each iteration what the engine did in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_views import elements
from test_widget import busy
from traces import NASTY, Witness, figure_7, request, small_pool_run, start
from workloads import make_workload, run

from minipaged import Trace
from minipaged import trace as ev
from minipaged.errors import TraceError
from minipaged.trace import Event
from minipaged.views import microscope, timeline_view
from minipaged.views.canvas import WIDTH
from minipaged.views.frame import letters
from minipaged.views.timeline import LEFT, LOOK, MEANING, RAREST, RIGHT, timeline_of


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


# ---- what every view must do -----------------------------------------------------------------------------------------

VIEWS = {"timeline": lambda source, step: timeline_view(source)}


each_view = pytest.mark.parametrize(("pane", "view_of"), VIEWS.items())


@each_view
def test_a_notebook_stores_the_open_view(pane: str, view_of: Callable) -> None:
    events = small_pool_run().trace.events
    view, still = microscope(events, step=6, pane=pane), view_of(events, 6)
    data, _ = view._repr_mimebundle_()
    assert (data["text/plain"], data["image/svg+xml"]) == (still.text, still.svg) and repr(view) == still.text
    view.pane = "memory"
    assert repr(view).startswith("after iteration 6")
    with pytest.raises(TraceError, match="choose one of memory, timeline"):
        view.pane = "moemry"
    with pytest.raises(TraceError, match="choose one of memory, timeline"):
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
