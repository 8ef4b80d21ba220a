"""Correct pictures in a browser: whatever the microscope shows of 200 random runs is what the engine itself held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from microscope_page import check_all
from test_jupyterlab import run_all
from witness import TRACES, witnessed

from minipaged.trace import to_json

CHUNKS, IN_A_NOTEBOOK = 8, range(0, TRACES, 40)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_file_shows_what_the_engine_held(chunk: int, show: Callable, checkpoint: Callable) -> None:
    for seed in range(chunk, TRACES, CHUNKS):
        witness = witnessed(seed, checkpoint)
        check_all(show(witness).locator(".mp"), witness.truths, witness.names())


def test_the_widget_shows_what_the_engine_held(notebook: Callable, lab: tuple[str, Path], checkpoint: Callable) -> None:
    cells = ["from minipaged.views import microscope"]
    for seed in IN_A_NOTEBOOK:
        # In ASCII: among the hard texts is half a character, which UTF-8 cannot write and no tokenizer makes.
        lines = [json.dumps(json.loads(to_json(event))) for event in witnessed(seed, checkpoint).events]
        (lab[1] / f"{seed}.jsonl").write_text("\n".join(lines) + "\n", "ascii")
        cells.append(f"microscope('{seed}.jsonl')")
    page = notebook(*cells)
    run_all(page)
    page.wait_for_function(f"document.querySelectorAll('.mp-slider').length === {len(IN_A_NOTEBOOK)}")
    for view, seed in zip(page.locator(".mp").all(), IN_A_NOTEBOOK):
        check_all(view, witnessed(seed, checkpoint).truths, witnessed(seed, checkpoint).names())
