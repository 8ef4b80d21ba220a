"""The paper's tables and figures, made again by this code, the paper's own points drawn beside: `reproduce`."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tqdm import tqdm

from ..errors import MinipagedError
from . import blocks, costs, lengths, memory, prompts, serving, sharing
from .sheet import Figure, Job, Sheet

FIGURES: dict[str, Figure] = {**memory.FIGURES, **blocks.FIGURES, **lengths.FIGURES, **serving.FIGURES,
                              **sharing.FIGURES, **prompts.FIGURES, **costs.FIGURES}
MINUTES = 60.0  # of simulated arrivals behind each point of a curve


class UnknownFigure(MinipagedError, ValueError):
    """A name that is no figure or table of the paper's evaluation."""


class CannotWrite(MinipagedError, OSError):
    """The folder for the figures cannot be written to."""


def chosen(names: Iterable[str]) -> list[str]:
    """The figures that are meant, each once, in the paper's order; ``all`` means all.

    Raises
    ------
    UnknownFigure
        One of the names is none; the message lists those that are.
    """
    asked = {name.lower() for name in names}
    if unknown := asked - FIGURES.keys() - {"all"}:
        raise UnknownFigure(f"there is no {', '.join(sorted(unknown))} here; choose from {', '.join(FIGURES)}, or all")
    return [name for name in FIGURES if name in asked or "all" in asked]


def reproduce(names: Iterable[str], out: Path, minutes: float = MINUTES) -> dict[str, Sheet]:
    """Make figures: write each as .svg, .png and .csv and print its numbers beside the paper's.

    The jobs of all figures run on all processors. A figure is written as soon as its jobs are done; if Ctrl-C or an
    error ends them, those that were begun are written with what there is.

    Parameters
    ----------
    names : names of figures
        As in `FIGURES`, or ``all``.
    out : Path
        A folder; it is made.
    minutes : float
        Of simulated arrivals behind each point of a curve. The paper has an hour, and 15 minutes for OPT-175B.

    Raises
    ------
    UnknownFigure, CannotWrite
        Before anything is computed.
    """
    figures = {name: FIGURES[name] for name in chosen(names)}
    _check_folder(out)
    plans = {name: figure.plan(minutes) for name, figure in figures.items()}
    done: dict[Job, Any] = {}
    sheets: dict[str, Sheet] = {}

    def finish(name: str) -> None:
        """Write a figure from those of its runs that are done."""
        found = {key: done[job] for key, job in plans[name].items() if job in done}
        sheets[name] = write(name, figures[name].sheet(found), out, missing=len(plans[name]) - len(found))

    for name in figures:
        if not plans[name]:
            finish(name)
    jobs = list(dict.fromkeys(job for plan in plans.values() for job in plan.values()))
    try:
        for job, value in _run(jobs) if jobs else ():
            done[job] = value
            for name in figures.keys() - sheets.keys():
                if all(job in done for job in plans[name].values()):
                    finish(name)
    except (KeyboardInterrupt, Exception):  # whatever ends it: what was computed is kept
        for name in figures.keys() - sheets.keys():
            if any(job in done for job in plans[name].values()):
                finish(name)
        raise
    return sheets


def write(name: str, sheet: Sheet, out: Path, missing: int = 0) -> Sheet:
    """Write the three files of a figure and print its numbers."""
    from .drawing import save  # matplotlib takes a second; no other subcommand needs it

    if missing:
        sheet.notes.append(f"Interrupted: {missing} of its runs are missing.")
    path = out / file_name(name)
    save(sheet, path)
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["panel", "series", "x", "ours", "paper", "how we have it"])
        for panel in sheet.panels:
            rows.writerows([_digits(cell) for cell in row] for row in panel.rows())
        for number in sheet.numbers:
            ends = number.paper if isinstance(number.paper, tuple) else (number.paper,)
            rows.writerows(["compared", number.what, "", _digits(number.ours), _digits(end), number.basis]
                           for end in ends)
    tqdm.write(f"\n{sheet}\n{path}.svg, .png, .csv")
    return sheet


def file_name(figure: str) -> str:
    """``fig02`` for ``fig2``, so that a folder lists them in order."""
    return f"fig{int(figure[3:]):02}" if figure.startswith("fig") else figure


def _digits(cell: object) -> object:
    return f"{cell:.6g}" if isinstance(cell, float) else cell


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CannotWrite(f"cannot write to {out}: {error.strerror}; name a folder that you may write to") from error


def _run(jobs: list[Job]) -> Iterable[tuple[Job, Any]]:
    """Each job with its result, as they come, from as many processes as there are processors."""
    # Not forked: torch's threads do not survive it.
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1), _leave_ctrl_c_to_us) as pool:
        yield from tqdm(pool.imap_unordered(_do, jobs), total=len(jobs), unit="run")


def _do(job: Job) -> tuple[Job, Any]:
    return job, job.call(*job.args)


def _leave_ctrl_c_to_us() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
