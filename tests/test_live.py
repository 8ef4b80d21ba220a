"""Watching the engine: nothing is lost on the way to the browser, and nothing is left behind."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipywidgets import Widget
from jupyter_client.manager import start_new_kernel
from nbformat.v4 import new_code_cell, new_notebook
from run_notebooks import environment, run
from test_notebooks import strict_nbval
from test_widget import Cell, sent, widgets

from minipaged import LLM, SamplingParams, Trace
from minipaged.errors import InvalidParams, NotIdle
from minipaged.memory.audit import audit
from minipaged.trace import NO_TRACE
from minipaged.views import live, memory_view, widget
from minipaged.views.live import LiveMicroscope

PROMPTS = ["Once upon a time", "It was the best of", "Four score and seven years ago our"]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLM]:
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=40, audit=True) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM) -> Iterator[LLM]:
    """An LLM without a trace, which each test must leave as clean as it was."""
    yield engine
    pool = engine.block_manager.device
    audit(engine.block_manager)
    assert pool.num_free == pool.num_blocks and engine.block_manager.trace is NO_TRACE
    assert not engine.engine.scheduler.has_unfinished and engine.watcher is None


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the browser is sent, message by message."""
    got: list[dict[str, Any]] = []

    def send(view: LiveMicroscope, content: dict[str, Any], buffers: list[bytes]) -> None:
        assert content["number"] == len(got)
        got.append(json.loads(zlib.decompress(buffers[0])))

    monkeypatch.setattr(LiveMicroscope, "send", send)
    return got


def press_stop(view: LiveMicroscope) -> None:
    """What arrives when the button is pressed."""
    view._handle_custom_msg({"stop": True}, [])


# ---- what is drawn ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds", [0.0, 0.02, 60.0])
def test_the_pieces_are_the_trace(llm: LLM, pieces: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
                                  seconds: float) -> None:
    """However many steps share a piece: put together they are what a view of the whole trace replays."""
    monkeypatch.setattr(live, "SECONDS_PER_PIECE", seconds)
    with llm.watch() as view:
        first = sent(view)
        for _ in llm.stream(PROMPTS, SamplingParams(n=2, seed=0, max_tokens=12)):
            pass
        llm.generate(PROMPTS[0], greedy(5))
        assert view.last == view.trace.step > 12, "a run that is over is drawn at once"
    texts, steps = first["texts"], first["steps"]
    for piece in pieces:
        texts += piece["texts"]
        assert piece["first"] in (len(steps) - 1, len(steps))
        for step, events in enumerate(piece["steps"], piece["first"]):
            if step == len(steps):
                steps.append([])
            steps[step] += events
    assert {"texts": texts, "first": 0, "steps": steps} == sent(view)
    assert len(pieces) >= 2 if seconds else len(pieces) >= view.last


def test_in_the_end_it_is_like_any_other_view(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with llm.watch() as view:
        llm.generate(PROMPTS, greedy(6))
        assert capsys.readouterr().out == ""
    assert view.events == view.trace.events and view.step == view.last - 1
    still = memory_view(view.trace, view.step)
    assert capsys.readouterr().out == still.text + "\n" == repr(view) + "\n", "in a terminal it is printed"
    view.to_html(tmp_path / "view.html")
    assert (tmp_path / "view.html").stat().st_size > 10_000
    view.step = 2
    assert repr(view) == memory_view(view.trace, 2).text
    assert view.live.startswith("finished: 18 tokens in ")


def test_who_scrubs_is_left_where_he_is(llm: LLM) -> None:
    with llm.watch() as view:
        llm.generate(PROMPTS, greedy(6))
        view.set_state({"step": 3, "following": False})
    assert view.step == 3


def test_a_trace_that_there_is_goes_on() -> None:
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=40, trace=Trace()) as llm:
        llm.register_prefix("Once upon")
        llm.generate(PROMPTS[0], greedy(3))
        before = list(llm.trace.events)
        with llm.watch() as view:
            assert view.step == view.last == llm.trace.step, "it opens at the latest step"
            llm.generate(PROMPTS[0], greedy(3))
        assert view.events == llm.trace.events and view.events[:len(before)] == before != view.events
        seen = len(view.events)
        llm.generate(PROMPTS[0], greedy(3))
        assert len(view.events) == seen and llm.trace.step > view.last, "afterwards nothing is added to the view"


def test_without_a_trace_one_is_kept_meanwhile(llm: LLM) -> None:
    views = []
    for _ in range(2):
        with llm.watch() as view:
            llm.generate(PROMPTS[0], greedy(3))
        views.append(view)
    assert [[event.kind for event in view.events].count("start") for view in views] == [1, 1]
    assert [view.last for view in views] == [3, 3] and llm.trace is None


def test_it_cannot_begin_in_the_middle() -> None:
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=40) as llm:
        stream = llm.stream(PROMPTS[0], greedy(3))
        next(stream)
        with pytest.raises(NotIdle, match=r"trace=Trace\(\)"), llm.watch():
            pass
        stream.close()
        with llm.watch():
            with pytest.raises(NotIdle, match="watched already"), llm.watch():
                pass
        llm.register_prefix("Once upon")
        with pytest.raises(NotIdle, match=r"trace=Trace\(\)"), llm.watch():
            pass


# ---- how fast --------------------------------------------------------------------------------------------------------

