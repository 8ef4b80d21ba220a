"""The microscope in JupyterLab: a notebook is opened, run and scrubbed there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipaged.replay import replay
from minipaged.trace import load

CELLS = ["""\
from minipaged import LLM, SamplingParams, Trace
from minipaged.views import microscope
with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=24, trace=Trace("trace.jsonl")) as llm:
    llm.generate("Four score and seven years ago our fathers brought", SamplingParams(n=3, seed=0, max_tokens=12))
    llm.trace.close()""", "view = microscope(llm.trace, step=1)\nview"]
DONE = """() => {
  const panel = jupyterapp.shell.currentWidget, cells = [...panel.content.model.cells];
  return cells.every((cell) => cell.type !== "code" || !cell.sharedModel.source.trim() || cell.executionCount)
    && panel.sessionContext.session.kernel.status === "idle";
}"""
ERRORS = """() => [...jupyterapp.shell.currentWidget.content.model.cells]
  .filter((cell) => cell.type === "code" && !cell.getMetadata("tags")?.includes("raises-exception"))
  .flatMap((cell) => cell.outputs.toJSON()).filter((output) => output.output_type === "error")
  .map((output) => `${output.ename}: ${output.evalue}`)"""
ASK = """async (code) => {
  const request = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code });
  let text = "";
  request.onIOPub = (message) => { if (message.header.msg_type === "stream") text += message.content.text; };
  await request.done;
  return text.trim();
}"""


@pytest.fixture
def page(notebook: Callable[..., Any]) -> Any:
    """The notebook, run from top to bottom as a person would."""
    page = notebook(*CELLS)
    run_all(page)
    return page


def run_all(page: Any) -> None:
    """The menu's Run All Cells."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_timeout(300)
    page.wait_for_function(DONE, timeout=120_000)
    assert page.evaluate(ERRORS) == []
    page.locator(".mp-slider").first.wait_for()


def check_running_again(page: Any) -> None:
    """Twenty runs of the second cell leave one view, and as many widgets as the first left."""
    alive = "from ipywidgets.widgets.widget import _instances; print(len(_instances))"
    first = page.evaluate(ASK, alive)
    page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-InputArea-editor").click()
    for _ in range(20):
        page.keyboard.press("Control+Enter")
    page.wait_for_timeout(500)
    page.wait_for_function(DONE, timeout=300_000)
    page.locator(".mp-slider").wait_for()
    assert page.evaluate(ASK, alive) == first and page.locator(".mp").count() == 1


def test_a_notebook_is_run_and_scrubbed_by_keyboard(page: Any, lab: tuple[str, Path]) -> None:
    events = load(lab[1] / "trace.jsonl")
    view, slider = page.locator(".mp"), page.get_by_label("step", exact=True)
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert view.get_attribute("data-step") == "6"
    state = replay(events, 6)
    refs = page.locator(".mp-device .mp-block:not(.mp-free) .mp-refs").all_text_contents()
    assert [int(text[1:]) if text else 1 for text in refs] == [count for count in state.ref_counts if count]
    for key, step in [("c", None), ("<", 0), ("c", 2), ("Shift+C", 2), (".", 3), ("s", 3), ("x", 3)]:
        page.keyboard.press(key)  # c and x would copy and cut the cell, if JupyterLab got them
        assert step is None or view.get_attribute("data-step") == str(step)
    assert page.locator(".jp-Notebook .jp-Cell").count() == len(CELLS)
    page.wait_for_timeout(500)
    assert page.evaluate(ASK, "print(view.step)") == "3", "Python knows"
    page.evaluate(ASK, "view.step = 5")
    page.locator('.mp[data-step="5"]').wait_for()


def test_scrubbing_needs_no_kernel(page: Any) -> None:
    page.evaluate(f"({ASK})('import time; time.sleep(4)'); 0")
    page.get_by_label("step", exact=True).focus()
    began = time.monotonic()
    for step in range(2, 10):
        page.keyboard.press("ArrowRight")
        assert page.locator(".mp").get_attribute("data-step") == str(step)
    assert time.monotonic() - began < 4, "while a cell runs"


def test_a_step_is_little_on_the_wire(page: Any) -> None:
    """Python is told of it, and answers; both ways at most 2 KB, however slowly one steps."""
    page.get_by_label("step", exact=True).focus()
    page.wait_for_timeout(1000)
    before = sum(page.wire)
    for _ in range(8):
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(400)
    print(f"{(sum(page.wire) - before) / 8:.0f} bytes a step")
    assert page.evaluate(ASK, "print(view.step)") == "9" and sum(page.wire) - before < 8 * 2048


def test_running_again_leaves_no_growing_set_of_widgets(page: Any) -> None:
    check_running_again(page)
