"""Film the microscope over a real run: python figures/animation.py

The bundled model generates in a pool that is too small for its three requests; the trace is opened in Chromium without
a screen and stepped through. Writes ``microscope.webp``, the film, and ``microscope.png``, a still. Needs playwright
and Chromium, as the tests do.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from minipaged import LLM, SamplingParams, Trace
from minipaged.views.html import save

FIGURES = Path(__file__).parent
PROMPTS = ["Four score and seven years ago our", "Once upon a time", "It was the best of"]
SAMPLES = [1, 2, 1]      # of each prompt; two samples share their prompt's blocks until one writes
STILL = 8                # the step of the still: a request is swapped out
MOTION = 600             # milliseconds in which an arrow grows, as in microscope.css
SHORT, LONG = 100, 1200  # milliseconds that a frame in which something grows, and the last frame of a step, stay

NEXT = """() => { const slider = document.querySelector(".mp-slider"); slider.value = Number(slider.value) + 1;
                  slider.dispatchEvent(new Event("input")); return document.getAnimations().length > 0; }"""
AT = """(time) => { for (const one of document.getAnimations()) { one.pause(); one.currentTime = time; } }"""


def run() -> Trace:
    """Four sequences in ten blocks: copied on write, preempted both ways, and brought back."""
    trace = Trace()
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=10, trace=trace) as llm:
        llm.generate(PROMPTS, [SamplingParams(temperature=0.9 if n > 1 else 0, n=n, seed=4, max_tokens=10,
                                              ignore_eos=True) for n in SAMPLES])
    return trace


def shot(page: Page) -> Image.Image:
    """What the window shows."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def film(page: Page, last: int) -> dict[int, list[Image.Image]]:
    """Step to its frames, the last of which is the step's picture when nothing moves any more."""
    frames: dict[int, list[Image.Image]] = {}
    for step in range(1, last):  # after the last one, all blocks are free
        moving = page.evaluate(NEXT)
        frames[step] = []
        for time in range(SHORT if moving else MOTION, MOTION + SHORT, SHORT):
            page.evaluate(AT, time)
            frames[step].append(shot(page))
    return frames


def main() -> None:
    """Make both files."""
    trace = run()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api:
        save(trace, page_file := Path(folder) / "view.html", step=0)
        browser = api.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 896}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_selector(".mp-slider")
        frames = film(page, trace.step)
        browser.close()
    frames[STILL][-1].quantize(256).save(FIGURES / "microscope.png", optimize=True)
    first, *rest = [frame for step in frames.values() for frame in step]
    times = [time for step in frames.values() for time in [SHORT] * (len(step) - 1) + [LONG]]
    first.save(FIGURES / "microscope.webp", save_all=True, append_images=rest, duration=times, loop=0, lossless=True,
               method=6)


if __name__ == "__main__":
    main()
