"""Draws sheets with matplotlib: ours in full colour, the paper's as marks; the same bytes every time."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from .sheet import Bars, Curves, Panel, Sheet, Stacks, Tables

# Okabe and Ito's colours, and a marker each, so that colour is never the only cue.
LOOKS = {"FasterTransformer": ("#E69F00", "s"), "Orca (Max)": ("#D55E00", "v"), "Orca (Pow2)": ("#56B4E9", "^"),
         "Orca (Oracle)": ("#0072B2", "D"), "vLLM": ("#009E73", "o"), "Existing systems": ("#D55E00", "v"),
         "Throughput": ("#0072B2", "D"), "Recompute": ("#E69F00", "^"), "Swap": ("#222222", "P"),
         "ShareGPT": ("#222222", "P"), "Alpaca": ("#56B4E9", "v")}
OTHERS = [("#009E73", "o"), ("#D55E00", "s"), ("#0072B2", "D"), ("#E69F00", "^"), ("#56B4E9", "v")]
PARTS = ["#4FBB96", "#F0B440", "#E08A50", "#BDBDBD"]
READERS = {1: "#e3eef6", 2: "#b3d4e8", 3: "#80b8da", 4: "#56a0cc"}
STYLE = {"svg.hashsalt": "minipaged", "svg.fonttype": "path", "font.size": 9, "axes.titlesize": 9,
         "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}
COLUMNS = 3
MARKS = "marks: the paper's points"


def save(sheet: Sheet, path: Path) -> None:
    """Write ``path`` with the suffixes .svg and .png."""
    with matplotlib.rc_context(STYLE):
        canvas = draw(sheet)
        canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        canvas.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})


def png(sheet: Sheet) -> bytes:
    """The picture of a sheet, for a notebook; no pyplot, which must not be called from a slider's thread."""
    with matplotlib.rc_context(STYLE):
        draw(sheet).savefig(file := BytesIO(), format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()


def draw(sheet: Sheet) -> Canvas:
    """All panels of a sheet, at most `COLUMNS` side by side, with one legend."""
    columns = 2 if len(sheet.panels) == 4 else min(COLUMNS, len(sheet.panels))
    rows = -(-len(sheet.panels) // columns)
    canvas = Canvas(figsize=(max(4.0 * columns, 6.4), 2.9 * rows + 0.9), layout="constrained")
    canvas.suptitle(sheet.title, fontsize=11)
    axes = canvas.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, sheet.panels):
        ax.set_title(panel.title)
        _draw(ax, panel)
    for ax in axes[len(sheet.panels):]:
        ax.set_axis_off()
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if MARKS in handles:
        handles[MARKS] = handles.pop(MARKS)  # the last
    if handles:
        canvas.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 2 * columns),
                      frameon=False)
    return canvas


def _draw(ax: Axes, panel: Panel) -> None:
    {Curves: _curves, Bars: _bars, Stacks: _stacks, Tables: _tables}[type(panel)](ax, panel)


def _curves(ax: Axes, panel: Curves) -> None:
    names = list(dict.fromkeys([*panel.ours, *panel.paper]))
    looks = {name: LOOKS.get(name, OTHERS[i % len(OTHERS)]) for i, name in enumerate(names)}
    for name in names:
        colour, marker = looks[name]
        if ours := sorted(panel.ours.get(name, [])):
            ax.plot(*zip(*ours), color=colour, label=name)
        if paper := panel.paper.get(name):
            ax.plot(*zip(*paper), marker, color=colour, markerfacecolor="white", markersize=5,
                    markevery=panel.mark_every, label=None if ours else name)
            ax.plot([], [], "o", color="#555555", markerfacecolor="white", label=MARKS)
    ax.set(xlabel=panel.x, ylabel=panel.y)
    if panel.log:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.set(xlim=(0, None), ylim=(0, panel.top))


def _bars(ax: Axes, panel: Bars) -> None:
    for at, (name, number) in enumerate(panel.numbers.items()):
        if number.ours is not None:
            x = at - 0.2 if isinstance(number.paper, float) else at
            ax.bar(x, number.ours, 0.38, color="#0072B2", label="ours")
            ax.annotate(f"{number.ours:.1f}", (x, number.ours), ha="center", va="bottom", fontsize=8)
        if isinstance(number.paper, tuple):
            low, high = number.paper
            ax.add_patch(Rectangle((at - 0.42, low), 0.84, high - low, facecolor="#E69F0055", edgecolor="#B87B00",
                                   label="paper, range over all widths"))
        elif number.paper is not None:
            ax.bar(at + 0.2, number.paper, 0.38, color="#E69F00", hatch="///", edgecolor="white", label="paper")
            ax.annotate(f"{number.paper:.1f}", (at + 0.2, number.paper), ha="center", va="bottom", fontsize=8)
    ax.set(ylabel=panel.y, xticks=range(len(panel.numbers)))
    ax.set_xticklabels([name.replace(" (", "\n(") for name in panel.numbers], fontsize=8)
    ax.margins(y=0.12)


def _stacks(ax: Axes, panel: Stacks) -> None:
    ticks, drawn = [], set()
    for label, both in panel.bars.items():
        for who, values, hatch in zip(("ours", "paper"), both, (None, "///")):
            if values is None:
                continue
            left, at = 0.0, len(ticks)
            for part, value, colour in zip(panel.parts, values, PARTS):
                ax.barh(at, value, 0.8, left=left, color=colour, edgecolor="white", hatch=hatch,
                        label=None if part in drawn else part)
                drawn.add(part)
                if value > 0.06 * sum(values):
                    ax.text(left + value / 2, at, f"{value:.1f}", ha="center", va="center", fontsize=8,
                            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})
                left += value
            ticks.append(f"{label}, {who}")
    ax.set(xlabel=panel.unit, yticks=range(len(ticks)), yticklabels=ticks)
    ax.invert_yaxis()


def _tables(ax: Axes, panel: Tables) -> None:
    for row, (name, blocks) in enumerate(panel.ours.items()):
        ax.text(-0.15, row + 0.5, name, ha="right", va="center")
        for logical, block in enumerate(blocks):
            readers = panel.readers[block]
            ax.add_patch(Rectangle((logical, row + 0.1), 0.9, 0.8, facecolor=READERS.get(readers, READERS[4]),
                                   edgecolor="#333333"))
            ax.text(logical + 0.45, row + 0.4, f"block {block}", ha="center", va="center", fontsize=8)
            ax.text(logical + 0.45, row + 0.7, f"{readers} reader{'s' if readers > 1 else ''}", ha="center",
                    va="center", fontsize=7)
    width = max(map(len, panel.ours.values()))
    ax.set(xlim=(-1.4, max(width, 3) + 0.1), ylim=(max(len(panel.ours), 2) + 0.2, -0.1))
    ax.set_axis_off()
