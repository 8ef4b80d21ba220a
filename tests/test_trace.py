"""A trace gives back the memory of every iteration, and survives a file."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from traces import NASTY, figure_7, figure_8, request, small_pool_run, start

from minipaged import Trace
from minipaged import trace as ev
from minipaged.errors import TraceError
from minipaged.replay import replay
from minipaged.trace import load
from minipaged.views import memory_view
from minipaged.views.html import save


def test_replay_gives_the_engines_tables_at_every_step() -> None:
    run = small_pool_run()
    assert any(isinstance(event, ev.Preempt) for event in run.trace.events), "the pool was not small enough"
    assert len(run.tables) == run.trace.step + 1 and run.tables[-1] == {}
    for step, expected in enumerate(run.tables):
        state = replay(run.trace.events, step)
        assert state.tables == expected and state.num_tokens == run.num_tokens[step], f"step {step}"
        counts = [sum(block in table for table in expected.values()) for block in range(run.num_blocks)]
        assert state.ref_counts == counts, f"step {step}"


def test_trace_file_round_trip(tmp_path: Path) -> None:
    trace, path = small_pool_run().trace, tmp_path / "run.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(ev.to_json(event) + "\n" for event in [*trace.events, *figure_8()])
    assert load(path) == [*trace.events, *figure_8()]
    written = Trace(tmp_path / "written.jsonl")
    for event in [start(), *request(0, NASTY[:11] + NASTY[12:], list(range(5)))]:
        written.step = event.step
        fields = json.loads(ev.to_json(event))
        written.emit(type(event), **{name: fields[name] for name in fields if name not in ("kind", "step")})
    written.close()
    assert load(tmp_path / "written.jsonl") == written.events
    assert memory_view(load(tmp_path / "written.jsonl")).svg == memory_view(written).svg


@pytest.mark.parametrize(("change", "says"), [
    (lambda lines: [*lines[:4], lines[4][:-9]], "line 5: cut off"),
    (lambda lines: [lines[0].replace('"schema": 1', '"schema": 2'), *lines[1:]], "line 1: schema version 2"),
    (lambda lines: lines[1:], "line 1: not a minipaged trace"),
    (lambda lines: [], "line 1: not a minipaged trace"),
    (lambda lines: ["hello\n"], "line 1: cut off or not JSON"),
    (lambda lines: [lines[0], "[1, 2]\n"], "line 2: not an event"),
    (lambda lines: [lines[0], '{"kind": "dance", "step": 1}\n'], "line 2: not an event"),
    (lambda lines: [lines[0], '{"kind": "write", "step": 1}\n'], "line 2: a 'write' event does not have the fields"),
    (lambda lines: [*lines[:3], lines[3].replace('"block": 7', '"block": "7"')], "line 4: block is '7', not int"),
    (lambda lines: [*lines[:3], lines[3].replace('"block": 7', '"block": -1')], "line 4: block is -1, not int (from 0"),
    (lambda lines: [lines[0], lines[1].replace('"Four"', "4")], "line 2: texts is [4, 'score',"),
    (lambda lines: [*lines[:3], lines[3].replace('"step": 1', '"step": 9999999')], "line 4: step 9999999 after step 1"),
    (lambda lines: ["\udc89PNG\r\n\x1a\udcff"], "line 1: cut off or not JSON"),
], ids=["truncated", "schema", "no start", "empty", "text", "list", "unknown event", "missing fields",
        "text for a number", "negative", "number for a text", "lines missing", "binary"])
def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path, change, says: str) -> None:
    lines = change([ev.to_json(event) + "\n" for event in figure_7()])
    path = tmp_path / "bad.jsonl"
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(TraceError, match=re.escape(says)):
        load(path)


def test_whatever_stands_in_a_file_the_error_is_named(tmp_path: Path) -> None:
    """One field after another is spoilt; the file is shown, if it still makes sense, or refused."""
    rng, refused, path = random.Random(0), 0, tmp_path / "bad.jsonl"
    junk = [None, "x", -1, 3.5, 10**6, 10**12, [], {}, [["a"]], True, [1], "start"]
    for _ in range(400):
        records = [json.loads(ev.to_json(event)) for event in figure_8()]
        record = rng.choice(records)
        record[rng.choice([name for name in record if not name.startswith("num_")])] = rng.choice(junk)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        try:
            save(path, tmp_path / "out.html")
        except TraceError:
            refused += 1
    assert refused > 300
