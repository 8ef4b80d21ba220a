"""What can be read off a microscope in a browser, and whether it is so."""

from __future__ import annotations

from typing import Any

import pytest
from witness import Truth

# Everything that a viewer can read off the two columns, per block and per sequence; and of what is shown in detail.
READ = """(root) => {
  const detailed = root.classList.contains("mp-detailed");
  const text = (el, name) => el.querySelector(name).textContent;
  const slots = (el) => [...el.querySelectorAll(".mp-slot")].map((slot) => slot.textContent);
  const pool = (name) => [...root.querySelectorAll(`.mp-box.mp-${name}:not([hidden]) .mp-block`)].map((el) => ({
    block: Number(text(el, "i")), owners: text(el, "b"), refs: text(el, ".mp-refs"), label: el.ariaLabel,
    fill: el.style.backgroundSize.split(" ")[0], slots: slots(el) }));
  const queue = (name) => [...root.querySelectorAll(`.mp-box.mp-${name} .mp-seq`)].map((el) => ({
    seq: Number(el.dataset.seq), name: text(el, ".mp-name b"), title: text(el, ".mp-name"),
    table: [...el.querySelectorAll(".mp-entry")].map((entry) => ({ block: Number(text(entry, ".mp-to")),
      filled: Number(text(entry, ".mp-filled")), slots: slots(entry) })) }));
  return { detailed, step: Number(root.dataset.step), device: pool("device"), host: pool("host"),
    queues: Object.fromEntries(["running", "swapped", "prefix", "waiting"].map((name) => [name, queue(name)])),
    heading: text(root, ".mp-device h4"), said: text(root, ".mp-said") };
}"""
SCRUB = """(root, step) => { const slider = root.querySelector(".mp-slider"); slider.value = step;
                             slider.dispatchEvent(new Event("input")); }"""
# Every step; and in each the details of one block in use, another one in every step.
READ_ALL = f"""(root) => {{
  const read = {READ}, scrub = {SCRUB}, last = Number(root.querySelector(".mp-slider").max);
  return Array.from({{ length: last + 1 }}, (_, step) => {{
    scrub(root, step);
    const shown = read(root), used = [...root.querySelectorAll(".mp-block:not(.mp-free)")];
    if (used.length) {{
      const block = used[step % used.length];
      block.dispatchEvent(new MouseEvent("mouseover", {{ bubbles: true }}));
      shown.details = {{ place: block.dataset.go, title: root.querySelector(".mp-details h4").textContent,
        slots: [...root.querySelectorAll(".mp-details .mp-slot")].map((slot) => slot.textContent) }};
      root.dispatchEvent(new MouseEvent("mouseleave"));
    }}
    return shown;
  }});
}}"""


def read(page: Any) -> dict[str, Any]:
    """What the only microscope of a page shows."""
    return page.locator(".mp").evaluate(READ)


