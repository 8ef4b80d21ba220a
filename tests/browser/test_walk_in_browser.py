"""The attention walk in a real browser: at every entry it shows what the record says, and a keyboard is enough."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
from test_walk import by_hand, random_walk, running
from traces import NASTY

from minipaged.views import attention_walk
from minipaged.views.frame import visible
from minipaged.views.walk import Walk
from minipaged.walk import walk_of

# Everything that a viewer can read off the page.
READ = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)], text = (selector) => document.querySelector(selector).textContent;
  const cells = (row) => [...row.querySelectorAll("td")].map((cell) => cell.textContent);
  return { at: Number(document.querySelector(".wk").dataset.at), step: text(".mp-step"), title: text(".wk-title"), said: text(".wk-said"),
    table: all(".wk-entry").map((el) => [el.textContent, el.ariaLabel]), later: all(".wk-later").map((el) => el.textContent),
    block: text(".wk-slots caption"), slots: all(".wk-slots tbody tr").map(cells),
    shares: all(".wk-share i").map((el) => parseFloat(el.style.width)),
    sums: all(".wk-sums tbody tr").map(cells), shrunk: all(".wk-shrunk").length,
    accumulator: [...document.querySelector(".wk-now").getAttribute("d").matchAll(/v(-?[\\d.]+)h/g)].map((m) => -m[1]),
    kept: [...document.querySelector(".wk-kept").getAttribute("d").matchAll(/v(-?[\\d.]+)h/g)].map((m) => -m[1]),
    weights: all(".wk-weights > div").map((el) => [...el.querySelectorAll("span, small")].map((part) => part.textContent)),
    heights: all(".wk-weights i").map((el) => parseFloat(el.style.height)),
    drawn: [...(document.querySelector(".wk-weights path")?.getAttribute("d") ?? "").matchAll(/v(-?[\\d.]+)h/g)].map((m) => -m[1]),
    heading: text(".wk-head"), end: text(".wk-end") };
}"""


@pytest.fixture
def show(page: Any, tmp_path: Path) -> Callable[..., Any]:
    """Opens a walk as a standalone file."""
    def opened(walk: Walk, at: int | None = 0) -> Any:
        attention_walk(walk, at).to_html(tmp_path / "walk.html")
        page.goto((tmp_path / "walk.html").as_uri())
        page.wait_for_selector(".wk-entry")
        return page

    return opened


def near(shown: str, value: float) -> bool:
    """Whether two decimals are this number; it came with six digits."""
    return abs(float(shown) - value) <= 0.005 + 1e-4 * max(1.0, abs(value))


def check_picture(shown: dict[str, Any], walk: Walk, at: int) -> None:
    """What the page shows is the record after that entry."""
    entry, before, last = walk.entries[at], walk.entries[at - 1] if at else None, len(walk.entries) - 1
    assert (shown["at"], shown["step"]) == (at, f"entry {at} of 0–{last}")
    state = [f"entry {i}, block {e.block}, {'read' if i < at else 'read now' if i == at else 'not read yet'}"
             for i, e in enumerate(walk.entries)]
    assert shown["table"] == [[f"{i} → block {e.block}", state[i]] for i, e in enumerate(walk.entries)]
    assert shown["later"] == [f"{len(walk.later)} more, after the query: not read"] * bool(walk.later)
    assert shown["block"] == f"physical block {entry.block}: {walk.block_size} slot{'s' * (walk.block_size != 1)}"
    tokens = list(map(visible, entry.tokens)) + [""] * (walk.block_size - len(entry.tokens))
    assert [row[:2] for row in shown["slots"]] == [[str(i), token] for i, token in enumerate(tokens)]
    for i, (_, _, score, share, _) in enumerate(shown["slots"]):
        if i < len(entry.scores):
            assert near(score, entry.scores[i]) and near(share, exp(entry.scores[i] - entry.largest))
        else:
            assert (score, share) == ("masked" if i < len(entry.tokens) else "empty", "")
    assert shown["shares"] == pytest.approx([100 * exp(s - entry.largest) for s in entry.scores], abs=0.01)
    (m_before, _, m), (l_before, rescaled, total) = shown["sums"]
    assert near(m, entry.largest) and near(total, entry.total)
    assert shown["shrunk"] == int(before is not None and entry.shrink < 1)
    if before is None:
        assert (m_before, l_before, rescaled) == ("–", "0.00", "–") and shown["kept"] == []
    else:
        assert near(m_before, before.largest) and near(l_before, before.total)
        factor, product = rescaled.removeprefix("× ").split(" = ")
        assert near(factor, entry.shrink) and near(product, before.total * entry.shrink)
        assert shown["kept"] == pytest.approx(bars([w * entry.shrink for w in before.weighted], walk), abs=0.02)
    assert shown["accumulator"] == pytest.approx(bars(entry.weighted, walk), abs=0.02)
    check_weights(shown, walk, at)
    assert shown["end"] == ("" if at < last else "output = accumulator / l · largest difference to plain softmax "
                            "attention (Eq. 3): less than 1e-5")


def bars(components: list[float], walk: Walk) -> list[float]:
    longest = max(abs(w) for entry in walk.entries for w in entry.weighted)
    return [49 * component / longest for component in components]


def check_weights(shown: dict[str, Any], walk: Walk, at: int) -> None:
    weights = walk.weights(at)
    tokens = [visible(token) for entry in walk.entries[:at + 1] for token in entry.tokens][:len(weights)]
    shares = shown["drawn"] if len(weights) > 96 else shown["heights"]
    assert [share / max(shares) for share in shares] == pytest.approx([w / max(weights) for w in weights], abs=1e-3)
    if len(weights) <= 24:
        assert [token for token, _ in shown["weights"]] == tokens
        assert [float(share[:-1]) for _, share in shown["weights"]] == pytest.approx([100 * w for w in weights], abs=0.06)
    else:
        first = max(range(len(weights)), key=lambda i: weights[i])
        assert f"; the heaviest: {first} {tokens[first]} " in shown["heading"]
    assert shown["heading"].startswith("weights a_ij" if at == len(walk.entries) - 1 else "weights so far")


