"""The microscope, as one file in a real browser: it shows what the trace says, and a keyboard is enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microscope_page import check_picture, check_redraw, read, scrub, tab_to
from test_widget import busy
from traces import NASTY, figure_7, figure_8, request, start
from witness import Truth

from minipaged import LLM, Trace
from minipaged import trace as ev
from minipaged.replay import replay
from minipaged.views.frame import labels, visible
from minipaged.views.html import save


def step_of(page: Any) -> int:
    return read(page)["step"]


# ---- by keyboard alone -----------------------------------------------------------------------------------------------

def test_keys_step_jump_and_play(show: Callable) -> None:
    page = show(swapped(), 0)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "first step"
    for key, step in [(".", 1), (".", 2), (",", 1), (">", 7), ("<", 0), ("c", 2), ("p", 5), ("s", 7), ("Shift+S", 5),
                      ("Shift+C", 2), ("Shift+C", 2)]:
        page.keyboard.press(key)
        assert step_of(page) == step, key
    assert page.get_by_role("status").text_content() == "There is no earlier copy."
    page.get_by_label("step", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert step_of(page) == 3
    page.keyboard.press("<")
    page.get_by_label("steps per second").select_option("30")
    page.get_by_role("button", name="Play").press("Space")
    page.locator('.mp[data-step="7"]').wait_for()
    page.get_by_role("button", name="Play").wait_for()


def test_buttons_jump(show: Callable) -> None:
    page = show(swapped(), 0)
    for name, step in [("next copy 1", 2), ("next preempt 1", 5), ("next swap 2", 7)]:
        page.get_by_role("button", name=name).click()
        assert step_of(page) == step
    page = show(figure_7(), 0)
    assert page.get_by_role("button", name="next copy").is_disabled()


def test_arrows_reach_blocks_and_say_all_about_them(show: Callable) -> None:
    page = show(figure_8(), 2)
    tab_to(page, "focused.closest('.mp-device') !== null")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.ariaLabel") == (
        "block 3, 4 of 4 slots filled, reference count 1, read by A1:1, taken in this step")
    details = page.get_by_label("details")
    assert "block 3: read by A1 as its logical block 1" in details.text_content()
    assert [slot.text_content() for slot in details.locator(".mp-slot").all()] == ["years", "ago", "our", "fathers"]
    assert "step 2 written by A1; step 2 copied from 1 to 3 for A1;" in details.text_content()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert "History, latest first: step 2 written by A2; step 2 copied from 1 to 3 for A1; step 1 shared by A2" in (
        details.text_content())
    details.get_by_role("button", name="step 1").first.press("Enter")
    assert step_of(page) == 1


def test_a_sequence_tells_its_text_and_where_each_token_is(show: Callable) -> None:
    page = show(figure_7(), 3)
    page.get_by_role("button", name="sequence A, running, 9 tokens in 3 blocks").click()
    details = page.get_by_label("details")
    assert details.locator("h4").text_content() == "sequence A: 7 prompt tokens, 2 generated"
    tokens = [(token.text_content(), token.get_attribute("title")) for token in details.locator(".mp-token").all()]
    words = "Four score and seven years ago our fathers brought".split()
    places = [(block, slot) for block in (7, 1) for slot in range(4)] + [(3, 0)]
    assert tokens == [(word, f"position {i}: block {block}, slot {slot}")
                      for i, (word, (block, slot)) in enumerate(zip(words, places))]
    details.get_by_role("button", name="brought").click()
    assert "block 3: read by A as its logical block 2" in details.text_content()
    page.keyboard.press("Escape")
    assert "Point at a block" in details.text_content()


def test_hover_shows_a_block_while_it_lasts(show: Callable) -> None:
    page = show(figure_7(), 4)
    page.locator('[data-go="device 5"].mp-block').hover()
    assert "block 5: read by B as its logical block 0" in page.get_by_label("details").text_content()
    assert page.locator(".mp-links .mp-on").count() == 1
    page.get_by_role("status").hover()
    assert "Point at a block" in page.get_by_label("details").text_content()


def test_a_registered_prefix_is_told_from_what_runs(show: Callable) -> None:
    with LLM("tiny-opt", trace=Trace(), block_size=4, num_gpu_blocks_override=9) as llm:
        llm.register_prefix("Four score and seven years ago")
    queues = read(show(llm.trace))["queues"]
    assert [len(queues[name]) for name in ("running", "swapped", "prefix", "waiting")] == [0, 0, 1, 0]


# ---- what moved ------------------------------------------------------------------------------------------------------

def swapped() -> list[ev.Event]:
    """Figure 8, then both samples swapped out and in again."""
    return [*figure_8(), ev.Begin(3), ev.Begin(4), ev.Preempt(5, 0, "no free block", "swap"),
            ev.SwapOut(5, 0, [[7, 0], [3, 1], [1, 2]]), ev.Begin(6), ev.SwapIn(7, 0, [[0, 8], [1, 6], [2, 5]])]


def test_copies_and_swaps_are_drawn_from_where_to_where(show: Callable) -> None:
    page = show(swapped(), 2)

    def arrows() -> int:
        return page.locator(".mp-moves .mp-move").count()

    def marked(name: str) -> list[str]:
        return page.eval_on_selector_all(f".mp-block.mp-{name}", "els => els.map((el) => el.dataset.go)")

    assert (arrows(), marked("src"), marked("dst")) == (1, ["device 1"], ["device 3"])
    shown = scrub(page, 5)
    assert (arrows(), marked("src")) == (3, ["device 1", "device 3", "device 7"])
    assert marked("dst") == ["host 0", "host 1", "host 2"]
    titles = [row["title"] for row in shown["queues"]["swapped"]]
    assert titles == [f"A{i} 8 tokens in 2 blockspreempted: swap (no free block)" for i in (1, 2)]
    assert shown["said"] == "A preempted: swap (no free block) · A swapped out: 3 blocks"
    shown = scrub(page, 7)
    assert (arrows(), marked("src")) == (3, ["host 0", "host 1", "host 2"])
    assert marked("dst") == ["device 5", "device 6", "device 8"]
    assert shown["said"] == "A swapped in: 3 blocks" and "swapped in" in shown["queues"]["running"][0]["title"]
    assert scrub(page, 3)["said"] == "Nothing moved."
    assert page.evaluate("getComputedStyle(document.querySelector('.mp-slot')).animationName") == "none"


def test_nothing_is_animated_for_who_wants_no_motion(browser: Any, show: Callable, page: Any) -> None:
    scrub(show(swapped(), 0), 5)
    animated = "getComputedStyle(document.querySelector('.mp-moving')).animationName"
    assert page.evaluate(animated) == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(animated) == "mp-travel"


# ---- bad and hostile traces ------------------------------------------------------------------------------------------

def test_hostile_tokens_show_as_text(show: Callable) -> None:
    nasty = [*NASTY, "\u2028", "</noscript>", "<svg onload=alert(1)>"]
    for blocks in (12, 300):  # every slot, and cells
        page = show([start(num_blocks=blocks), *request(0, nasty, list(range(6)))], 1)
        page.get_by_role("button", name="sequence A").click()
        shown = page.eval_on_selector_all(".mp-details .mp-token", "els => els.map((el) => el.textContent)")
        assert shown == [visible(text) for text in nasty]
        assert page.locator(".mp img, .mp script, .mp [onload]").count() == 0


def test_a_broken_file_says_so(page: Any, tmp_path: Path) -> None:
    save(figure_7(), tmp_path / "view.html")
    text = (tmp_path / "view.html").read_text("utf-8")
    data = json.loads(text.split('id="values">')[1].split("</script>")[0])["bytes"]["data"]
    for wrong in (data[:40], "AAAA"):
        (tmp_path / "view.html").write_text(text.replace(data, wrong), "utf-8")
        page.goto((tmp_path / "view.html").as_uri())
        assert page.get_by_role("alert").text_content().startswith("This trace cannot be shown: ")


# ---- how fast --------------------------------------------------------------------------------------------------------

def test_a_step_is_redrawn_within_33_ms(show: Callable) -> None:
    """At the 90th percentile, for 256 blocks of 16 slots and 32 sequences; see `check_redraw`."""
    page = show(busy(330), 20)
    assert len(read(page)["device"]) == 256 and len(read(page)["queues"]["running"]) >= 30
    check_redraw(page, 20)


def test_2000_steps_open_at_once(show: Callable) -> None:
    page = show(busy(2000), 1000)
    opened = page.evaluate("performance.now()")
    print({"opened": opened, "painted": page.evaluate("performance.getEntriesByType('paint').map((p) => p.startTime)")})
    assert step_of(page) == 1000 and opened < 4000, "the bar is 2 s on an idle machine"
    state = replay(busy(2000), 1999)  # no engine ran here, but the replay is held to the engine elsewhere
    queues = {"running": list(state.tables), "swapped": [], "prefix": [],
              "waiting": [seq for seq, of in state.request_of.items() if state.status[of] == "waiting"]}
    truth = Truth(16, state.tables, state.num_tokens, set(), state.tokens, state.prompt_len, queues,
                  {False: state.ref_counts, True: state.host_ref_counts})
    check_picture(scrub(page, 1999), truth, labels(state))
