"""The attention walk's widget from Python's side."""

from __future__ import annotations

import gc

import pytest
from ipywidgets.widgets.widget import _instances
from test_walk import by_hand, random_walk

from minipaged.errors import TraceError
from minipaged.views import attention_walk, walk_view


def test_a_notebook_stores_the_widget_and_a_still_of_its_entry() -> None:
    view = attention_walk(by_hand())
    for at in (1, 0):
        view.at = at
        data, _ = view._repr_mimebundle_()
        still = walk_view(by_hand(), at)
        assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/plain", "image/svg+xml", "image/png"}
        assert repr(view) == still.text and still._repr_mimebundle_().items() <= data.items()


def test_an_entry_that_is_not_there_is_refused() -> None:
    view = attention_walk(by_hand(), 0)
    with pytest.raises(TraceError, match="the entries 0 to 1"):
        view.at = 2
    assert view.at == 0
    with pytest.raises(TraceError, match="the entries 0 to 1"):
        attention_walk(by_hand(), -1)


def test_making_it_again_leaves_no_growing_set_of_widgets() -> None:
    walk, *_ = random_walk(0, 4, 9)
    attention_walk(walk, name="walk")
    gc.collect()
    alive = len(_instances)
    for _ in range(20):
        attention_walk(walk, name="walk")
    assert len(_instances) == alive


def test_what_is_sent_is_small() -> None:
    """A full context of OPT: 2,048 tokens in 128 blocks, 128 components."""
    import json

    walk, *_ = random_walk(0, 16, 2048, 128)
    size = len(json.dumps(attention_walk(walk).walk))
    print(f"{size} bytes")
    assert size < 300_000
