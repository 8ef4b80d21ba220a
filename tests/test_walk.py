"""The attention walk: its numbers are those of plain attention, on a running engine too, and every picture shows them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from traces import NASTY

from minipaged import LLM, SamplingParams
from minipaged.attention import eager
from minipaged.errors import InvalidParams, NotRunning, TraceError
from minipaged.views import walk_view
from minipaged.views.canvas import WIDTH
from minipaged.views.frame import visible
from minipaged.views.walk import Entry, Walk
from minipaged.walk import record, walk_of

SVG = "{http://www.w3.org/2000/svg}"


def random_walk(seed: int, size: int, context: int, head_dim: int = 8, later: int = 0, texts: list[str] | None = None,
                ) -> tuple[Walk, np.ndarray, np.ndarray, np.ndarray]:
    """A walk over scattered blocks whose other slots hold NaN, and its query, keys and values in one piece."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    blocks, length = ceil((context + later) / size), context + later
    table = rng.sample(range(blocks + 3), blocks)
    keys = torch.full((blocks + 3, size, 1, head_dim), float("nan"))
    values = keys.clone()
    query = 3 * torch.randn(1, 1, head_dim, generator=generator)
    k, v = torch.randn(2, length, head_dim, generator=generator)
    for position in range(length):
        keys[table[position // size], position % size, 0] = k[position]
        values[table[position // size], position % size, 0] = v[position]
    texts = texts or [f"t{i}" for i in range(length)]
    entries, plain = record(query, keys, values, table, context - 1, head_dim ** -0.5, texts)
    walk = Walk(1, 2, 2, 0, context - 1, size, entries, table[len(entries):], plain)
    return walk, *(tensor.double().numpy() for tensor in (query[0, 0], k[:context], v[:context]))


# ---- numbers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(40))
def test_every_entry_is_eq_4_and_the_end_is_eq_3(seed: int) -> None:
    rng = random.Random(seed)
    size, context = rng.choice([1, 2, 3, 4, 7, 8, 16, 32]), rng.choice([1, 2, 5, 16, 17, 31, 32, 33, 60])
    head_dim = rng.choice([1, 4, 24, 64, 80])
    walk, q, k, v = random_walk(seed, size, context, head_dim, later=rng.choice([0, 0, 1, 9]))
    scores = k @ q / np.sqrt(head_dim)
    assert len(walk.entries) == ceil(context / size)
    largest_before = -np.inf
    for at, entry in enumerate(walk.entries):
        seen = scores[:(at + 1) * size]
        terms = np.exp(seen - seen.max())
        assert entry.scores == pytest.approx(seen[at * size:], abs=1e-4)
        assert entry.largest == pytest.approx(seen.max(), abs=1e-4)
        assert entry.shrink == pytest.approx(np.exp(largest_before - seen.max()), abs=1e-4)
        assert entry.total == pytest.approx(terms.sum(), abs=1e-4)
        assert entry.weighted == pytest.approx(terms @ v[:len(seen)], abs=1e-4)
        assert walk.weights(at) == pytest.approx(terms / terms.sum(), abs=1e-5)
        largest_before = seen.max()
    naive = np.exp(scores) / np.exp(scores).sum() @ v
    assert walk.output == pytest.approx(naive, abs=1e-5) and walk.plain == pytest.approx(naive, abs=1e-5)
    assert walk.difference < 1e-5


def test_the_difference_is_measured() -> None:
    walk, *_ = random_walk(0, 4, 10)
    wrong = replace(walk, plain=[walk.plain[0], walk.plain[1] + 0.22, *walk.plain[2:]])
    assert wrong.difference == pytest.approx(0.22, abs=1e-5)
    assert "plain softmax attention (Eq. 3): 2e-01" in walk_view(wrong).text
    assert "plain softmax attention (Eq. 3): less than 1e-5" in walk_view(walk).text


def test_several_queries_at_once_walk_like_each_alone() -> None:
    """With more than one, eager masks what lies behind each query; alone, it does not read it."""
    walk, *_ = random_walk(3, 4, 11)
    rng = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(shape, generator=rng) for shape in ((3, 4, 8), (5, 4, 2, 8), (5, 4, 2, 8)))
    together = list(eager.walk(query, keys, values, [4, 0, 2], 11, 0.5))
    for i in range(3):
        alone = list(eager.walk(query[i:i + 1], keys, values, [4, 0, 2], 9 + i, 0.5))
        for one, all_ in zip(alone, together, strict=True):
            seen = one.score.shape[-1]
            assert torch.allclose(all_.score[i:i + 1, ..., :seen], one.score, atol=1e-6)
            assert torch.isinf(all_.score[i, ..., seen:]).all()
            for name in ("largest", "shrink", "total", "weighted"):
                assert torch.allclose(getattr(all_, name)[i:i + 1], getattr(one, name), atol=1e-5), name


# ---- on a running engine ---------------------------------------------------------------------------------------------

PROMPTS = [list(range(10, 19)), [30, 31, 32]]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@contextmanager
def running(model: str, steps: int, **options: object) -> Iterator[LLM]:
    """An engine that has run two requests for so many iterations."""
    with LLM(model, **{"block_size": 4, "num_gpu_blocks_override": 20, "audit": True} | options) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        while llm.engine.scheduler.iteration < steps:
            next(stream)
        yield llm


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", ["tiny-opt", "opt", "llama", "qwen2", "qwen3"])
def test_the_weights_are_those_that_transformers_computes_itself(checkpoint: Callable, name: str, backend: str) -> None:
    """In every layer and head, for both sequences, at their newest token and at an earlier one."""
    from transformers import AutoModelForCausalLM

    from minipaged.loading import BUNDLED

    source = BUNDLED.get(name, checkpoint(name))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config
    with running(checkpoint(name), 4, attention=backend) as llm:
        for group in llm.engine.scheduler.running:
            [seq] = group.seqs
            with torch.no_grad():
                ids = torch.tensor([seq.token_ids[:seq.num_computed]])
                own = model(ids, output_attentions=True).attentions  # per layer [1, heads, queries, keys]
            assert seq.num_computed == seq.prompt_len + 3
            for position in (None, 1):
                at = seq.num_computed - 1 if position is None else position
                for layer in range(config.num_hidden_layers):
                    for head in range(config.num_attention_heads):
                        walk = walk_of(llm, layer, head, seq.seq_id, position)
                        assert walk.position == at and walk.difference < 1e-5
                        end = len(walk.entries) - 1
                        assert walk.weights(end) == pytest.approx(own[layer][0, head, at, :at + 1].tolist(), abs=1e-5)


def test_the_block_table_and_the_texts_are_the_engines() -> None:
    with running("tiny-opt", 4) as llm:
        for group in llm.engine.scheduler.running:
            [seq] = group.seqs
            table = llm.block_manager.get_block_table(seq)
            for position in range(seq.num_computed):
                walk = walk_of(llm, 5, 3, seq.seq_id, position)
                assert [entry.block for entry in walk.entries] + walk.later == table.blocks
                read = [text for entry in walk.entries for text in entry.tokens]
                texts = [llm.engine.tokens.text_of(token) for token in seq.token_ids[:seq.num_computed]]
                assert read == texts[:4 * len(walk.entries)] and len(read) > position
                assert sum(len(entry.scores) for entry in walk.entries) == position + 1


def test_looking_changes_nothing() -> None:
    params = [GREEDY, SamplingParams(n=3, seed=0, max_tokens=6, ignore_eos=True)]
    with LLM("tiny-opt", block_size=4, num_gpu_blocks_override=20, audit=True) as llm:
        undisturbed = [[o.token_ids for o in out.outputs] for out in llm.generate(PROMPTS, params)]
        seen = set()
        for out in llm.stream(PROMPTS, params):
            for group in llm.engine.scheduler.running:
                for seq in group.unfinished:
                    before = llm.engine.runner.cache.data.clone()
                    seen.add(walk_of(llm, 2, 1, seq.seq_id).seq_id)
                    assert torch.equal(before.nan_to_num(), llm.engine.runner.cache.data.nan_to_num())
            if out.finished:
                assert [o.token_ids for o in out.outputs] == undisturbed[int(out.request_id) - 2]
        assert len(seen) == 4, "samples that share blocks too"


def test_the_first_sequence_is_taken_unless_one_is_named() -> None:
    with running("tiny-opt", 2) as llm:
        assert walk_of(llm, 0, 0).seq_id == 0 and walk_of(llm, 0, 0, seq_id=1).seq_id == 1


@pytest.mark.parametrize(("layer", "head", "position", "message"), [
    (6, 0, None, "layer is 6; give one from 0 to 5"), (-1, 0, None, "layer is -1"),
    (0, 4, None, "head is 4; give one from 0 to 3"), (0, 0, 10, "position is 10; give one from 0 to 9")])
def test_what_the_model_does_not_have_is_refused(layer: int, head: int, position: int | None, message: str) -> None:
    with running("tiny-opt", 2) as llm, pytest.raises(InvalidParams, match=re.escape(message)):
        walk_of(llm, layer, head, position=position)


def test_a_sequence_that_does_not_run_is_refused() -> None:
    with running("tiny-opt", 2) as llm:
        with pytest.raises(NotRunning, match=r"sequence 7 does not run now \(running: 0, 1\); take the walk while"):
            walk_of(llm, 0, 0, seq_id=7)
    with LLM("tiny-opt", num_gpu_blocks_override=4) as llm:
        llm.generate(PROMPTS[0], GREEDY)
        with pytest.raises(NotRunning, match=r"no sequence runs now \(running: none\)"):
            walk_of(llm, 0, 0)


# ---- the text and the drawing ----------------------------------------------------------------------------------------

def by_hand() -> Walk:
    """The walk of Figure 5's query, with numbers that can be checked in the head."""
    return Walk(0, 1, 0, 3, 5, 4, [
        Entry(7, ["Four", "score", "and", "seven"], [0.0, 0.0, 0.0, 0.0], 0.0, 0.0, 4.0, [4.0, 0.0]),
        Entry(1, ["years", "ago", "our", "fathers"], [0.0, 50.0], 50.0, 0.0, 1.0, [0.0, 1.0])], [3], [0.0, 1.0])


def test_the_text() -> None:
    assert walk_view(by_hand()).text == """\
sequence 3, layer 0, head 1 (KV head 0): the query of "ago" at position 5

entry  block  slots: token, score q·k/√d                                                   m  rescale        l  accumulator
-----  -----  ---------------------------------------------------------------------  -------  -------  -------  -----------
    0      7  | Four      0.00 | score     0.00 | and       0.00 | seven     0.00 |     0.00        –     4.00  [4.00 0.00]
    1      1  | years     0.00 | ago      50.00 | our     masked | fathers masked |    50.00    ×0.00     1.00  [0.00 1.00]
entries: 1 behind the query's position, never read

weights a_ij = exp(score - m) / l
position  token  weight
--------  -----  ------  ----------------------------------------
       0  Four     0.0%
       1  score    0.0%
       2  and      0.0%
       3  seven    0.0%
       4  years    0.0%
       5  ago    100.0%  ########################################

output, accumulator / l: [0.00 1.00]
largest difference to plain softmax attention (Eq. 3): less than 1e-5"""
    assert walk_view(by_hand(), 0).text == """\
sequence 3, layer 0, head 1 (KV head 0): the query of "ago" at position 5

entry  block  slots: token, score q·k/√d                                           m  rescale        l  accumulator
-----  -----  -------------------------------------------------------------  -------  -------  -------  -----------
    0      7  | Four    0.00 | score   0.00 | and     0.00 | seven   0.00 |     0.00        –     4.00  [4.00 0.00]
entries: 1 more to read, 1 behind the query's position, never read

weights so far, exp(score - m) / l
position  token  weight
--------  -----  ------  ----------
       0  Four    25.0%  ##########
       1  score   25.0%  ##########
       2  and     25.0%  ##########
       3  seven   25.0%  ##########"""


def texts_of(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_drawing_says_what_the_text_says(at: int) -> None:
    walk, *_ = random_walk(5, 4, 11)
    view = walk_view(walk, at)
    drawn = texts_of(view.svg)
    for entry in walk.entries[:at + 1]:
        for offset, score in enumerate(entry.scores):
            assert f"{score:.2f}" in drawn and entry.tokens[offset] in drawn
        assert {str(entry.block), f"{entry.largest:.2f}", f"{entry.total:.2f}"} <= set(drawn)
    assert [f"×{entry.shrink:.2f}" for entry in walk.entries[1:at + 1]] == [t for t in drawn if t.startswith("×")]
    assert [t for t in drawn if t.endswith("%")] == [f"{weight:.1%}" for weight in walk.weights(at)]
    assert any("less than 1e-5" in text for text in drawn) == (at == 2)
    assert drawn.count("empty") == (1 if at == 2 else 0)


def test_the_bars_are_as_long_as_the_weights() -> None:
    walk, *_ = random_walk(5, 4, 11)
    [bars] = [p.get("d") for p in ElementTree.fromstring(walk_view(walk).svg).iter(f"{SVG}path")
              if p.get("fill") == "#0072B2"]
    heights = [float(height) for height in re.findall(r"v([\d.]+)h", bars)]
    weights = walk.weights(2)
    assert [h / max(heights) for h in heights] == pytest.approx([w / max(weights) for w in weights], abs=0.01)


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("blocks", [1, 2, 64, 225])
def test_long_tables_stay_small_and_show_first_present_and_last(size: int, blocks: int) -> None:
    texts = [NASTY[i % len(NASTY)] for i in range(size * blocks)]
    walk, *_ = random_walk(1, size, size * blocks, head_dim=128, texts=texts)
    for at in {0, blocks // 2, blocks - 1}:
        view = walk_view(walk, at)
        assert len(view.svg.encode()) <= 20_000, len(view.svg.encode())
        assert len(view.text.splitlines()) < 60 and max(map(len, view.text.splitlines())) < 160
        root = ElementTree.fromstring(view.svg)
        width, height = map(float, root.get("viewBox").split()[2:])
        assert width == WIDTH and root.get("width") == "100%" and height < 720
        assert all(0 <= float(t.get("x")) <= WIDTH and 0 < float(t.get("y")) < height for t in root.iter(f"{SVG}text"))
        entries = [int(row) for row in re.findall(r"^ *(\d+) +\d+  \|", view.text, re.MULTILINE)]
        assert entries[0] == 0 and entries[-1] == at and entries == sorted(set(entries))
        shown = [walk.entries[entry] for entry in entries]
        assert [e.block for e in shown] == [int(b) for b in re.findall(r"^ *\d+ +(\d+)  \|", view.text, re.MULTILINE)]


def test_hostile_tokens_are_text() -> None:
    walk, *_ = random_walk(2, 4, len(NASTY), texts=NASTY)
    for at in range(len(walk.entries)):
        view = walk_view(walk, at)
        allowed = {f"{SVG}{tag}" for tag in ("svg", "title", "rect", "path", "text")}
        assert {element.tag for element in ElementTree.fromstring(view.svg).iter()} <= allowed
        drawn = texts_of(view.svg)
        for offset, token in enumerate(walk.entries[at].tokens):
            assert any(text and visible(token).startswith(text.rstrip("…")) for text in drawn), token
        assert "\x1b" not in view.text and "\u202e" not in view.text + view.svg


def test_every_process_draws_the_same() -> None:
    script = ("import sys; sys.path.insert(0, 'tests'); from test_walk import random_walk; "
              "from minipaged.views import walk_view; import hashlib; v = walk_view(random_walk(7, 4, 30)[0], 4); "
              "print(hashlib.sha1((v.text + v.svg).encode()).hexdigest())")
    found = {subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True,
                            text=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1


@pytest.mark.parametrize("at", [-1, 2])
def test_an_entry_that_is_not_there_is_refused(at: int) -> None:
    with pytest.raises(TraceError, match="the entries 0 to 1"):
        walk_view(by_hand(), at)
