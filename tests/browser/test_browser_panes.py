"""The views behind the tabs, as one file in a real browser: they show what the engine did, and a keyboard is enough."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from microscope_page import SCRUB, check_redraw, tab_to
from test_microscope import swapped
from test_panes import long_run
from test_widget import busy
from traces import NASTY, Witness, figure_7, figure_8, request, start
from workloads import make_workload, run

from minipaged import Trace
from minipaged import trace as ev
from minipaged.replay import replay
from minipaged.views.compare import save as save_pair
from minipaged.views.frame import labels, letters
from minipaged.views.html import save
from minipaged.views.sharing import every, sharing_of, summary

# A row's bars by the steps that they lie over: their place on the screen is read, not what they were told.
READ_TIMELINE = """() => {
  const steps = [...document.querySelectorAll(".mp-axis div span")].map((el) => Number(el.textContent));
  const place = (el) => { const { left, width } = el.getBoundingClientRect(); return [left, width]; };
  const ticks = [...document.querySelectorAll(".mp-axis div span")].map((el) => [Number(el.textContent), ...place(el)]);
  const [tick, left, wide] = ticks[0], step = (x) => Math.round(tick + (x - left) / wide);
  const rows = [...document.querySelectorAll(".mp-row")].map((row) => [row.querySelector("b").textContent,
    row.ariaLabel, [...row.querySelectorAll(".mp-did")].map((el) => { const [x, width] = place(el);
      return [el.textContent, step(x), step(x + width) - 1]; })]);
  return { rows, hint: document.querySelector(".mp-hint").textContent,
    chart: document.querySelector(".mp-used").getAttribute("d"),
    total: document.querySelector(".mp-chart span").textContent };
}"""


@pytest.fixture
def show(page: Any, tmp_path: Path) -> Callable[..., Any]:
    """Opens a trace as a standalone file, at one of its views."""
    def opened(events: list[ev.Event] | Trace, pane: str, step: int | None = None) -> Any:
        save(events, tmp_path / "view.html", step, pane)
        page.goto((tmp_path / "view.html").as_uri())
        page.wait_for_selector(".mp-slider")
        return page

    return opened


@pytest.fixture
def served(checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Witness, Trace]]:
    """Serves a random workload: what the engine did, and its trace."""
    def serve(seed: int) -> tuple[Witness, Trace]:
        witness, trace = Witness(monkeypatch), Trace()
        workload = make_workload(seed, lambda name: 512)
        run(workload, checkpoint(workload.name), trace)
        return witness, trace

    return serve


def steps_to_read(seed: int, iterations: int) -> list[int]:
    """Every step of three runs; of the others the first, the last and some between."""
    return list(range(iterations + 1)) if seed % 5 == 0 else [
        0, iterations, *random.Random(seed).choices(range(1, iterations + 1), k=4)]


def shown_rows(shown: dict[str, Any], steps: range) -> dict[str, str]:
    """Name to one letter per step of a range."""
    return {name: "".join(next((letter for letter, first, last in spans if first <= step <= last), " ")
                          for step in steps) for name, _, spans in shown["rows"]}


@pytest.mark.parametrize("seed", range(15))
def test_the_timeline_shows_what_the_engine_did(show: Callable, served: Callable, seed: int) -> None:
    witness, trace = served(seed)
    iterations, meaning = len(witness.did), {"P": "prefill", "D": "decode", "w": "waiting", "S": "swapped out",
                                             "R": "recomputed"}
    view, wanted = show(trace, "timeline", 0), {}
    for step, did in enumerate(witness.did, 1):
        for request_id, letter in did.items():
            wanted.setdefault(letters(request_id), [" "] * iterations)[step - 1] = letter
    for step in steps_to_read(seed, iterations):
        view.locator(".mp").evaluate(SCRUB, step)
        shown = view.evaluate(READ_TIMELINE)
        if iterations <= 60:
            rows = {name: "".join(row) for name, row in sorted(wanted.items())}
            assert shown_rows(shown, range(1, iterations + 1)) == rows
        used, host = (witness.device[step - 1], witness.host[step - 1]) if step else (0, 0)
        assert f"in step {step}: {used} of {trace.events[0].num_blocks}" in shown["hint"]
        assert f"on the host (dashed) {host}" in shown["hint"] or not any(witness.host)
        for name, label, _ in shown["rows"]:
            does = meaning.get(wanted[name][step - 1] if step else " ", "not there")
            assert label == f"request {name}: {does} in step {step}"
    assert shown["chart"].count("h1") == min(iterations, 60)


def test_a_long_trace_shows_a_window_and_all_of_it(show: Callable) -> None:
    view = show(long_run(2000), "timeline", 1000)
    spans = view.evaluate(READ_TIMELINE)["rows"][0][2]
    assert [letter for letter, *_ in spans] == ["D", "S", "D"] and spans[1][1:] == [1000, 1000]
    assert spans[0][1] <= 990 and spans[2][2] >= 1010
    lanes = view.locator(".mp-lane").all_text_contents()
    assert lanes == ["prefill, most 1", "decode, most 1", "swapped out, most 1"]
    box = view.locator(".mp-lane svg").first.bounding_box()
    view.mouse.click(box["x"] + box["width"] / 4, box["y"] + 5)
    assert abs(step_of_root(view) - 500) <= 2


def step_of_root(view: Any) -> int:
    return int(view.locator(".mp").get_attribute("data-step"))


def test_a_click_goes_to_the_step_and_a_double_click_to_its_memory(show: Callable) -> None:
    view = show(swapped(), "timeline", 1)
    box = view.locator(".mp-bars").bounding_box()
    view.mouse.click(box["x"] + box["width"] * 4.5 / 7, box["y"] + 5)
    assert step_of_root(view) == 5 and view.get_by_role("tab", selected=True).text_content() == "timeline"
    view.mouse.dblclick(box["x"] + box["width"] * 6.5 / 7, box["y"] + 5)
    assert step_of_root(view) == 7 and view.get_by_role("tabpanel", name="memory").is_visible()


def test_tabs_and_the_timeline_by_keyboard_alone(show: Callable) -> None:
    view = show(swapped(), "memory", 1)
    focused = "document.activeElement.textContent"
    tab_to(view, "focused.role === 'tab'", 12)
    assert view.evaluate(focused) == "memory"
    view.keyboard.press("ArrowLeft")
    assert view.evaluate(focused) == view.get_by_role("tab", selected=True).text_content() == "timeline"
    tab_to(view, "focused.matches('.mp-row')", 4)
    for _ in range(4):
        view.keyboard.press("ArrowRight")
    label = "request A: swapped out in step 5"
    assert view.evaluate("document.activeElement.ariaLabel") == label and step_of_root(view) == 5
    details = view.get_by_label("details").text_content()
    assert details == ("request Aarrives after step 0; prefill step 1; decode step 2; swapped out steps 5–6; ")
    view.keyboard.press("Enter")
    assert view.get_by_role("tabpanel", name="memory").is_visible() and step_of_root(view) == 5
    assert view.evaluate(focused) == "memory", "the focus is not lost"
    view.keyboard.press("3")
    assert view.get_by_role("tabpanel", name="timeline").is_visible()
    view.get_by_label("details").get_by_role("button", name="step 2").press("Enter")
    assert step_of_root(view) == 2


# The block of each box from the root to where a sequence's table ends, and all that stands on a box.
READ_TREE = """() => {
  const wayTo = (kids) => { const branch = kids.closest(".mp-branch");
    return branch ? [...wayTo(branch.parentElement.closest(".mp-kids") ?? document.body), ...branch.firstChild.children] : []; };
  const place = (el) => el.dataset.go;
  return { ends: [...document.querySelectorAll(".mp-end")].map((el) => [el.textContent, wayTo(el).map(place)]),
    nodes: [...document.querySelectorAll(".mp-node")].map((el) => [place(el), el.querySelector("b").textContent,
      [...el.querySelectorAll(".mp-slot")].map((slot) => slot.textContent), el.ariaLabel]),
    saving: document.querySelector(".mp-saving").textContent, detailed: document.querySelector(".mp-wordy") !== null };
}"""


@pytest.mark.parametrize("seed", range(15))
def test_the_tree_shows_what_the_engine_holds(show: Callable, served: Callable, seed: int) -> None:
    witness, trace = served(seed)
    view = show(trace, "sharing", 0)
    for step in steps_to_read(seed, len(witness.did)):
        view.locator(".mp").evaluate(SCRUB, step)
        shown, tree, state = view.evaluate(READ_TREE), sharing_of(trace.events, step), replay(trace.events, step)
        names, tables = labels(state), witness.tables[step - 1] if step else {}
        held = {names[seq]: [f"{'host' if state.on_host(seq) else 'device'} {block}" for block in table]
                for seq, table in tables.items()}
        ends = {text.split(" ")[0]: way for text, way in shown["ends"]}
        assert {name: ends.get(name) for name in held} == held, step
        assert sorted(text for text, _ in shown["ends"]) == sorted(end for node in every(tree.roots) for end in node.ends)
        wanted = [(f"{'host' if node.host else 'device'} {node.block}", node) for node in every(tree.roots)]
        assert sorted(place for place, *_ in shown["nodes"]) == sorted(place for place, _ in wanted)
        nodes = {place: node for place, node in wanted}
        for place, count, words, label in shown["nodes"]:
            node, mark = nodes[place], f" {nodes[place].mark}" if shown["detailed"] else ""
            assert count.strip() == ("freed" if node.mark == "freed" else f"×{node.readers}{mark}".strip())
            assert words == (node.words if shown["detailed"] else []) and node.mark in label
        said = summary(tree).split(": ")[1]
        assert shown["saving"] == f"After step {step}: {said}"


def test_a_sequence_shows_its_way_through_the_tree(show: Callable) -> None:
    view = show(figure_8(), "sharing", 2)
    view.get_by_role("button", name="table of A2 ends here").focus()
    assert view.eval_on_selector_all(".mp-node.mp-on", "els => els.map((el) => el.dataset.go)") == ["device 7", "device 1"]
    assert "sequence A2: 7 prompt tokens" in view.get_by_label("details").text_content()
    view.keyboard.press("ArrowLeft")
    assert view.evaluate("document.activeElement.ariaLabel") == "block 1, reference count 1, years ago our mothers"
    view.keyboard.press("ArrowUp")
    assert view.evaluate("document.activeElement.ariaLabel").startswith("block 3, reference count 1, copy of 1")
    assert "copied from 1 to 3 for A1" in view.get_by_label("details").text_content()


@pytest.mark.parametrize("pane", ["memory", "sharing", "timeline"])
def test_two_traces_are_stepped_together(page: Any, tmp_path: Path, pane: str) -> None:  # noqa: F811
    pair = swapped(), [event for event in swapped() if not isinstance(event, ev.SwapIn)]
    save_pair(pair, ("both", "<img src=x onerror=alert(1)>"), tmp_path / "pair.html", pane=pane)
    page.goto((tmp_path / "pair.html").as_uri())
    steps, said = page.locator(".mp-step"), page.locator(".mp-verdict [role=status]")
    for keys, step, verdict in (("", 7, "The first difference is in this step, 7."),
                                (",", 6, "The same so far; the first difference is in step 7."),
                                ("d", 7, "The first difference is in this step, 7.")):
        page.locator(".mp-slider").nth(1).focus()
        for key in keys:
            page.keyboard.press(key)
        assert steps.all_text_contents() == [f"step {step} of 7"] * 2 and said.text_content() == verdict
    assert page.locator(".mp-pair img").count() == 0 and page.locator("h3").nth(1).text_content().startswith("<img")


PANES = ["sharing", "timeline"]


@pytest.mark.parametrize("pane", PANES)
def test_text_of_others_shows_as_text(show: Callable, pane: str) -> None:
    events = [start(num_blocks=12), *request(0, NASTY, list(range(5)))]
    view = show([replace(events[0], model="<svg onload=alert(1)>"), *events[1:]], pane, 1)
    assert view.locator(".mp img, .mp script, .mp [onload]").count() == 0


@pytest.mark.parametrize("pane", PANES)
def test_a_trace_without_iterations(show: Callable, pane: str) -> None:
    for events in ([start()], figure_7()[:2]):
        show(events, pane).get_by_role("tab", name=pane).wait_for()


@pytest.mark.parametrize("pane", PANES)
def test_a_step_is_redrawn_within_33_ms(show: Callable, pane: str) -> None:
    """At the 90th percentile, for 256 blocks of 16 slots and 32 sequences; see `check_redraw`."""
    check_redraw(show(busy(330), pane, 20), 20)


@pytest.mark.parametrize("pane", PANES)
def test_2000_steps_open_at_once(show: Callable, pane: str) -> None:
    view = show(busy(2000), pane, 1000)
    opened = view.evaluate("performance.now()")
    print(pane, {"opened": opened})
    assert step_of_root(view) == 1000 and opened < 4000, "the bar is 2 s on an idle machine"
