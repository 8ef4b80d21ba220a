"""Write the pictures of this folder out of the executed notebooks: python figures/from_notebooks.py

A code cell with ``"figure": "name"`` in its metadata is the source of ``name.svg``.
"""

from __future__ import annotations

from pathlib import Path

import nbformat

FIGURES = Path(__file__).parent
NOTEBOOKS = FIGURES.parent / "notebooks"


def pictures() -> dict[str, str]:
    """File name to drawing, of all notebooks."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "figure" in cell.metadata:
                drawings = [output.data["image/svg+xml"] for output in cell.outputs
                            if "image/svg+xml" in output.get("data", {})]
                found[f"{cell.metadata['figure']}.svg"] = drawings[-1]
    return found


if __name__ == "__main__":
    for name, drawing in pictures().items():
        (FIGURES / name).write_text(drawing, encoding="utf-8")
        print(name)
