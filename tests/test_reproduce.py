"""The paper's figures: ours beside its own numbers, the same files every time, and honest about what is missing."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minipaged import reproduce
from minipaged.cli import main
from minipaged.errors import InvalidConfig
from minipaged.reproduce import CannotWrite, UnknownFigure, blocks, costs, memory, paper, serving, sharing
from minipaged.reproduce.sheet import Curves, Figure, Job, Number, Sheet
from minipaged.simulate.clock import Moment, Outcome
from minipaged.simulate.systems import SYSTEMS
from minipaged.simulate.usage import Usage


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_unknown_figure_is_named_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "fig2", "fig99", "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "fig99" in error and "table1" in error and "fig9" in error and "Traceback" not in error
    assert not (tmp_path / "new").exists(), "nothing was begun"
    with pytest.raises(UnknownFigure):
        reproduce.chosen(["fig10"])
    assert reproduce.chosen(["FIG9", "fig8", "fig9"]) == ["fig8", "fig9"]
    assert reproduce.chosen(["all"]) == list(reproduce.FIGURES)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotWrite, match="name a folder"):
        reproduce.reproduce(["table1"], tmp_path / "file")


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    """Each in a process of its own, so that hash seeds and clocks differ."""
    for name in ("first", "second"):
        subprocess.run([sys.executable, "-m", "minipaged.cli", "reproduce", "table1", "fig11", "--out",
                        str(tmp_path / name)], check=True, capture_output=True)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == [f"{name}.{kind}" for name in ("fig11", "table1") for kind in ("csv", "png", "svg")]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_table_1_is_within_a_hundredth() -> None:
    numbers = memory.table_1({}).numbers
    assert [n.paper for n in numbers] == [15.7, 9.7, 60.1]
    assert all(abs(n.ours / n.paper - 1) < 0.01 for n in numbers), numbers


def test_figures_without_a_run_are_written_too(tmp_path: Path) -> None:
    assert list(reproduce.reproduce(["table1", "fig11"], tmp_path)) == ["table1", "fig11"]
    assert len(list(tmp_path.iterdir())) == 6


def test_figure_1_counts_what_is_held() -> None:
    assert memory.memory_at("Orca (Max)", 5) == pytest.approx(26 + 5 * 2048 * 819_200 / 1e9)
    assert 0.30 < (memory.memory_at("vLLM", 20) - 26) / 20 < 0.42


def test_figure_2_is_within_a_point_and_a_half() -> None:
    sheet = memory.figure_2({system: memory.saturated(system) for system in ("Orca (Pow2)", "vLLM")})
    assert len(sheet.numbers) == 8
    assert all(abs(n.ours - n.paper) < 1.5 for n in sheet.numbers)


def test_figure_2_is_the_mean_from_300_s_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(system: object, requests: object, until: float) -> list[Moment]:
        return [Moment(time, round(time), Usage(time, 0, 0, 0, 0)) for time in (100, 299, 300, 600, until - 1)]

    monkeypatch.setattr(memory, "play", play)
    used, running = memory.saturated("vLLM")
    assert used.tokens == running == (300 + 600 + 899) / 3


@pytest.mark.parametrize("name", blocks.FIGURES)
def test_the_live_engine_has_the_papers_tables(name: str) -> None:
    figure = blocks.FIGURES[name]
    numbers = figure.sheet({key: job.call(*job.args) for key, job in figure.plan(1).items()}).numbers
    assert len(numbers) == 4 and all(n.ours == n.paper for n in numbers)


def test_every_figure_can_be_drawn_from_nothing_and_says_how_it_has_its_numbers() -> None:
    for figure in reproduce.FIGURES.values():
        sheet = figure.sheet({})
        assert sheet.title and all(n.basis for n in sheet.numbers)


def test_a_missing_number_is_no_number() -> None:
    assert Number("x", 3.0, 2.0, "").ratio == "1.50" and Number("x", None, 2.0, "").ratio == "-"
    assert Number("x", 3.0, (2.0, 4.0), "").ratio == "inside" and Number("x", 5.0, (2.0, 4.0), "").ratio == "outside"


def test_where_a_curve_crosses() -> None:
    assert paper.crossing([(1, 0.1), (3, 1.0), (2, 0.1)], 0.55) == pytest.approx(2.5)
    assert paper.crossing([(1, 0.1), (2, 0.4)], 0.5) is None and paper.crossing([(1, 0.6), (2, 0.9)], 0.5) is None
    assert paper.crossing(paper.curves("fig12a")["vLLM"], 1.0) == pytest.approx(1.986, abs=0.0005), "as in the drawing"
    beyond = 0.5 + (0.554 - 0.5) * (0.5 - 0.0823) / (1 - 0.0823)  # from the last point to where it leaves the picture
    assert paper.crossing(serving.paper_curve("fig12a", "Orca (Max)"), 0.5) == pytest.approx(beyond)


def test_the_csv_has_ours_and_the_papers(tmp_path: Path) -> None:
    panel = Curves("panel", "x", "y", {"ours": [(1.0, 2.0)]}, {"ours": [(1.0, 3.0), (2.0, 4.0)]}, "fitted to x")
    reproduce.write("fig2", Sheet("title", [panel], [Number("saved", 20.0, (16.2, 30.5), "predicted")]), tmp_path)
    assert [tuple(row.values()) for row in rows(tmp_path / "fig02.csv")] == [
        ("panel", "ours", "1", "2", "3", "fitted to x"), ("panel", "ours", "2", "", "4", "fitted to x"),
        ("compared", "saved", "", "20", "16.2", "predicted"), ("compared", "saved", "", "20", "30.5", "predicted")]


def one_figure(monkeypatch: pytest.MonkeyPatch, second: Callable[[int], int]) -> None:
    """There is one figure, of two runs: of the first, which succeeds, it draws a point."""
    figure = Figure("half", lambda minutes: {"first": Job(abs, (-3,)), "second": Job(second, (0,))},
                    lambda found: Sheet("half", [Curves("p", "x", "y", {"a": [(1, float(found["first"]))]}, {}, "-")]))
    monkeypatch.setattr(reproduce, "FIGURES", {"fig2": figure})
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 1)


def _interrupt(_: int) -> int:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
    return 0


def test_an_interrupt_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    one_figure(monkeypatch, _interrupt)
    begun = time.monotonic()
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 130
    assert time.monotonic() - begun < 40, "the run that was under way was stopped"
    assert [row["ours"] for row in rows(tmp_path / "fig02.csv")] == ["3"]
    assert "Interrupted: 1 of its runs are missing" in capsys.readouterr().out


def _fail(_: int) -> int:
    raise InvalidConfig("a pool of no block; give one")


def test_an_error_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    one_figure(monkeypatch, _fail)
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 2
    assert [row["ours"] for row in rows(tmp_path / "fig02.csv")] == ["3"]
    said = capsys.readouterr()
    assert "1 of its runs are missing" in said.out and "give one" in said.err and "Traceback" not in said.err


# ---- serving ---------------------------------------------------------------------------------------------------------

def test_a_curve_goes_on_until_it_is_past_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def at_rate(system: str, server: str, workload: str, rate: float, minutes: float) -> Outcome:
        asked.append((server, workload, minutes))
        return Outcome(0.4 * rate, 1.0)

    monkeypatch.setattr(serving, "at_rate", at_rate)
    papers = [x for x, _ in paper.curves("fig12c")["Orca (Max)"]]
    points = serving.curve("fig12c", "Orca (Max)", 60)
    assert asked[0] == ("OPT-175B", "ShareGPT", 15), "a quarter of an hour, as in the paper"
    for panel, system, minutes in (("fig12f", "vLLM", 15), ("fig12f", "FasterTransformer", 60), ("fig12b", "vLLM", 60)):
        serving.curve(panel, system, 60)
        assert asked[-1][2] == minutes, "of FasterTransformer the artifact has an hour"
    rates = [x for x, _ in points]
    assert rates[:len(papers)] == papers and rates[-1] == pytest.approx(papers[-1] * 1.05**(len(rates) - len(papers)))
    assert points[-2][1] < 0.5 <= points[-1][1] and serving.crossing(points, 0.5) == pytest.approx(1.25, rel=0.01)


def bent(rate: float) -> Callable[[float], float]:
    """Latencies of a line that bends at this rate, and is at 4 s/token when the rate is half as much again."""
    return lambda x: 0.1 if x < rate else 0.1 + 7.8 * (x - rate) / rate


@pytest.mark.parametrize(("panel", "system", "bend", "rates"), [
    ("fig12a", "Orca (Max)", 0.55, [0.2, 0.3, 0.4, 0.5, 0.75]),  # the point beyond the picture, as the paper's line
    ("fig12a", "Orca (Max)", 0.45, [0.2, 0.3, 0.4, 0.45, 0.4625, 0.475, 0.5]),  # earlier than the paper's
    ("fig12a", "Orca (Max)", 0.74, [0.2, 0.3, 0.4, 0.5, 0.75, 0.7875]),
    ("fig12a", "vLLM", 1.9, [1, 1.25, 1.5, 1.75, 1.8, 1.9, 2]),
    ("fig16b", "vLLM", 27, [1, 24, 27, 27.75, 28.5, 30, 36])])  # the paper's passes between 42 and 43
def test_both_lines_are_read_at_the_same_rates(panel: str, system: str, bend: float, rates: list[float]) -> None:
    points = serving.until_late(panel, system, bent(bend))
    assert [x for x, _ in points] == pytest.approx(rates) and points == [(x, bent(bend)(x)) for x, _ in points]


def test_a_line_goes_on_beyond_the_picture_where_it_leaves_it() -> None:
    """The next rate is past the last visible point, and past where the line is seen to leave."""
    leaving = {(panel, system): max(points) for panel in [*serving.PANELS, *sharing.PANELS, "fig16a", "fig16b", "fig17"]
               for system, points in paper.curves(panel).items() if max(y for _, y in points) < 1}
    found = {case: rate for case in leaving if (rate := paper.next_rate(*case))}
    assert leaving.keys() - found.keys() == {("fig12b", "vLLM"), ("fig12c", "Orca (Max)"), ("fig12e", "Orca (Max)")}
    for (panel, system), rate in found.items():
        left = paper.printed("at 1 s/token").get(panel, {}).get(system, 0)
        assert leaving[panel, system][0] < rate and left < rate, (panel, system)
    assert paper.next_rate("fig12a", "Orca (Max)") == 0.75 and paper.next_rate("fig12a", "vLLM") is None


def test_figure_12_compares_every_curve_and_drops_none() -> None:
    plan = serving.figure_12_plan(60)
    assert len(plan) == 6 * 5
    halves = {(panel, system): [(x / 2, y) for x, y in serving.paper_curve(panel, system)] for panel, system in plan}
    sheet = serving.figure_12(halves)
    assert len(sheet.panels) == 6 and all(set(panel.paper) == set(panel.ours) for panel in sheet.panels)
    rates, ratios = sheet.numbers[:30], sheet.numbers[30:]
    assert [n.ratio for n in rates] == ["0.50"] * 30 and [n.ratio for n in ratios] == ["1.00"] * 12
    assert "rates: 50%" in sheet.notes[0] and "ratios: 0%" in sheet.notes[1]
    papers = {case: serving.paper_curve(*case) for case in plan}
    slower = papers | {(panel, "vLLM"): halves[panel, "vLLM"] for panel in serving.PANELS}
    numbers = serving.figure_12(slower).numbers
    assert [n.ratio for n in numbers[30:]] == ["0.50"] * 12, "vLLM's rate divided by Orca's"


def test_figure_13_is_what_the_papers_pool_holds() -> None:
    running = {system: serving.at_rate(system, "OPT-13B", "ShareGPT", 2.0, 20).running for system in SYSTEMS[1:4]}
    paper_has = paper.printed("fig13")["ShareGPT"]
    assert running["Orca (Max)"] == 7
    assert all(abs(running[system] / paper_has[system] - 1) < 0.05 for system in running), running


# ---- the cost of blocks ----------------------------------------------------------------------------------------------

def test_swapping_wins_from_the_papers_block_size_on() -> None:
    assert (costs.copies(1), costs.copies(256)) == (20_480, 80), "as the artifact counts them"
    for name in ("Swap in", "Swap out"):
        measured = dict(points := paper.curves("fig19a")[name])
        assert [costs.swap_ms(points, size) for size in (1, 256)] == pytest.approx([measured[1], measured[256]])
    *between, crossover = costs.figure_19({}).numbers
    assert crossover.ours == crossover.paper == 32
    assert len(between) == 7 and all(abs(n.ours / n.paper - 1) < 0.1 for n in between), between


def test_figure_18_has_nothing_of_ours_without_a_gpu() -> None:
    sheet = costs.figure_18({})
    assert all(n.ours is None for n in sheet.numbers) and all(row[3] is None for row in sheet.panels[0].rows())
    assert [round(n.paper, 1) for n in sheet.numbers[3:]] == [25.6, 19.0, 21.0]
