"""Every rendering says what the memory holds, whatever the tokens are."""

from __future__ import annotations

import base64
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from traces import NASTY, figure_7, figure_8, request, small_pool_run, start

from minipaged import Trace
from minipaged import trace as ev
from minipaged.errors import TraceError
from minipaged.replay import MemoryState, replay
from minipaged.views import memory_view, png, reservation_view
from minipaged.views.canvas import GENERATED, PROMPT, WIDTH, colour_of, fit, tint
from minipaged.views.frame import visible
from minipaged.views.svg import LOGICAL, PHYSICAL


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    """All elements of a kind; fails if the drawing is not well-formed."""
    return list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag))


def drawn_rows(svg: str, left: float, right: float) -> list[tuple[int, list[str]]]:
    """Rows of blocks in one column of a drawing: the number beside each block, and the texts in and after it."""
    texts = [(float(t.get("x")), float(t.get("y")), t.text, t.get("text-anchor")) for t in elements(svg, "text")]
    numbers = sorted((y, int(text)) for x, y, text, anchor in texts if x == left - 8 and anchor == "end")
    return [(n, [text for x, _, text, _ in sorted(t for t in texts if left < t[0] < right and abs(t[1] - y) < 12)])
            for y, n in numbers]


def check_against_state(view, state: MemoryState) -> None:
    """The text and the drawing of a small pool with blocks of at most 4 slots show every entry of every table."""
    pool_text = view.text.split("physical blocks\n")[1].split("\n\n")[0].splitlines()[2:]
    pool_drawn = drawn_rows(view.svg, PHYSICAL, WIDTH)
    owners, left_text = state.owners(), view.text.split("physical blocks\n")[0]
    assert [number for number, _ in pool_drawn] == list(range(state.start.num_blocks))
    for (number, drawn), line in zip(pool_drawn, pool_text, strict=True):
        assert line.split()[0] == str(number)
        if number not in owners:
            assert drawn == ["free"] and line.split()[1:] == ["free"]
            continue
        reader = max(owners[number], key=lambda reader: state.filled(*reader))
        slots = [visible(text) for text in state.slots(*reader)]
        assert len(drawn) == len(slots) + 1 and all(s[:3] == d[:3] for s, d in zip(slots, drawn))
        assert [cell.strip() for cell in line.split("|")[1:1 + len(slots)]] == slots
        cells = line.split("|")[1:-1]
        assert cells[len(slots):] == [" " * len(cells[0])] * (state.start.block_size - len(slots))
        assert (f"×{state.ref_counts[number]}" in line) == (state.ref_counts[number] > 1)
        assert (f"×{state.ref_counts[number]}" in drawn[-1]) == (state.ref_counts[number] > 1)
    entries = [(logical, block, state.filled(seq, logical)) for seq, table in state.tables.items()
               for logical, block in enumerate(table)]
    drawn_tables = drawn_rows(view.svg, LOGICAL, PHYSICAL - 28)
    assert [(logical, *map(int, texts[-2:])) for logical, texts in drawn_tables] == entries
    rows = re.findall(r"^ *(\d+) +(\d+) +(\d+)/\d+ ", left_text, re.MULTILINE)
    assert [tuple(map(int, row)) for row in rows] == entries


def test_every_step_of_the_engine_is_rendered_as_it_is() -> None:
    run = small_pool_run()
    for step in range(len(run.tables)):
        check_against_state(memory_view(run.trace, step), replay(run.trace.events, step))


def test_paper_figure_7() -> None:
    view = memory_view(figure_7())
    check_against_state(view, replay(figure_7()))
    assert view.text == """\
after iteration 4: 5 of 9 physical blocks in use, 4 slots each

sequence A: 9 tokens in 3 blocks
logical block  physical block  filled  slots
-------------  --------------  ------  -----------------------------------------
            0               7     4/4  | Four    | score   | and     | seven   |
            1               1     4/4  | years   | ago     | our     | fathers |
            2               3     1/4  | brought |         |         |         |

sequence B: 6 tokens in 2 blocks
logical block  physical block  filled  slots
-------------  --------------  ------  -----------------------------------------
            0               5     4/4  | It      | was     | the     | best    |
            1               2     2/4  | of      | times   |         |         |

physical blocks
block  reader  slots
-----  ------  -----------------------------------------
    0  free
    1  A:1     | years   | ago     | our     | fathers |
    2  B:1     | of      | times   |         |         |
    3  A:2     | brought |         |         |         |
    4  free
    5  B:0     | It      | was     | the     | best    |
    6  free
    7  A:0     | Four    | score   | and     | seven   |
    8  free

written: B position 5 to block 2 slot 1"""


