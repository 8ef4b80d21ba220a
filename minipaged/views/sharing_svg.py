"""The tree of shared blocks as a drawing, as the paper's Figure 9 has it."""

from __future__ import annotations

from .canvas import EMPTY, FAINT, INK, WIDTH, box, document, fit, path, rect, text
from .sharing import MAX_COLUMNS, MAX_ROOTS, Run, Sharing, count_of, is_detailed, left_out, name_of, runs_of, summary

TAG, GAP, LINE = 150, 26, 17
SHADES = (EMPTY, "#e3eef6", "#b3d4e8", "#80b8da", "#56a0cc")  # the more readers, the darker; the number stands on it


def render(tree: Sharing) -> str:
    """The tree from left to right; a freed block is crossed out, a new one has a thick border."""
    detailed = is_detailed(tree)
    runs = runs_of(tree.roots[:MAX_ROOTS], detailed, MAX_COLUMNS)
    pitch = min(200, (WIDTH - 12 - TAG) / max(_columns(runs), 1))
    height = 24 + LINE * -(-tree.block_size // 2) if detailed else 28
    canvas, y = _Canvas(pitch, height, detailed), 44.0 + 20 * bool(tree.news)
    for run in runs:
        _, y = canvas.draw(run, 12, y)
    head = [text(12, 24, summary(tree), font_weight="bold")]
    head += [text(12, 46, fit("; ".join(tree.news), WIDTH - 24))] * bool(tree.news)
    if note := left_out(tree):
        y += 22
        head.append(text(12, y - 6, note, fill=FAINT))
    legend, y = _legend(y + 10)
    return document(y, f"{summary(tree)}. {'; '.join(tree.news)}", head + canvas.elements() + legend)


def _columns(runs: list[Run]) -> int:
    return max((1 + _columns(run.children) for run in runs), default=0)


class _Canvas:
    """Collects boxes and links by their look, so that many of one look are one element."""

    def __init__(self, pitch: float, height: float, detailed: bool) -> None:
        self.pitch, self.height, self.detailed, self.width = pitch, height, detailed, pitch - GAP
        self.fills: dict[str, list[str]] = {shade: [] for shade in SHADES}
        self.freed: list[str] = []
        self.crosses: list[str] = []
        self.fresh: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def draw(self, run: Run, x: float, y: float) -> tuple[float, float]:
        """Draw a run and all behind it from ``y`` on; returns the middle of its box, and where the next one begins."""
        middles, bottom = [], y
        if run.children and run.last.ends or run.hidden:  # who ends here has a row of its own before those who go on
            bottom = self._tag(run, x + self.pitch, y)
            middles.append(y + self.height / 2)
        for child in run.children:
            middle, bottom = self.draw(child, x + self.pitch, bottom)
            middles.append(middle)
        middle = (middles[0] + middles[-1]) / 2 if middles else y + self.height / 2
        self._box(run, x, middle - self.height / 2)
        if not middles:
            self._tag(run, x + self.pitch - GAP + 8, y)
            bottom = y + self.height + 10
        start = x + self.width
        self.links += [f"M{start:.0f} {middle:.0f}C{start + 13:.0f} {middle:.0f} {start + 13:.0f} {to:.0f} "
                       f"{start + GAP:.0f} {to:.0f}" for to in middles]
        return middle, bottom

    def _tag(self, run: Run, x: float, y: float) -> float:
        names = ", ".join(run.last.ends) + (f" … {run.hidden} more blocks" if run.hidden else "")
        self.texts.append(text(x, y + self.height / 2 + 5, fit(names, WIDTH - x - 4)))
        return y + self.height + 10

    def _box(self, run: Run, x: float, y: float) -> None:
        node, shape = run.last, box(x, y, self.width, self.height)
        if node.mark == "freed":
            self.freed.append(shape)
            self.crosses.append(f"M{x:.0f} {y:.0f}l{self.width:.0f} {self.height}m0 {-self.height}l{-self.width:.0f} "
                                f"{self.height}")
        else:
            self.fills[SHADES[min(node.readers, 4)]].append(shape)
            if node.mark:
                self.fresh.append(shape)
        ink, count = FAINT if node.mark == "freed" else INK, count_of(run)
        room = self.width - 6.8 * len(count) - 16
        label = name_of(run)
        if not self.detailed or fit(label, room, bold=True) != label:
            label = label.replace("blocks ", "").replace("block ", "")
        self.texts += [text(x + 6, y + 18, fit(label, room, bold=True), fill=ink, font_weight="bold"),
                       text(x + self.width - 6, y + 18, count, text_anchor="end", fill=ink)]
        for i in range(0, len(node.words) if self.detailed else 0, 2):
            words = fit(" ".join(node.words[i:i + 2]), self.width - 12)
            self.texts.append(text(x + 6, y + 36 + LINE * (i // 2), words, fill=ink))

    def elements(self) -> list[str]:
        """All of it, what lies above last."""
        shapes = [path("".join(self.links), fill="none", stroke=FAINT)] if self.links else []
        shapes += [path("".join(boxes), fill=fill, stroke=INK) for fill, boxes in self.fills.items() if boxes]
        if self.fresh:
            shapes.append(path("".join(self.fresh), fill="none", stroke=INK, stroke_width=2.5))
        if self.freed:
            shapes += [path("".join(self.freed), fill=EMPTY, stroke=FAINT, stroke_dasharray="4 4"),
                       path("".join(self.crosses), stroke="#d55e00")]
        return shapes + self.texts


def _legend(y: float) -> tuple[list[str], float]:
    elements, x = [], 12.0
    looks = [("one reader", dict(fill=SHADES[1], stroke=INK)), ("more readers, darker", dict(fill=SHADES[3], stroke=INK)),
             ("taken or copied in this iteration", dict(fill=SHADES[1], stroke=INK, stroke_width=2.5)),
             ("freed in it", dict(fill=EMPTY, stroke=FAINT, stroke_dasharray="4 4"))]
    for name, look in looks:
        elements += [rect(x, y, 22, 16, **look), text(x + 30, y + 13, name)]
        x += 50 + 7.6 * len(name)
    return elements, y + 28
