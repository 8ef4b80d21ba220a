"""The live view in JupyterLab: it moves while the cell runs, and its button stops the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from test_jupyterlab import ASK, DONE, ERRORS
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


def run(page: Any) -> None:
    """Start all cells; the last goes on by itself."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def step(page: Any) -> int:
    return int(page.locator(".mp").get_attribute("data-step"))


def test_it_moves_while_the_cell_runs_and_stops(notebook: Callable[..., Any]) -> None:
    page = notebook(MAKE, WATCH)
    run(page)
    page.wait_for_function("document.querySelector('.mp')?.dataset.step > 3", timeout=120_000)
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