def test_prompt_and_generated_tokens_are_shaded_apart() -> None:
    view = memory_view(figure_7())
    fills = [path.get("fill") for path in elements(view.svg, "path")]
    for seq in (0, 1):
        assert {tint(colour_of(seq), PROMPT), tint(colour_of(seq), GENERATED)} <= set(fills)
    bold = {t.text for t in elements(view.svg, "text") if t.get("font-weight") == "bold"}
    assert {"fathers", "brought", "best", "of", "times"} <= bold and not {"our", "It", "the"} & bold


def test_what_an_iteration_wrote_is_marked() -> None:
    events = figure_7()
    assert "written: A positions 0-6 to block 7 slot 0 … block 1 slot 2; B positions" in memory_view(events, 1).text
    assert "written: A position 7 to block 1 slot 3; B position 3 to block 5 slot 3" in memory_view(events, 2).text
    assert "written" not in memory_view(replay(events, 2)).text, "a bare state does not know"


def test_shared_blocks_show_their_reference_count() -> None:
    before, after = memory_view(figure_8(), 1), memory_view(figure_8(), 2)
    for view, step in ((before, 1), (after, 2)):
        check_against_state(view, replay(figure_8(), step))
    assert re.search(r"^ +1  ×2 A1:1 A2:1 +\| years", before.text, re.MULTILINE)
    assert re.search(r"^ +1  A2:1 +\| years +\| ago +\| our +\| mothers", after.text, re.MULTILINE)
    assert re.search(r"^ +3  A1:1 +\| years +\| ago +\| our +\| fathers", after.text, re.MULTILINE)


def test_swapped_blocks_are_shown_in_the_host_pool() -> None:
    events = [*figure_7(), ev.Preempt(5, 1, "no free block", "swap"), ev.SwapOut(5, 1, [[5, 0], [2, 3]])]
    view = memory_view(events)
    assert "3 of 9 physical blocks and 2 of 4 host blocks in use" in view.text
    assert "sequence B (swapped out)" in view.text and re.search("host block +filled", view.text)
    host = view.text.split("host blocks\n")[1]
    assert re.search(r"^ +3  B:1 +\| of +\| times", host, re.MULTILINE) and host.count("free") == 2
    assert [t.text for t in elements(view.svg, "text")].count("free") == 6 + 2
    back = memory_view([*events, ev.SwapIn(6, 1, [[0, 4], [3, 8]])])
    assert "host" not in back.text and re.search(r"^ +8  B:1 +\| of", back.text, re.MULTILINE)


def test_waiting_requests_are_named() -> None:
    events = [*figure_7(), ev.Add(4, 2, 2, [1, 2], ["a", "b"]), ev.Preempt(5, 1, "no free block", "recompute"),
              ev.Free(5, 1, [5, 2], False)]
    view = memory_view(events)
    assert "waiting: B (6 tokens), C (2 tokens)" in view.text and "waiting: B (6 tokens), C (2 tokens)" in view.svg


@pytest.mark.parametrize("sizes", [dict(num_blocks=9), dict(num_blocks=64)], ids=["slots", "map"])
def test_token_text_is_data(sizes) -> None:
    def view_of(words: list[str]):
        events = [start(**sizes), *request(0, words, list(range(5))), ev.Sample(1, 0, 1, words[0], -1.0)]
        return memory_view(events)

    nasty, tame = view_of(NASTY), view_of(["word"] * len(NASTY))
    root = ElementTree.fromstring(nasty.svg)
    assert {node.tag.split("}")[1] for node in root.iter()} == {"svg", "title", "rect", "path", "text"}
    assert len(list(root.iter())) == len(list(ElementTree.fromstring(tame.svg).iter())), "no token adds an element"
    assert len(nasty.text.splitlines()) == len(tame.text.splitlines()), "no token breaks a line"
    for text in (nasty.text, nasty.svg):
        assert all(char.isprintable() or char == "\n" for char in text)
        text.encode("utf-8")
    assert "<img" not in nasty.svg and "</script" not in nasty.svg and "]]>" not in nasty.svg


@pytest.mark.parametrize(("text", "shown"), [
    (" of", "·of"), ("\n", r"\n"), ("\\n", r"\\n"), ("\x00", r"\x00"), ("\u202e", r"\u202e"), ("\u0301", "◌\u0301"),
    ("", '""'), ("\xa0", r"\xa0"), ("<b>", "<b>")])
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_long_tokens_are_cut() -> None:
    view = memory_view([start(), *request(0, ["W" * 500, "i" * 500], [0])])
    assert max(map(len, view.text.splitlines())) < 120 and max(len(t.text) for t in elements(view.svg, "text")) < 120
    assert fit("fathers", 70) == "fathers" and fit("W" * 500, 70).endswith("…") and len(fit("W" * 500, 70)) < 7