def tab_to(page: Any, there: str, most: int = 20) -> None:
    """Press Tab until a condition in JavaScript holds of `focused`, the element that has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate(f"(focused => {there})(document.activeElement)"):
            return
    raise AssertionError(f"not reached by {most} times Tab: {there}")


def scrub(page: Any, step: int) -> dict[str, Any]:
    """Go to a step and read the page."""
    page.locator(".mp").evaluate(SCRUB, step)
    return read(page)


# From the key to the moment after the browser has painted.
TIME = """async () => {
  const start = performance.now();
  document.querySelector(".mp").dispatchEvent(new KeyboardEvent("keydown", { key: ".", bubbles: true }));
  await new Promise((resolve) => requestAnimationFrame(() => { const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve; port2.postMessage(0); }));
  return performance.now() - start;
}"""


def check_redraw(page: Any, step: int) -> None:
    """A step is redrawn within 33 ms at the 90th percentile of 100 steps, in the best of three such rounds.

    Asserted is the time for which the page keeps its processor busy: what the clock says depends on what else runs. A
    neighbour on the same processor slows that too, for a while, so that a round of steps is tried up to three times.
    """
    chrome, rounds = page.context.new_cdp_session(page), []
    chrome.send("Performance.enable", {"timeDomain": "threadTicks"})
    for _ in range(3):
        times = []
        for _ in range(100):
            before = _thread_ms(chrome)
            waited = page.evaluate(TIME)
            times.append((_thread_ms(chrome) - before, waited))
        rounds.append([round(sorted(column)[90], 1) for column in zip(*times)])
        assert int(page.locator(".mp").get_attribute("data-step")) == step + 100 * len(rounds)
        if rounds[-1][0] < 33 and rounds[-1][1] < 330:
            print(rounds)
            return
    raise AssertionError(f"90th percentiles of [ms worked, ms waited]: {rounds}")


def _thread_ms(chrome: Any) -> float:
    metrics = {metric["name"]: metric["value"] for metric in chrome.send("Performance.getMetrics")["metrics"]}
    return 1000 * metrics["TaskDuration"]


def check_all(view: Any, truths: list[Truth], names: list[dict[int, str]]) -> None:
    """One microscope, step by step."""
    for step, shown in enumerate(view.evaluate(READ_ALL)):
        try:
            assert shown["step"] == step < len(truths)
            check_picture(shown, truths[step], names[step])
        except AssertionError as error:
            raise AssertionError(f"step {step}: {shown}\n{truths[step]}") from error
    assert shown["step"] == len(truths) - 1


def check_picture(shown: dict[str, Any], truth: Truth, names: dict[int, str]) -> None:
    """What one step shows is the truth."""
    used, total = sum(map(bool, truth.refs[False])), len(truth.refs[False])
    assert shown["heading"].startswith(f"physical blocks: {used} of {total} in use, {truth.size} slot")
    runs = [run.split("–") for run in shown["heading"].split("; free: ")[1].split("; ")[0].split(", ")]
    free = [block for run in runs if run[0] not in ("none", "…") for block in range(int(run[0]), int(run[-1]) + 1)]
    wanted = [block for block, count in enumerate(truth.refs[False]) if not count]
    assert free == wanted or total > 512 or (["…"] in runs and free == wanted[:len(free)])
    for pool, host in (("device", False), ("host", True)):
        drawn = {cell["block"]: cell for cell in shown[pool]}
        assert list(drawn) == sorted(drawn) and (host or total > 512 or len(drawn) == total)
        for block, count in enumerate(truth.refs[host]):
            if block in drawn:
                _check_block(drawn[block], truth, host, shown["detailed"], names)
            else:
                assert count == 0, "what is not drawn is free"
    for queue, rows in shown["queues"].items():
        assert sorted(row["seq"] for row in rows) == sorted(truth.queues[queue]), queue
        for row in rows:
            _check_sequence(row, truth, queue, shown["detailed"], names)
    if details := shown.get("details"):
        pool, block = details["place"].split()
        readers = truth.readers(pool == "host", int(block))
        said = [f"{names[seq]} as its logical block {logical}" for seq, logical in readers]
        assert sorted(details["title"].split(": read by ")[1].split(", ")) == sorted(said)
        assert [text for text in details["slots"] if text] == truth.slots(*readers[0])


def _check_block(cell: dict[str, Any], truth: Truth, host: bool, detailed: bool, names: dict[int, str]) -> None:
    readers, name = truth.readers(host, cell["block"]), f"{'host block' if host else 'block'} {cell['block']}"
    label = cell["label"].split(", taken")[0].split(", given")[0]
    if not readers:
        assert label == f"{name}, free" and not cell["fill"] and not cell["refs"] and not any(cell["slots"])
        assert cell["owners"] == ("free" if detailed else "")
        return
    filled = truth.filled(*readers[0])
    who = [f"{names[seq]}:{logical}" for seq, logical in readers]
    assert label.startswith(f"{name}, {filled} of {truth.size} slots filled, reference count {len(readers)}, read by ")
    assert sorted(label.split(" read by ")[1].split()) == sorted(who)
    assert float(cell["fill"][:-1]) == pytest.approx(100 * filled / truth.size, abs=1e-3)
    assert cell["refs"] == (f"×{len(readers)}" if len(readers) > 1 else "")
    if detailed:
        texts = truth.slots(*readers[0])
        assert sorted(cell["owners"].split()) == sorted(who)
        assert cell["slots"] == texts + [""] * (truth.size - len(texts))
    else:
        assert cell["owners"] in {names[seq] for seq, _ in readers}


def _check_sequence(row: dict[str, Any], truth: Truth, queue: str, detailed: bool, names: dict[int, str]) -> None:
    seq, blocks = row["seq"], truth.blocks.get(row["seq"], [])
    assert row["name"] == names[seq]
    assert queue == "prefix" or f" {len(truth.tokens[seq])} token" in row["title"]
    assert [(entry["block"], entry["filled"]) for entry in row["table"]] == [
        (block, truth.filled(seq, logical)) for logical, block in enumerate(blocks)]
    if detailed:
        texts = [truth.slots(seq, logical) for logical in range(len(blocks))]
        assert [entry["slots"] for entry in row["table"]] == [
            slots + [""] * (truth.size - len(slots)) for slots in texts]
