"""The committed notebooks say what the code does: every output is compared by strict nbval."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbformat.v4 import new_code_cell, new_notebook, new_output
from run_notebooks import NOTEBOOKS, ROOT, SECONDS_PER_CELL, UnfitNotebook, environment, faults, normalise, run


def strict_nbval(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run every notebook of a folder and compare each output with the stored one."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--nbval",
               "--nbval-current-env", "--nbval-sanitize-with", str(NOTEBOOKS / "sanitize.cfg"),
               "--nbval-cell-timeout", str(SECONDS_PER_CELL), str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_notebook_is_fit(path: Path) -> None:
    found = list(faults(nbformat.read(path, as_version=4)))
    assert not found, "\n".join([*found, f"mend it, then: python tests/run_notebooks.py notebooks/{path.name}"])


def test_every_notebook_gives_its_stored_outputs() -> None:
    assert (done := strict_nbval(NOTEBOOKS)).returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "moves"), [
    ("09_the_papers_evaluation", [("rate", 0.25), ("memory", 0.5)]),
    ("10_ablations", [("block_size", 4), ("sequences", "6 beams")])])
def test_a_slider_is_answered_soon(name: str, moves: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds for the slowest moves; here thrice that, of processor time, so that only a real loss counts."""
    monkeypatch.chdir(NOTEBOOKS)
    there: dict[str, Any] = {}
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and (cell.source.startswith("import ") or "class Explorer" in cell.source):
            exec(cell.source, there)
    explorer = there["explorer"]
    for slider, value in moves:
        before, shown = time.process_time(), explorer.picture.value
        getattr(explorer, slider).value = value
        took = time.process_time() - before
        assert explorer.picture.value != shown and took < 6, f"{slider} at {value}: {took:.1f} s"
    explorer.close()


def stored(path: Path, *cells: str) -> Any:
    """Write a notebook of code cells, run it with the runner and read it back."""
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in cells]), path)
    run(path)
    return nbformat.read(path, as_version=4)


def test_strict_nbval_compares(tmp_path: Path) -> None:
    path = tmp_path / "table.ipynb"
    notebook = stored(path, "print('wall time 0.5 s')", "print('block 7')\n1 + 1")
    first = path.read_bytes()
    run(path)
    assert path.read_bytes() == first, "a rerun changes nothing"

    notebook.cells[0].outputs[0].text = "wall time 12.34 ms\n"
    nbformat.write(notebook, path)
    assert (done := strict_nbval(tmp_path)).returncode == 0, done.stdout + done.stderr

    notebook.cells[1].outputs[0].text = "block 1\n"
    nbformat.write(notebook, path)
    done = strict_nbval(tmp_path)
    assert done.returncode == 1 and "block 1" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("source", "reason"), [
    ("import sys; print('warning', file=sys.stderr)", "stderr"),
    ("object()", "memory address"),
    ("1 + 1;", "';'"),
    ("import ipywidgets; ipywidgets.IntSlider()", "still picture"),
    ("print('/home/ada/model')", "path of the machine"),
])
def test_runner_refuses_what_differs_elsewhere(tmp_path: Path, source: str, reason: str) -> None:
    path = tmp_path / "unfit.ipynb"
    with pytest.raises(UnfitNotebook, match=reason):
        stored(path, source)
    assert nbformat.read(path, as_version=4).cells[0].execution_count is None, "the file is left as it was"


def fit_notebook() -> Any:
    """A notebook as the runner leaves it, made without a kernel."""
    shown = new_output("display_data", {"text/plain": "view", "image/svg+xml": "<svg/>",
                                        "application/vnd.jupyter.widget-view+json": {"model_id": "f00"}})
    failed = new_output("error", ename="OutOfBlocks", evalue="free some", traceback=["File /home/ada/x.py"])
    notebook = new_notebook(cells=[
        new_code_cell("view", execution_count=1, outputs=[shown], metadata={"execution": {"iopub.status.busy": "now"}}),
        new_code_cell("fail()", execution_count=2, outputs=[failed], metadata={"tags": ["raises-exception"]}),
    ], metadata={"widgets": {}, "kernelspec": {"name": "mine", "display_name": "Mine"}})
    normalise(notebook, "fit")
    return notebook


def test_normalised_notebook_is_fit_and_always_the_same() -> None:
    notebook = fit_notebook()
    assert list(faults(notebook)) == []
    assert notebook == fit_notebook()
    assert set(notebook.cells[0].outputs[0].data) == {"text/plain", "image/svg+xml"}
    assert "x.py" not in nbformat.writes(notebook), "no traceback"
    assert "execution" not in notebook.cells[0].metadata, "no times"


@pytest.mark.parametrize("spoil", [
    lambda notebook: notebook.metadata.update(widgets={}),
    lambda notebook: notebook.metadata.kernelspec.update(name="mine"),
    lambda notebook: notebook.cells.clear(),
    lambda notebook: notebook.cells[0].update(execution_count=None),
    lambda notebook: notebook.cells[0].update(execution_count=5),
    lambda notebook: notebook.cells[0].update(source="clear_output()"),
    lambda notebook: notebook.cells[1].metadata.update(tags=[]),
], ids=["widget state", "kernel", "empty", "never run", "out of order", "clear_output", "untagged error"])
def test_guard_notices(spoil: Callable[[Any], None]) -> None:
    notebook = fit_notebook()
    spoil(notebook)
    assert list(faults(notebook)) != []


def test_the_stop_button_leaves_the_engine_usable() -> None:
    """A real kernel, interrupted in the middle of ``generate``, as JupyterLab's stop button does."""
    manager, client = start_new_kernel(kernel_name="python3", env=environment())
    try:
        def run_cell(source: str) -> tuple[str, dict[str, Any]]:
            printed: list[str] = []
            reply = client.execute_interactive(source, timeout=60, output_hook=lambda message: printed.append(
                message["content"].get("text", "")))
            return "".join(printed), reply["content"]

        _, made = run_cell("from minipaged import LLM, SamplingParams\nllm = LLM('tiny-opt', audit=True)")
        assert made["status"] == "ok", made
        timer = threading.Timer(2.0, manager.interrupt_kernel)
        timer.start()
        _, stopped = run_cell("while True:\n    llm.generate(['Once'] * 8, SamplingParams(max_tokens=200))")
        assert stopped["ename"] == "KeyboardInterrupt"
        printed, after = run_cell("pool = llm.block_manager.device\nassert pool.num_free == pool.num_blocks\n"
                                  "print(llm.generate('Once', SamplingParams(max_tokens=3))[0].finished)")
        assert after["status"] == "ok" and printed.strip() == "True", (printed, after)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
