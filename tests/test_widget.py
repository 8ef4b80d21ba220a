"""The microscope from Python's side: what it stores, what it sends, and how little of it is left behind."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import run_notebooks
from ipywidgets import Widget
from ipywidgets.widgets.widget import _instances
from traces import NASTY, figure_7, figure_8, request, small_pool_run, start

from minipaged import Trace
from minipaged import trace as ev
from minipaged.errors import TraceError
from minipaged.trace import to_json
from minipaged.views import Microscope, html, memory_view, microscope, widget
from minipaged.views.frame import visible
from minipaged.views.html import save, script, style


def busy(steps: int, seqs: int = 32, blocks: int = 256, size: int = 16) -> list[ev.Event]:
    """A full engine, written down without one: a token an iteration for every sequence; one that ends is replaced."""
    rng = random.Random(0)
    words = [f" word{number}" for number in range(4000)]
    events: list[ev.Event] = [start(num_blocks=blocks, block_size=size)]
    free, tables, lengths, ends, number = list(range(blocks)), {}, {}, {}, 0
    for step in range(1, steps + 1):
        while len(tables) < seqs:
            prompt = rng.randint(1, 40)
            events.append(ev.Add(step - 1, number, number, [0] * prompt, rng.choices(words, k=prompt)))
            tables[number], lengths[number], ends[number] = [], prompt, prompt + rng.randint(5, 80)
            number += 1
        events.append(ev.Begin(step))
        for seq, table in list(tables.items()):
            first = 0 if not table else lengths[seq] - 1
            if not table:
                events.append(ev.Admit(step, seq))
            while len(table) * size < lengths[seq]:
                table.append(free.pop(rng.randrange(len(free))))
                events.append(ev.Allocate(step, seq, len(table) - 1, table[-1]))
            events.append(ev.Write(step, seq, first, lengths[seq]))
            events.append(ev.Sample(step, seq, rng.randrange(4000), rng.choice(words), -1.2345))
            lengths[seq] += 1
            if lengths[seq] == ends[seq]:
                free += table
                events += [ev.Free(step, seq, tables.pop(seq), False), ev.Finish(step, seq, seq, "length")]
    return events


LINES = [to_json(event) for event in figure_7()]


def widgets() -> int:
    """Widgets that ipywidgets keeps alive."""
    return len(_instances)


def sent(view: Microscope) -> dict:
    """What the browser replays."""
    return json.loads(zlib.decompress(view.data))


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    return path


# ---- what a notebook stores ------------------------------------------------------------------------------------------

def test_a_notebook_stores_the_widget_and_a_still_of_its_step() -> None:
    view = microscope(figure_7())
    data, _ = view._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/plain", "image/svg+xml", "image/png"}
    still = memory_view(figure_7())
    assert repr(view) == still.text and still._repr_mimebundle_().items() <= data.items()
    view.step = 1
    still = memory_view(figure_7(), 1)
    data, _ = view._repr_mimebundle_()
    assert repr(view) == still.text and still._repr_mimebundle_().items() <= data.items()


def test_a_committed_notebook_shows_the_still(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.jsonl", LINES)
    cell = nbformat.v4.new_code_cell(f"from minipaged.views import microscope\nmicroscope({trace.name!r}, step=2)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "view.ipynb")
    run_notebooks.run(tmp_path / "view.ipynb")
    [output] = nbformat.read(tmp_path / "view.ipynb", as_version=4).cells[0].outputs
    still = memory_view(figure_7(), 2)
    assert output.data == still._repr_mimebundle_()


def test_it_is_the_same_in_every_run() -> None:
    views = [microscope(figure_8()), microscope(figure_8())]
    assert repr(views[0]) == repr(views[1]) and views[0].data == views[1].data


def test_it_opens_where_something_is_to_be_seen() -> None:
    run = small_pool_run()
    assert not run.trace.state().tables, "in the end all blocks are free"
    view = microscope(run.trace)
    assert view.step == run.trace.step - 1 and run.trace.state(view.step).tables
    assert microscope(run.trace, step=0).step == 0 and microscope([start()]).step == 0


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_that_is_not_there_is_refused(step: int) -> None:
    view = microscope(figure_7())
    with pytest.raises(TraceError, match="the steps 0 to 4"):
        view.step = step
    assert view.step == 4
    with pytest.raises(TraceError, match="the steps 0 to 4"):
        microscope(figure_7(), step=step)


def test_every_source_gives_the_same_view(tmp_path: Path) -> None:
    run = small_pool_run()
    path = write(tmp_path / "trace.jsonl", [to_json(event) for event in run.trace.events])
    views = [microscope(source) for source in (run.trace, run.trace.events, iter(run.trace.events), path, str(path))]
    assert len({repr(view) for view in views}) == len({view.data for view in views}) == 1


def test_steps_and_events_arrive_in_order() -> None:
    steps = sent(microscope(figure_8()))["steps"]
    assert [[event[0] for event in step] for step in steps] == [
        ["start", "add"], ["admit", "allocate", "allocate", "write", "fork", "share", "share", "sample", "sample"],
        ["copy", "write", "write"]]
    assert steps[0][0] == ["start", 4, 9, 4, "none", 819200] and steps[2][0] == ["copy", 0, 1, 1, 3]


# ---- one file --------------------------------------------------------------------------------------------------------

def test_html_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    microscope(figure_7(), step=2).to_html(tmp_path / "a.html")
    save(figure_7(), tmp_path / "b.html", step=2)
    text = (tmp_path / "a.html").read_text("utf-8")
    assert text == (tmp_path / "b.html").read_text("utf-8")
    assert set(re.findall(r"\w+://[^\s\"'<>]*", text)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert not re.search(r"\bsrc\s*=|\bhref\s*=|@import|url\(|\bfetch\(|\bimport\s*[({\"']", text)
    assert "default-src 'none'" in text
    with pytest.raises(TraceError, match="the steps 0 to 4"):
        save(figure_7(), tmp_path / "c.html", step=5)


def test_the_shipped_code_can_stand_in_a_page() -> None:
    assert "</script" not in script().lower() and "</style" not in style().lower() and "<!--" not in script()
    files = {path.name: path.read_text("utf-8") for path in Path(html.__file__).with_name("static").glob("*.js")}
    for name, text in files.items():
        code = [line for line in text.splitlines() if line.strip() and not re.match(r"\s*(//|/\*\*.*\*/$)", line)]
        assert len(code) < 420, f"{name} is to be read in one go"


def test_hostile_tokens_stay_data(tmp_path: Path) -> None:
    nasty = [*NASTY, "\u2028", "\u2029", "${alert(1)}", "`", "</noscript>"]
    events = [start(num_blocks=12), *request(0, nasty, list(range(6)))]
    view = microscope([replace(events[0], model="</title><img src=x onerror=alert(1)>"), *events[1:]])
    assert sent(view)["texts"] == list(dict.fromkeys(map(visible, nasty)))
    view.to_html(tmp_path / "view.html")
    text = (tmp_path / "view.html").read_text("utf-8")
    assert "<img" not in text and text.count("</script>") == 2 and text.count("</noscript>") == 1 and "]]>" not in text
    assert not re.search("[\u2028\u2029\u202e\ud800]", text)
    trace = json.loads(re.search(r'id="values">(.*?)</script>', text)[1])
    assert base64.b64decode(trace["bytes"]["data"]) == view.data
    ElementTree.fromstring(view._repr_mimebundle_()[0]["image/svg+xml"])


def test_a_trace_of_2000_steps_is_small_and_quick(tmp_path: Path) -> None:
    events = busy(2000)
    began = time.perf_counter()
    view = microscope(events)
    view.to_html(tmp_path / "view.html")
    seconds, size = time.perf_counter() - began, (tmp_path / "view.html").stat().st_size
    print({"bytes": size, "seconds": round(seconds, 2)})
    assert size < 3_000_000 and seconds < 20, (size, seconds)


# ---- bad traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lines", "where"), [
    ([], "line 1"), (["not a trace"], "line 1"), (LINES[1:], "line 1"), ([*LINES[:5], LINES[5][:20]], "line 6"),
    ([LINES[0].replace('"schema": 1', '"schema": 99'), *LINES[1:]], "schema version 99"),
    ([LINES[0], *LINES[2:]], "event [0-9]+ does not follow"), ([*LINES, *LINES], "another trace")])
def test_a_bad_trace_is_named(tmp_path: Path, lines: list[str], where: str) -> None:
    with pytest.raises(TraceError, match=where):
        microscope(write(tmp_path / "trace.jsonl", lines))
    with pytest.raises(TraceError, match=where):
        save(write(tmp_path / "trace.jsonl", lines), tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_a_trace_that_is_empty_or_none_is_named() -> None:
    for source in (None, [], Trace(), figure_7()[1:]):
        with pytest.raises(TraceError):
            microscope(source)


# ---- nothing is left behind ------------------------------------------------------------------------------------------

class Cell:
    """Stands in for the shell of a kernel that runs a notebook's cell."""

    def __init__(self) -> None:
        self.cell, self.run = "a", 0

    def get_parent(self) -> dict:
        return {"header": {"msg_id": str(self.run)}, "metadata": {"cellId": self.cell}}


