"""The live view in JupyterLab: it moves while the cell runs, and its button stops the engine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT, TOKEN
from test_jupyterlab import ASK, DONE, ERRORS, check_running_again
from traces import NASTY

from minipaged.views.frame import visible
MAKE = """\
from minipaged import LLM, SamplingParams
llm = LLM("tiny-opt", block_size=4, num_gpu_blocks_override=200, audit=True)
params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)"""
WATCH = """\
with llm.watch(steps_per_second=8) as view:
    outputs = llm.generate(["Once upon a time", "It was the best of"], params)"""
STOPPED = """\
pool = llm.block_manager.device
print(pool.num_free == pool.num_blocks, {o.outputs[0].finish_reason for o in outputs}, llm.watcher,
      llm.generate("Once", SamplingParams(max_tokens=3))[0].finished)"""


# A trace written by hand, token by token, as no model would.
HAND = f"""\
from minipaged import Trace, trace as ev
from minipaged.views.live import show
TEXTS = {ascii(NASTY)}
trace = Trace()
trace.emit(ev.Start, schema=1, model="<b>", block_size=4, num_blocks=12, num_host_blocks=0, max_model_len=99,
           bytes_per_token=1, attention="", attention_reason="")
trace.emit(ev.Add, request=0, seq=0, token_ids=[0, 1, 2, 3], texts=TEXTS[:4])
def go_on(tokens):
    trace.begin_step()
    done = trace.state().num_tokens.get(0, 0)
    if not done:
        trace.emit(ev.Admit, request=0)
    for logical in range(-(-done // 4), -(-(done + tokens) // 4)):
        trace.emit(ev.Allocate, seq=0, logical=logical, block=logical)
    trace.emit(ev.Write, seq=0, start=done, end=done + tokens)
    for text in TEXTS[done + tokens:][:1]:
        trace.emit(ev.Sample, seq=0, token_id=0, text=text, logprob=0.0)
    view.push(at_once=True)
view = show(trace)"""


def run(page: Any) -> None:
    """Start all cells; the last goes on by itself."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def step(page: Any) -> int:
    return int(page.locator(".mp").get_attribute("data-step"))


def test_it_moves_while_the_cell_runs_and_stops(notebook: Callable[..., Any]) -> None:
    page = notebook(MAKE, WATCH)
    run(page)
    page.wait_for_function("document.querySelector('.mp')?.dataset.step > 3", timeout=300_000)
    before, wire = step(page), sum(page.wire)
    page.wait_for_function(f"document.querySelector('.mp').dataset.step >= {before + 8}")
    sent = (sum(page.wire) - wire) / (step(page) - before)
    print(f"{sent:.0f} bytes a step")
    assert sent < 2048
    assert not page.evaluate(DONE), "the cell runs"
    pace = page.locator(".mp-pace").text_content()
    assert "blocks in use" in pace and "kB of" in pace and "tokens/s" in pace, pace

    slider = page.get_by_label("step", exact=True)  # who looks at an earlier step is left there
    slider.focus()
    page.keyboard.press("<")
    page.keyboard.press(".")
    last = int(slider.get_attribute("max"))
    page.wait_for_function(f"document.querySelector('.mp-slider').max >= {last + 4}")
    assert step(page) == 1
    page.keyboard.press(">")
    page.wait_for_function(f"document.querySelector('.mp').dataset.step >= {last + 6}")

    page.get_by_role("button", name="Stop").click()
    began = time.monotonic()
    page.wait_for_function(DONE)
    assert time.monotonic() - began < 10, "400 steps would take 50 s"
    assert page.evaluate(ERRORS) == []
    assert page.locator(".mp").count() == 1, "the still is not drawn a second time"
    assert page.evaluate(ASK, STOPPED) == "True {'abort'} None True"
    page.wait_for_function("document.querySelector('.mp-pace').textContent.startsWith('stopped: ')")
    assert page.get_by_role("button", name="Stop").count() == 0
    assert page.evaluate(ASK, "print(view.step)") == page.locator(".mp").get_attribute("data-step")


def test_every_view_of_it_gets_every_token_as_text(notebook: Callable[..., Any]) -> None:
    """One view from the start, one that is opened in the middle; whatever the tokens are."""
    rest = len(NASTY) - 5
    page = notebook(HAND, "go_on(4)\ngo_on(1)", "view", f"for _ in range({rest}):\n    go_on(1)")
    run(page)
    page.wait_for_function(DONE)
    assert page.evaluate(ERRORS) == []
    for end in ("", "view.finish()"):
        page.evaluate(ASK, end)
        for view in page.locator(".mp").all():
            view.get_by_role("button", name="last step").click()
            view.get_by_role("button", name="sequence A").click()
            tokens = view.locator(".mp-details .mp-token").all_text_contents()
            assert tokens == [visible(text) for text in NASTY]
            assert view.locator("img, script, b b").count() == 0
            assert view.locator(".mp-pace").text_content().startswith("finished" if end else "live, step ")
        assert page.locator(".mp").count() == 2


def test_running_it_again_leaves_no_growing_set_of_widgets(notebook: Callable[..., Any]) -> None:
    page = notebook(MAKE.replace("max_tokens=400", "max_tokens=3"), WATCH.replace("steps_per_second=8", ""))
    run(page)
    page.wait_for_function(DONE, timeout=300_000)
    check_running_again(page)


def test_a_notebook_that_is_not_trusted_shows_pngs(browser: Any, lab: tuple[str, Path]) -> None:
    address, work = lab
    [source] = ROOT.glob("notebooks/01_*.ipynb")
    shutil.copy(source, work / "untrusted.ipynb")
    page = browser.new_page()
    page.goto(f"{address}/lab/workspaces/untrusted/tree/untrusted.ipynb?token={TOKEN}", wait_until="domcontentloaded")
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.isReady", timeout=180_000)
    assert not page.evaluate("jupyterapp.shell.currentWidget.content.model.cells.get(1).trusted")
    page.locator(".jp-OutputArea-output img").first.wait_for()
    widths = page.eval_on_selector_all(".jp-OutputArea-output img", "els => els.map((el) => el.naturalWidth)")
    assert len(widths) >= 10 and set(widths) == {960}
    page.close()
