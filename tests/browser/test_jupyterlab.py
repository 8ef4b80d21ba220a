"""The microscope in JupyterLab: a notebook is opened, run and scrubbed there."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from minipaged.replay import replay
from minipaged.trace import load

ROOT = Path(__file__).parent.parent.parent
TOKEN = "test"
# Or a pop-up with news covers the notebook, cells out of sight are not drawn, and files change by themselves.
SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
            "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
            "@jupyterlab/docmanager-extension:plugin": {"autosave": False}}
CELLS = ["""\
from minipaged import LLM, SamplingParams, Trace
from minipaged.views import microscope
with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=24, trace=Trace("trace.jsonl")) as llm:
    llm.generate("Four score and seven years ago our fathers brought", SamplingParams(n=3, seed=0, max_tokens=12))
    llm.trace.close()""", "view = microscope(llm.trace, step=1)\nview"]
DONE = """() => {
  const panel = jupyterapp.shell.currentWidget, cells = [...panel.content.model.cells];
  return cells.every((cell) => cell.executionCount) && panel.sessionContext.session.kernel.status === "idle";
}"""
ERRORS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].flatMap((cell) => cell.outputs.toJSON())
  .filter((output) => output.output_type === "error").map((output) => output.evalue)"""
ASK = """async (code) => {
  const request = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code });
  let text = "";
  request.onIOPub = (message) => { if (message.header.msg_type === "stream") text += message.content.text; };
  await request.done;
  return text.trim();
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A JupyterLab of its own, with one notebook: its address and folder."""
    tmp_path = tmp_path_factory.mktemp("lab")
    work = tmp_path / "work"
    (tmp_path / "cfg" / "labconfig").mkdir(parents=True)
    (tmp_path / "cfg" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    work.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, work / "view.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = dict(HOME="", JUPYTER_CONFIG_DIR="cfg", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="run",
                   JUPYTERLAB_SETTINGS_DIR="set", JUPYTERLAB_WORKSPACES_DIR="ws", IPYTHONDIR="ipython")
    environment = {**os.environ, **{name: str(tmp_path / folder) for name, folder in folders.items()},
                   "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
             f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True"],
            env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=1)
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", work
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture
def page(browser: Any, lab: tuple[str, Path]) -> Iterator[Any]:
    """The notebook, run from top to bottom as a person would; it must not fail nor ask any other machine."""
    address, _ = lab
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    page.wire = []
    page.on("websocket", lambda socket: [socket.on(way, lambda data: page.wire.append(len(data)))
                                         for way in ("framesent", "framereceived")])
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http")
            and not request.url.startswith(address) else None)
    workspace = f"{address}/lab/workspaces/w{time.time_ns()}"
    page.goto(f"{workspace}/tree/view.ipynb?token={TOKEN}", wait_until="domcontentloaded")
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.isReady", timeout=60_000)
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.ready")
    run_all(page)
    yield page
    context.close()
    assert wrong == []


def run_all(page: Any) -> None:
    """The menu's Run All Cells."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_timeout(300)
    page.wait_for_function(DONE, timeout=120_000)
    assert page.evaluate(ERRORS) == []
    page.locator(".mp-slider").wait_for()


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
    alive = "from ipywidgets.widgets.widget import _instances; print(len(_instances))"
    first = page.evaluate(ASK, alive)
    page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-InputArea-editor").click()
    for _ in range(20):
        page.keyboard.press("Control+Enter")
    page.wait_for_timeout(500)
    page.wait_for_function(DONE)
    page.locator(".mp-slider").wait_for()
    assert page.evaluate(ASK, alive) == first and page.locator(".mp").count() == 1