def test_running_a_cell_again_closes_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Cell()
    monkeypatch.setattr(widget, "get_ipython", lambda: shell)
    Widget.close_all()
    before = widgets()
    for shell.run in range(20):
        views = [microscope(figure_7()), microscope(figure_8())]  # two in one cell live side by side
    assert widgets() - before == 4, "a view and its layout, twice"
    assert all(view.comm is not None for view in views)
    shell.cell = "b"
    other = microscope(figure_7())
    assert widgets() - before == 6 and views[0].comm is not None, "another cell has a view of its own"
    shell.cell, shell.run = "a", 20
    microscope(figure_7())
    assert widgets() - before == 4 and views[0].comm is None and other.comm is not None


def test_outside_a_notebook_a_new_view_replaces_that_of_the_same_source(tmp_path: Path) -> None:
    path, run = write(tmp_path / "trace.jsonl", LINES), small_pool_run()
    Widget.close_all()
    before = widgets()
    for _ in range(20):
        microscope(run.trace)
        microscope(path)
        microscope(figure_8(), name="mine")
    assert widgets() - before == 6


def test_the_other_views_load_without_jupyter() -> None:
    code = ("import sys, minipaged.views, minipaged.views.html; print(sorted(m for m in sys.modules if m.split('.')[0] "
            "in ('torch', 'numpy', 'ipywidgets', 'anywidget', 'IPython')))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