def go_through(page: Any, walk: Walk) -> None:
    """Every entry, there by a key and back by another."""
    page.get_by_label("entry", exact=True).focus()
    for at in range(len(walk.entries)):
        check_picture(page.evaluate(READ), walk, at)
        page.keyboard.press(".")
    for at in reversed(range(len(walk.entries))):
        check_picture(page.evaluate(READ), walk, at)
        page.keyboard.press(",")


@pytest.mark.parametrize("seed", range(12))
def test_every_entry_is_shown_as_it_is(show: Callable, seed: int) -> None:
    rng = random.Random(seed)
    size, context = rng.choice([1, 3, 4, 16]), rng.choice([1, 5, 16, 24, 25, 33, 96, 97, 130])
    walk, *_ = random_walk(seed, size, min(context, 30 * size), rng.choice([1, 24, 64]), later=rng.choice([0, 0, 2, 7]))
    go_through(show(walk), walk)


def test_every_entry_of_a_running_engine(show: Callable) -> None:
    with running("tiny-opt", 5) as llm:
        for layer, position in ((0, None), (3, 5), (5, None)):
            walk = walk_of(llm, layer, 2, position=position)
            go_through(show(walk), walk)


# ---- by keyboard alone -----------------------------------------------------------------------------------------------

def at_of(page: Any) -> int:
    return page.evaluate(READ)["at"]


def test_keys_buttons_and_the_slider_step_and_play(show: Callable) -> None:
    page = show(random_walk(0, 4, 30)[0], 3)
    assert at_of(page) == 3
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "first entry"
    for key, at in [(".", 4), (",", 3), (">", 7), (".", 7), ("<", 0), (",", 0), (".", 1), ("x", 1)]:
        page.keyboard.press(key)
        assert at_of(page) == at, key
    for name, at in [("next entry", 2), ("last entry", 7), ("entry back", 6), ("first entry", 0)]:
        page.get_by_role("button", name=name).click()
        assert at_of(page) == at, name
    page.get_by_label("entry", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert at_of(page) == 1
    page.get_by_label("entries per second").select_option("20")
    page.get_by_role("button", name="Play").press("Space")
    page.locator('.wk[data-at="7"]').wait_for()
    page.get_by_role("button", name="Play").wait_for()


def test_arrows_walk_the_block_table(show: Callable) -> None:
    page = show(random_walk(0, 4, 30)[0], 2)
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.entry") == "2":
            break
    for key, at in [("ArrowDown", 3), ("ArrowDown", 4), ("ArrowUp", 3)]:
        page.keyboard.press(key)
        assert at_of(page) == at
        assert page.evaluate("document.activeElement.ariaLabel").startswith(f"entry {at}, block ")
        assert page.locator('.wk-entry[tabindex="0"]').count() == 1
    page.get_by_role("button", name="entry 6, block").click()
    assert at_of(page) == 6


def test_what_an_entry_does_is_said_in_words(show: Callable) -> None:
    page = show(by_hand())
    status = page.get_by_role("status")
    assert status.text_content() == ("Entry 0 names physical block 7. Nothing was read before: m = 0.00, and the sums "
                                     "begin.")
    page.keyboard.press("Tab")
    page.keyboard.press(".")
    assert status.text_content() == (
        "Entry 1 names physical block 1, 2 slots after the query masked. Its largest score, 50.00, is above m = 0.00: "
        "l and the accumulator are first multiplied with exp(0.00 − 50.00) = 0.00.")
    weights = page.locator(".wk-weights")
    assert weights.get_attribute("aria-label").startswith("weights of 6 tokens, the heaviest: 5 ago 100.0%")
    assert "accumulator of 2 components, first 0.00, 1.00" == page.locator(".wk-accumulator").get_attribute("aria-label")


# ---- what is hostile or large ----------------------------------------------------------------------------------------

def test_hostile_tokens_show_as_text(show: Callable) -> None:
    nasty = [*NASTY, "\u2028", "</noscript>", "<svg onload=alert(1)>", "<!--<script>"]
    for size in (4, len(nasty)):
        walk, *_ = random_walk(1, size, len(nasty), texts=nasty)
        page = show(walk)
        go_through(page, walk)
        assert page.locator(".wk img, .wk script, .wk [onload]").count() == 0


def test_a_long_table_fits_a_projector(show: Callable) -> None:
    """2,000 tokens in 125 blocks: nothing but the lists scrolls."""
    walk, *_ = random_walk(4, 16, 2000, 128)
    page = show(walk, 60)
    check_picture(page.evaluate(READ), walk, 60)
    size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert size[0] <= 1280 and size[1] <= 720
    shown = page.locator(".wk-here").first.bounding_box()
    box = page.get_by_label("block table").bounding_box()
    assert box["y"] <= shown["y"] and shown["y"] + shown["height"] <= box["y"] + box["height"] + 1, "scrolled into sight"


def test_the_file_stands_alone(tmp_path: Path) -> None:
    walk, *_ = random_walk(1, 4, 4, texts=["</script><b>", "<!--", "x", "y"])
    attention_walk(walk).to_html(tmp_path / "walk.html")
    page = (tmp_path / "walk.html").read_text("utf-8")
    assert "default-src 'none'" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", "")
    data = page.split('id="values">')[1].split("</script>")[0]
    assert json.loads(data)["walk"]["entries"][0]["tokens"] == [visible(t) for t in walk.entries[0].tokens]
