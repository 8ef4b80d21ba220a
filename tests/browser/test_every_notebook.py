"""Every notebook in JupyterLab: it runs, and whatever it shows can be moved, clicked and pressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_notebooks import NOTEBOOKS
from test_jupyterlab import DONE, ERRORS

BLOCKS, SECONDS = 3, 300  # blocks of each microscope that are clicked; time for one notebook on a busy machine


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_answers(path: Path, opened: Callable[[str], Any]) -> None:
    page = opened(f"notebooks/{path.name}")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_timeout(300)
    settle(page)
    failed = len(page.failures)  # those that are there to fail
    for slider in page.locator(".jp-OutputArea [role=slider]:visible").all():  # those of ipywidgets
        move(page, slider, lambda: slider.get_attribute("aria-valuetext"))
    for slider in page.locator(".jp-OutputArea input[type=range]:visible").all():  # the browser's own
        move(page, slider, slider.input_value)
    for view in page.locator(".jp-OutputArea .mp:visible").all():
        click_blocks(view)
    for output in page.locator(".jp-OutputArea-child:has(button.jupyter-button:enabled)").all():
        press_a_button(page, output)
    settle(page)
    assert page.failures[failed:] == [], "what is called back must not fail either"
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def settle(page: Any) -> None:
    """Wait until nothing runs; no cell may have failed but those that are there to fail."""
    page.wait_for_function(f"() => ({DONE})() || ({ERRORS})().length", timeout=1000 * SECONDS)
    assert page.evaluate(ERRORS) == []


def move(page: Any, slider: Any, value: Callable[[], str]) -> None:
    """One step by keyboard, to where there is room."""
    before = value()
    slider.focus()
    for key in ("ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        if value() != before:
            break
    assert value() != before, f"a slider stays at {before}"
    settle(page)


def click_blocks(view: Any) -> None:
    """Each answers with what is known of it."""
    blocks = view.locator(".mp-device .mp-block:visible")
    for number in range(min(BLOCKS, blocks.count())):
        blocks.nth(number).click()
        name = blocks.nth(number).get_attribute("data-go").split()[1]
        assert view.get_by_label("details").locator("h4").text_content().startswith(f"block {name}: ")


def press_a_button(page: Any, output: Any) -> None:
    """The first one, by keyboard; what is shown must change."""
    before = output.text_content()
    button = output.locator("button.jupyter-button:enabled").first
    assert button.text_content().strip(), "a button without a name"
    button.focus()
    page.keyboard.press("Enter")
    for _ in range(100):
        if output.text_content() != before:
            break
        page.wait_for_timeout(100)
    assert output.text_content() != before
    settle(page)
