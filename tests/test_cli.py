"""The command line: what it starts, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import minipaged
from minipaged import cli
from minipaged.errors import UnknownModel

COMMAND = [sys.executable, "-m", "minipaged.cli"]
PROMPT = "Four score and seven years ago our"
ENV = {**os.environ, "HF_HUB_OFFLINE": "1"}


# ---------------------------------------------------------------- lab
@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with two notebooks."""
    (tmp_path / "notebooks").mkdir()
    for name in ("02_later.ipynb", "01_first.ipynb"):
        (tmp_path / "notebooks" / name).write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    return tmp_path


@pytest.fixture
def desktop(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Linux, a screen, not root."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    return monkeypatch


def test_lab_opens_notebook_01(checkout: Path, desktop: pytest.MonkeyPatch) -> None:
    assert cli.lab_options(checkout, []) == [f"--ServerApp.root_dir={checkout}",
                                             "--LabApp.default_url=/lab/tree/notebooks/01_first.ipynb"]


def test_lab_without_a_screen_opens_no_browser(checkout: Path, desktop: pytest.MonkeyPatch) -> None:
    desktop.delenv("DISPLAY")
    assert "--no-browser" in cli.lab_options(checkout, [])
    desktop.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert "--no-browser" not in cli.lab_options(checkout, [])
    desktop.delenv("WAYLAND_DISPLAY")
    desktop.setattr(sys, "platform", "darwin")
    assert "--no-browser" not in cli.lab_options(checkout, []), "a Mac has a screen and no DISPLAY"


def test_lab_may_run_as_root(checkout: Path, desktop: pytest.MonkeyPatch) -> None:
    desktop.setattr(os, "geteuid", lambda: 0)
    assert "--allow-root" in cli.lab_options(checkout, [])


def test_lab_passes_other_options_on(checkout: Path, desktop: pytest.MonkeyPatch) -> None:
    launched: list[list[str]] = []
    desktop.setattr(cli, "CHECKOUT", checkout)
    desktop.setattr("jupyterlab.labapp.LabApp.launch_instance", launched.append)
    assert cli.main(["lab", "--port", "9000", "--ServerApp.ip=0.0.0.0"]) == 0
    assert launched[0][-3:] == ["--port", "9000", "--ServerApp.ip=0.0.0.0"]


def test_lab_without_notebooks_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main(["lab"]) == 2
    assert "pip install -e ." in capsys.readouterr().err


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """`minipaged lab` in a process of its own, with settings of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
               "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    env = {**ENV, "HOME": str(tmp_path), **{name: str(tmp_path / name.lower()) for name in folders}}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([*COMMAND, "lab", "--no-browser", "--port", str(port), "--ServerApp.ip=127.0.0.1",
                                    "--ServerApp.port_retries=0", "--IdentityProvider.token=t"],
                                   env=env, cwd=cli.CHECKOUT, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}", log=log)
    finally:
        process.kill()
        process.wait()


def ask(server: SimpleNamespace, path: str, data: bytes | None = None) -> bytes:
    """The server's answer, waiting until it is up."""
    request = urllib.request.Request(server.url + path, data, {"Authorization": "token t"})
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            pytest.fail(f"{path}: {error}\n{server.log.read_text()}")
        except OSError:
            if server.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server is not up\n{server.log.read_text()}")
            time.sleep(0.1)


def test_lab_serves_notebook_01_and_leaves_nothing_behind(server: SimpleNamespace) -> None:
    first = next((cli.CHECKOUT / "notebooks").glob("01_*.ipynb")).name
    assert b"jupyter-config-data" in ask(server, f"/lab/tree/notebooks/{first}")
    assert json.loads(ask(server, f"/api/contents/notebooks/{first}"))["type"] == "notebook"
    assert f"{server.url}/lab/tree/notebooks/{first}?token=" in server.log.read_text(), "the address is printed"

    ask(server, "/api/kernels", b"{}")
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert sys.executable in [child.cmdline()[0] for child in children], "the kernel has minipaged"
    server.process.terminate()
    server.process.wait(20)
    assert psutil.wait_procs(children, timeout=20)[1] == [], "no kernel outlives the server"


# ---------------------------------------------------------------- generate
class FakeLLM:
    """Yields what the test says; notes how it was made and whether it was closed."""

    script: list[Any] = []
    made: list["FakeLLM"] = []

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options, self.closed = model, options, False
        self.made.append(self)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def stream(self, prompt: str, params: Any) -> Iterator[Any]:
        """The texts of the script, one after the other; exceptions in it are raised."""
        self.params = params
        for number, item in enumerate(self.script):
            if isinstance(item, BaseException):
                raise item
            yield SimpleNamespace(outputs=[SimpleNamespace(text=item)], block_tables=[f"table {number}"])


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """`minipaged.LLM`, replaced."""
    monkeypatch.setattr(minipaged, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(FakeLLM, "script", [" a", " a b", " a b c"])
    monkeypatch.setattr(FakeLLM, "made", [])
    return FakeLLM


def test_generate_prints_each_token_once_then_the_last_table(llm: type[FakeLLM],
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--block-size", "8", "--model", "m", "--max-tokens", "3", "--temperature", "0.5",
                     "--top-p", "0.9", "--top-k", "7", "--seed", "1"]) == 0
    assert capsys.readouterr().out == "x a b c\n\ntable 2\n"
    (made,) = llm.made
    assert (made.model, made.options["block_size"], made.closed) == ("m", 8, True)
    assert made.params == minipaged.SamplingParams(temperature=0.5, top_p=0.9, top_k=7, max_tokens=3, seed=1)


@pytest.mark.parametrize(("error", "status", "message"), [
    (UnknownModel("no such model; give a folder"), 2, "minipaged: no such model; give a folder\n"),
    (KeyboardInterrupt(), 130, "\n"),
])
def test_generate_ends_cleanly(llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int,
                               message: str, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llm, "script", [" a", error])
    assert cli.main(["generate", "x"]) == status
    assert capsys.readouterr().err == message
    assert llm.made[0].closed


@pytest.mark.parametrize(("arguments", "message"), [
    (["--max-tokens", "0"], "max_tokens is 0"),
    (["--trace", "no/such/folder/t.jsonl"], "cannot write the trace"),
])
def test_generate_refuses_before_a_model_is_loaded(llm: type[FakeLLM], arguments: list[str], message: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert llm.made == []


@pytest.mark.parametrize("arguments", [[], ["generate"], ["generate", "x", "--port", "1"], ["fly"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2 and "usage: minipaged" in capsys.readouterr().err


def test_no_torch_before_it_is_needed() -> None:
    code = ("import contextlib, sys; from minipaged import cli\n"
            "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
            "cli.lab_options(cli.CHECKOUT, [])\n"
            "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], env=ENV, cwd=cli.CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_generate_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    done = subprocess.run([*COMMAND, "generate", PROMPT, "--trace", str(path)], env=ENV, cwd=cli.CHECKOUT,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{PROMPT} fathers brought forth on this continent")
    assert json.loads(path.read_text().splitlines()[0])["block_size"] == 4

    with minipaged.LLM("tiny-opt", block_size=4) as llm:
        *_, last = llm.stream(PROMPT, minipaged.SamplingParams(temperature=0, max_tokens=32))
    assert done.stdout.startswith(PROMPT + last.outputs[0].text + "\n\n"), "no token lost or printed twice"
    # Which physical blocks there are depends on the machine's memory; how they are filled does not.
    rows = [line.split() for line in done.stdout.split("filled\n")[-1].splitlines()[1:]]
    table = last.block_tables[0]
    assert [(row[0], row[2]) for row in rows] == [(str(i), f"{table.filled(i)}/4") for i in range(len(table.blocks))]
    assert table.num_tokens >= len(last.prompt_token_ids) + len(last.outputs[0].token_ids) - 1, "not yet freed"


CLOSED_PIPE = """
import minipaged, sys
from minipaged import cli
from test_cli import FakeLLM
minipaged.LLM = FakeLLM
FakeLLM.script = ["y" * 99999 * length for length in range(9)]
sys.exit(cli.main(["generate", "x"]))
"""


def test_generate_into_a_pipe_that_closes() -> None:
    process = subprocess.Popen([sys.executable, "-c", CLOSED_PIPE], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**ENV, "PYTHONPATH": f"{cli.CHECKOUT}{os.pathsep}{Path(__file__).parent}"})
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


# ---------------------------------------------------------------- view, kernels
def test_a_recorded_run_becomes_one_html_file(tmp_path: Path) -> None:
    trace, page = tmp_path / "run.jsonl", tmp_path / "run.html"
    assert cli.main(["generate", PROMPT, "--max-tokens", "3", "--trace", str(trace)]) == 0
    assert cli.main(["view", str(trace)]) == 0
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")


def test_a_bad_trace_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "run.jsonl"
    trace.write_text('{"kind": "start"')
    assert cli.main(["view", str(trace)]) == 2
    assert "run.jsonl, line 1" in capsys.readouterr().err
    assert cli.main(["view", str(tmp_path / "none.jsonl")]) == 2
    assert "name a trace" in capsys.readouterr().err


def test_the_report_on_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    assert cli.main(["kernels", "--report"]) == 0
    printed = capsys.readouterr().out
    assert "decode" in printed and "sm_90" in printed and "no measurement" in printed
