"""A real browser, where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from run_notebooks import ROOT, environment

from minipaged import Trace
from minipaged.trace import Event
from minipaged.views.html import save

TOKEN = "test"
# Or a pop-up with news covers the notebook, cells out of sight are not drawn, and files change by themselves.
SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
            "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
            "@jupyterlab/docmanager-extension:plugin": {"autosave": False}}

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, without a screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright for Python is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; install it, or name one in the variable CHROMIUM")
    with playwright.sync_playwright() as api:
        chromium = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that must not fail nor ask for anything but its own file."""
    context = browser.new_context(viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    yield page
    context.close()
    assert wrong == []


@pytest.fixture
def show(page: Any, tmp_path: Path) -> Callable[..., Any]:
    """Opens a trace as a standalone file."""
    def opened(events: list[Event] | Trace, step: int | None = None) -> Any:
        save(events, tmp_path / "view.html", step)
        page.goto((tmp_path / "view.html").as_uri())
        page.wait_for_selector(".mp-slider")
        return page

    return opened


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A JupyterLab of its own: its address, and its folder with a copy of all notebooks, none of them run."""
    tmp_path = tmp_path_factory.mktemp("lab")
    work = tmp_path / "work"
    (tmp_path / "cfg" / "labconfig").mkdir(parents=True)
    (tmp_path / "cfg" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    shutil.copytree(ROOT / "figures", work / "figures")
    (work / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        book = nbformat.read(path, as_version=4)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(book, work / "notebooks" / path.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = dict(HOME="", JUPYTER_CONFIG_DIR="cfg", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="run",
                   JUPYTERLAB_SETTINGS_DIR="set", JUPYTERLAB_WORKSPACES_DIR="ws", IPYTHONDIR="ipython")
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
             f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True"],
            env={**environment(), **{name: str(tmp_path / folder) for name, folder in folders.items()}},
            stdout=log, stderr=log)
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
def opened(browser: Any, lab: tuple[str, Path]) -> Iterator[Callable[[str], Any]]:
    """Opens a notebook of the lab's folder in a page, which must not fail nor ask any other machine.

    The page has ``wire``, the bytes of each message between the browser and the server, and ``failures``, those of the
    messages that tell of an exception.
    """
    address, _ = lab
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []

    def open_path(path: str) -> Any:
        page = context.new_page()
        page.wire, page.failures = [], []

        def heard(message: str | bytes) -> None:
            page.wire.append(len(message))
            if b'"ename"' in (message.encode() if isinstance(message, str) else message):
                page.failures.append(message)

        page.on("websocket", lambda socket: [socket.on(way, heard) for way in ("framesent", "framereceived")])
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http")
                and not request.url.startswith(address) else None)
        page.goto(f"{address}/lab/workspaces/w{time.time_ns()}/tree/{path}?token={TOKEN}",
                  wait_until="domcontentloaded")
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.isReady", timeout=180_000)
        page.evaluate("jupyterapp.shell.currentWidget.sessionContext.ready")
        return page

    yield open_path
    context.close()
    assert wrong == []


@pytest.fixture
def notebook(opened: Callable[[str], Any], lab: tuple[str, Path]) -> Callable[..., Any]:
    """Opens a notebook of these cells."""
    def made(*sources: str) -> Any:
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        name = f"n{hash(sources)}.ipynb"  # the same cells get the same kernel again
        nbformat.write(book, lab[1] / name)
        return opened(name)

    return made
