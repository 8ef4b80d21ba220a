"""Run notebooks and store their outputs, the same way every time, so that a diff shows real changes only.

    python tests/run_notebooks.py                          # all of notebooks/
    python tests/run_notebooks.py notebooks/01_*.ipynb     # some

A notebook is written back only if it ran and is fit to be committed; else the reasons are printed.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
SECONDS_PER_CELL = 300
WIDGET = "application/vnd.jupyter.widget-view+json"
STILLS = {"image/png", "image/svg+xml"}
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
MACHINE_PATH = re.compile(rf"/(home|Users|root|tmp)/\w|{re.escape(str(ROOT))}")


class UnfitNotebook(Exception):
    """A notebook ran, but its outputs would not be the same, or not be seen, elsewhere."""


def environment() -> dict[str, str]:
    """The environment of every notebook run: this checkout, the bundled model, no network, no bytecode left behind."""
    kept = {name: value for name, value in os.environ.items() if name != "MINIPAGED_MODEL"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "MINIPAGED_AUDIT": "1",
            "PYTHONDONTWRITEBYTECODE": "1"}


def run(path: Path) -> None:
    """Execute a notebook in place.

    Raises
    ------
    CellExecutionError
        A cell failed that has no tag ``raises-exception``.
    UnfitNotebook
        It must not be committed as it is; the file is left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    # Without coalescing, how many outputs a loop of prints becomes depends on timing.
    client = NotebookClient(notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", coalesce_streams=True,
                            store_widget_state=False, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environment())
    normalise(notebook, path.stem)
    if found := list(faults(notebook)):
        raise UnfitNotebook("\n".join(f"{path.name}, {fault}" for fault in found))
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def normalise(notebook: Any, name: str) -> None:
    """Take out what differs between two runs: ids, times, versions, tracebacks; and widgets that have a picture."""
    notebook.metadata.clear()
    notebook.metadata.update(kernelspec=KERNEL, language_info={"name": "python"})
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha1(f"{name}-{number}".encode()).hexdigest()[:8]
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "error":  # a traceback names files of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
            data = output.get("data", {})
            if STILLS & data.keys():  # a stored widget has no model behind it: Lab would show an error instead
                data.pop(WIDGET, None)
        if "outputs" in cell:  # a widget alone was drawn live; a still of its end is another output of the cell
            cell.outputs = [output for output in cell.outputs if set(output.get("data", {"": 0})) != {WIDGET}]


def faults(notebook: Any) -> Iterator[str]:
    """What makes an executed notebook unfit to be committed: strict nbval does not notice these by itself."""
    if "widgets" in notebook["metadata"]:
        yield "metadata: widget state is stored; GitHub refuses such a notebook"
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "metadata: the kernel is not 'python3', which every installation has"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    if not code:
        yield "metadata: there is no code"
    for count, cell in enumerate(code, 1):
        yield from (f"code cell {count}: {fault}" for fault in _cell_faults(cell, count))


def _cell_faults(cell: Any, count: int) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["execution_count"] != count:
        yield "not run from top to bottom in one go; nbval compares nothing in a cell that was never run"
    if source.rstrip().endswith(";"):
        yield "a last ';' silences the result here, not under nbval; assign it to _ instead"
    if "clear_output" in source or "interact(" in source:
        yield "nbval does not follow clear_output and interact; show the view itself"
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = "".join(output.get("text", "")) + "".join("".join(data[m]) for m in data if m.startswith("text/"))
        if output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", []):
            yield f"fails with {output['ename']}; tag it raises-exception if that is the lesson"
        if output.get("name") == "stderr":
            yield f"writes to stderr: {text[:200]!r}"
        if ADDRESS.search(text):
            yield "prints a memory address, another one in every run; give the object a __repr__"
        if MACHINE_PATH.search(text + output.get("evalue", "")):
            yield "prints a path of the machine it ran on"
        if WIDGET in data:
            yield "shows a widget without a still picture; add image/svg+xml to its _repr_mimebundle_"


def main(argv: list[str]) -> int:
    """Run the notebooks named, or all; 1 if one fails or is unfit."""
    status = 0
    for path in [Path(name).resolve() for name in argv] or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(path.name, flush=True)
        try:
            run(path)
        except (CellExecutionError, UnfitNotebook) as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
