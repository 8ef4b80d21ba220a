"""The game of `shortages` with buttons, for a notebook."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from ..display import html_table, text_table
from ..views import memory_view
from .shortages import WAYS, Choice, Game, Score, headline, name_of, play, score_table, situation


class Panel(widgets.VBox):
    """Shows each shortage and asks who gives way, and how; in the end, the score beside others.

    A click serves all requests anew with one more choice, in a pool of its own: it touches no engine, and may come
    from any thread.

    Parameters
    ----------
    game : Game
        The requests and the pool.
    others : dict[str, Score]
        What to compare with, by name.

    Attributes
    ----------
    choices : list[tuple[str, str]]
        Those made so far.
    """

    def __init__(self, game: Game, others: dict[str, Score]) -> None:
        self.game, self.others = game, others
        self.choices: list[Choice] = []
        self._lock = threading.Lock()  # JupyterLab may call back while a cell runs
        self._said, self._shown = widgets.HTML(), widgets.HTML()
        names = [name_of(number) for number in range(len(game.arrivals))]
        self._ways = {(name, way): self._button(f"{way} {name}", self.choose, name, way)
                      for name in names for way in WAYS}
        self._back = self._button("take back", self.take_back)
        self._rest = self._button("latest first from here", self.finish)
        columns = [widgets.VBox([self._ways[name, way] for way in WAYS]) for name in names]
        super().__init__([self._said, widgets.HBox(columns), self._shown, widgets.HBox([self._back, self._rest])])
        self._redraw()

    def choose(self, name: str, way: str) -> None:
        """At this shortage, a request gives way; errors as in `play`."""
        with self._lock:
            play(self.game, [*self.choices, (name, way)])
            self.choices.append((name, way))
            self._redraw()

    def take_back(self) -> None:
        """Undo the last choice, if there is one."""
        with self._lock:
            del self.choices[-1:]
            self._redraw()

    def finish(self) -> None:
        """Choose the latest request, by recomputation, until all are served (§4.5's rule)."""
        with self._lock:
            while options := play(self.game, self.choices).options:
                self.choices.append((options[-1], WAYS[0]))
            self._redraw()

    def _button(self, label: str, do: Callable[..., None], *what: str) -> widgets.Button:
        button = widgets.Button(description=label, layout={"width": "9.5em"})
        button.on_click(lambda _: do(*what))
        return button

    def _redraw(self) -> None:
        played = play(self.game, self.choices)
        tables = [situation(self.game, played)]
        if played.score is not None:
            tables.insert(0, score_table({"your choices": played.score, **self.others}))
        memory = memory_view(played.trace, played.step)
        made = ", ".join(f"{way} {name}" for name, way in self.choices) or "none"
        self.svg, self.text = memory.svg, "\n\n".join([f"choices: {made}", *(text_table(*table) for table in tables)])
        said = f"{html.escape(headline(played))}<br>Choices so far: {html.escape(made)}."
        self._said.value = f'<p role="status">{said}</p>'
        self._shown.value = "".join(html_table(*table) for table in tables) + memory.svg
        for (name, _), button in self._ways.items():
            button.disabled = name not in played.options
        self._back.disabled, self._rest.disabled = not self.choices, not played.options

    def close(self) -> None:
        """Take the panel, and all that is in it, out of the notebook."""
        for widget in [*self._ways.values(), self._back, self._rest, *self.children[1].children, *self.children]:
            if hasattr(widget, "style"):
                widget.style.close()
            widget.layout.close()
            widget.close()
        self.layout.close()
        super().close()

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**kwargs), "text/plain": self.text, "image/svg+xml": self.svg}