def test_it_goes_no_faster_than_asked(llm: LLM) -> None:
    for speed, at_least, at_most in [(20, 0.35, 60), (None, 0, 60)]:
        with llm.watch(steps_per_second=speed):
            began = time.monotonic()
            llm.generate(PROMPTS[0], greedy(8))
            assert at_least <= time.monotonic() - began <= at_most


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf"), "2", [2]])
def test_a_speed_is_a_positive_number(llm: LLM, speed: Any) -> None:
    with pytest.raises(InvalidParams, match="positive number"), llm.watch(steps_per_second=speed):
        pass


# ---- how it ends -----------------------------------------------------------------------------------------------------

def test_the_stop_button_leaves_a_clean_engine(llm: LLM) -> None:
    threads = threading.active_count()
    with llm.watch(steps_per_second=0.01) as view:
        threading.Timer(0.5, press_stop, [view]).start()
        began = time.monotonic()
        outputs = llm.generate(PROMPTS, greedy(30))
        assert time.monotonic() - began < 30, "the button ends the waiting too"
        assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 1, 1]
        assert all(output.outputs[0].text for output in outputs), "what there is is given back"
        assert llm.generate(PROMPTS[0], greedy(30))[0].outputs[0].finish_reason == "abort", "nor does anything follow"
    assert view.live.startswith("stopped: ") and view.events[-1].kind == "finish"
    assert llm.generate(PROMPTS[0], greedy(3))[0].outputs[0].finish_reason == "length"
    assert threading.active_count() == threads


def test_a_late_press_stops_nothing(llm: LLM) -> None:
    """Where messages wait for the end of the cell."""
    with llm.watch() as view:
        llm.generate(PROMPTS[0], greedy(3))
    press_stop(view)
    assert llm.generate(PROMPTS[0], greedy(3))[0].outputs[0].finish_reason == "length"
    with llm.watch():
        assert llm.generate(PROMPTS[0], greedy(3))[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_block_ends_it_too(llm: LLM, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with llm.watch() as view:
            for _ in llm.stream(PROMPTS, greedy(20)):
                raise error
    assert view.events[-1].kind in ("write", "sample", "finish") and view.live.startswith("finished")


def test_running_a_cell_again_leaves_no_growing_set(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Cell()
    monkeypatch.setattr(widget, "get_ipython", lambda: shell)
    Widget.close_all()
    counts = []
    for shell.run in range(20):
        with llm.watch() as view:
            llm.generate(PROMPTS[0], greedy(2))
        counts.append(widgets())
    assert counts == counts[:1] * 20
    view.close()
    assert widgets() == 0


# ---- in a kernel -----------------------------------------------------------------------------------------------------

MAKE = ('from minipaged import LLM, SamplingParams\nllm = LLM("tiny-opt", block_size=4, num_gpu_blocks_override=24)\n'
        'params = SamplingParams(temperature=0, max_tokens=6)')


def test_a_committed_notebook_holds_the_still_of_the_end(tmp_path: Path) -> None:
    path = tmp_path / "live.ipynb"
    cells = [MAKE, 'with llm.watch() as view:\n    llm.generate("Once upon a time", params)\n    print("in between")',
             "view.step = 2\nview"]
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in cells]), path)
    run(path)
    [printed, still], [later] = [cell.outputs for cell in nbformat.read(path, as_version=4).cells[1:]]
    assert printed.text == "in between\n" and "widget" not in str(still.data)
    assert still.data["text/plain"].startswith("after iteration 5: 3 of 24 physical blocks in use")
    assert later.data["text/plain"].startswith("after iteration 2: ")
    assert (done := strict_nbval(tmp_path)).returncode == 0, done.stdout + done.stderr
    path.write_text(path.read_text().replace("after iteration 5", "after iteration 4"))
    assert strict_nbval(tmp_path).returncode == 1


COST = """
import gc, time
from types import SimpleNamespace
from minipaged.views import live
from minipaged.watch import Watch
live.time = SimpleNamespace(monotonic=time.thread_time)
spent = {"step": 0.0, "watch": 0.0}
def timed(owner, name, where):
    real = getattr(owner, name)
    def call(*args):
        began = time.thread_time()
        try:
            return real(*args)
        finally:
            spent[where] += time.thread_time() - began
    setattr(owner, name, call)
llm.generate(["Once"] * 8, params)
timed(Watch, "after_step", "watch")
timed(llm.engine, "step", "step")
gc.collect()
gc.freeze()
with llm.watch():
    llm.generate(["Once"] * 8, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
"""


def test_drawing_costs_the_engine_little() -> None:
    """In a real kernel, with eight sequences. Processor time is compared, and paces the drawing: it does not depend on
    what else runs. One thread, as two that wait busily for each other make the engine look slow; and no collection of
    all that was there before, a fifth of a second, which falls upon whoever allocates next."""
    alone = environment() | {"MINIPAGED_AUDIT": "0", "OMP_NUM_THREADS": "1"}
    manager, client = start_new_kernel(kernel_name="python3", env=alone)
    try:
        printed: list[str] = []
        for source in (MAKE.replace("24", "600"), COST, "print(spent['watch'] / spent['step'])"):
            reply = client.execute_interactive(source, timeout=120, output_hook=lambda message: printed.append(
                message["content"].get("text", "")))
            assert reply["content"]["status"] == "ok", reply
        share = float(printed[-2] if not printed[-1].strip() else printed[-1])
        print(f"{share:.1%}")
        assert 0 < share < 0.05
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