@pytest.mark.parametrize(("blocks", "size", "seqs"), [
    (9, 4, 4), (64, 16, 20), (64, 4, 60), (984, 16, 200), (20_000, 16, 500)])
def test_size_and_degradation(blocks: int, size: int, seqs: int) -> None:
    """Bigger pools become a map: never more than a screen or two, and every block in use is shown or counted."""
    events: list[ev.Event] = [start(num_blocks=blocks, block_size=size)]
    for seq in range(seqs):
        events += request(seq, ["token"] * (size - 1), [blocks - 1 - seq * (blocks // seqs)], size)
    view = memory_view(events)
    limit = 20_000 if blocks <= 64 else 80_000
    assert len(view.svg.encode()) <= limit and len(view.text.splitlines()) < 80
    height = float(ElementTree.fromstring(view.svg).get("viewBox").split()[3])
    assert height < 2000
    if blocks > 32:
        cells = re.findall(rf"\b[A-Z]+\({size - 1}\)", view.text.split("slots filled")[1].split("\n\n")[0])
        hidden = re.search(r"not shown, (\d+) of them in use", view.text)
        assert len(cells) + (int(hidden[1]) if hidden else 0) == seqs


def test_compact_map() -> None:
    words = "Four score and seven years ago our".split()
    events = [start(num_blocks=40), *request(0, words, [33, 4]), *request(1, words[:3], [39]),
              ev.Fork(1, 0, 0, 2), ev.Share(1, 2, 0, 33), ev.Share(1, 2, 1, 4)]
    assert memory_view(events).text == """\
after iteration 1: 3 of 40 physical blocks in use, 4 slots each

physical blocks, one cell each (. free, A full, A(3) 3 of 4 slots filled, A×2 read by two)
     0  .       .       .       .       A1(3)×2 .       .       .       .       .       .       .       .       .       .       .
    16  .       .       .       .       .       .       .       .       .       .       .       .       .       .       .       .
    32  .       A1×2    .       .       .       .       .       B(3)

sequence A1: 7 tokens in 2 blocks
  33 4
sequence B: 3 tokens in 1 block
  39
sequence A2: 7 tokens in 2 blocks
  33 4"""


def test_shared_block_shows_all_that_is_in_it() -> None:
    events = [start(), *request(0, "Four score and seven", [7]), ev.Add(1, 1, 1, [0, 1], ["Four", "score"]),
              ev.Share(2, 1, 0, 7), ev.Write(2, 1, 0, 2)]
    row = r"^ +7  ×2 A:0 B:0  \| Four +\| score \| and +\| seven \|$"
    assert re.search(row, memory_view(events).text, re.MULTILINE)


def test_block_of_17_slots_takes_several_rows() -> None:
    words = [f"t{i}" for i in range(17)]
    view = memory_view([start(num_blocks=2, block_size=17), *request(0, words, [1], 17)])
    drawn = [t.text for t in elements(view.svg, "text")]
    assert [text for text in drawn if re.fullmatch(r"t\d+", text)] == words * 2
    assert re.findall(r"\| (t\d+)", view.text)[0] == "t0" and view.text.count("| t16 |") == 2


def test_drawings_can_be_read_anywhere() -> None:
    """By a screen reader, on a dark page, at any width, several on one page."""
    for view in (memory_view(figure_7()), reservation_view(9, 2, 2048, 4, 819200)):
        root = ElementTree.fromstring(view.svg)
        assert root.get("role") == "img" and root[0].tag.endswith("title") and root[0].text == root.get("aria-label")
        assert root.get("width") == "100%" and root.get("height") is None and root.get("viewBox")
        assert root[1].get("width") == "100%" and root[1].get("fill") == "#ffffff"
        assert not any(node.get("id") or node.tag.endswith("style") for node in root.iter())
        assert all(float(node.get("font-size", 14)) >= 14 for node in root.iter()), "12 px at JupyterLab's width"
        assert all(0 <= float(t.get("x")) <= WIDTH for t in elements(view.svg, "text"))


def test_view_shows_itself_and_saves(tmp_path: Path) -> None:
    view, again = memory_view(figure_7()), memory_view(replay(figure_7()), step=4)
    assert memory_view(iter(figure_7())).svg == view.svg and again.text in view.text
    bundle = {"text/plain": view.text, "image/svg+xml": view.svg, "image/png": png.render(view.svg)}
    assert view._repr_mimebundle_() == bundle and repr(view) == view.text
    view.save(tmp_path / "view.svg")
    view.save(tmp_path / "view.txt")
    assert (tmp_path / "view.svg").read_text("utf-8") == view.svg
    assert (tmp_path / "view.txt").read_text("utf-8") == view.text + "\n"


def pixels(svg: str) -> Image.Image:
    """A drawing's PNG, decoded."""
    file = base64.b64decode(png.render(svg))
    assert len(file) < 40_000
    return Image.open(io.BytesIO(file)).convert("RGB")


def test_the_png_is_the_drawing() -> None:
    view = memory_view(figure_7())
    image = pixels(view.svg)
    box = [float(number) for number in ElementTree.fromstring(view.svg).get("viewBox").split()]
    assert image.size == (WIDTH, round(box[3]))
    tints = {tuple(int(tint(colour_of(seq), share)[i:i + 2], 16) for i in (1, 3, 5))
             for seq in (0, 1) for share in (PROMPT, GENERATED)}
    near = {tuple(a) for a in tints for _, b in image.getcolors(1 << 20) if max(abs(x - y) for x, y in zip(a, b)) < 4}
    assert near == tints, "the tokens' colours"
    changed = pixels(view.svg.replace(">Four<", ">Five<"))
    assert changed.size == image.size and changed.tobytes() != image.tobytes(), "its text is drawn"
    png.render.cache_clear()
    assert pixels(view.svg).tobytes() == image.tobytes()


def test_hostile_tokens_make_a_png_too() -> None:
    for blocks in (12, 300):
        pixels(memory_view([start(num_blocks=blocks), *request(0, [*NASTY, "&#0;", "&xx;"], list(range(6)))]).svg)


def test_reservation() -> None:
    """Figure 3's request A in Figure 6's blocks; the paper prints 2038 never used, which would make 2049 slots."""
    view = reservation_view(used=9, future=2, reserved=2048, block_size=4, bytes_per_token=819200)
    assert re.search(r"^contiguous +2048 +9 +2 +2037 +0\.4% +1\.68 GB$", view.text, re.MULTILINE)
    assert re.search(r"^3 blocks of 4 +12 +9 +2 +1 +75\.0% +9\.83 MB$", view.text, re.MULTILINE)
    assert len(view.svg) < 20_000
    areas = {}
    for path in elements(view.svg, "path"):
        for x, y, width, height in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", path.get("d")):
            side = "contiguous" if float(x) < 600 else "paged"
            if path.get("fill") != "none":
                areas.setdefault(side, []).append(float(width) * float(height) / 81)
    assert {side: [sum(a)] for side, a in areas.items()} == {"contiguous": [2048], "paged": [12]}, "drawn to scale"


def test_a_registered_prefix_has_no_next_token() -> None:
    """Of a prefix stays a second reader of its blocks, to which no token is added (§4.4)."""
    events = [start(), *request(0, "Four score and seven years ago our", [7, 1]), ev.Sample(1, 0, 7, "fathers", -0.1)]
    assert 'sequence A: 7 tokens in 2 blocks, next token "fathers"\n' in memory_view(events).text
    events += [ev.Fork(1, 0, 0, 1), ev.Share(1, 1, 0, 7), ev.Share(1, 1, 1, 1), ev.Free(1, 0, [7, 1], False),
               ev.Finish(1, 0, 0, "abort")]
    assert "sequence A2: 7 tokens in 2 blocks\n" in memory_view(events).text


def test_views_need_neither_torch_nor_the_engine() -> None:
    code = ("import sys, minipaged.views; print(sorted(m for m in sys.modules if m.split('.')[0] in "
            "('torch', 'transformers', 'numpy') or m in ('minipaged.engine', 'minipaged.llm', 'minipaged.runner')))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(("source", "step"), [
    (None, None), ([], None), (Trace(), None), (figure_7()[1:], None), (replay(figure_7()), 2)])
def test_what_cannot_be_shown_is_refused(source, step) -> None:
    with pytest.raises(TraceError):
        memory_view(source, step)


def test_figures_are_those_of_the_notebooks() -> None:
    figures = Path(__file__).parent.parent / "figures"
    drawn = runpy.run_path(str(figures / "from_notebooks.py"))["pictures"]()
    saved = {path.name: path.read_text(encoding="utf-8") for path in figures.glob("[0-9][0-9]_*.svg")}
    assert saved == drawn, "run: python figures/from_notebooks.py"
