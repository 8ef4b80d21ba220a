"""Records one query's walk over its block table, in an engine that runs: real keys and values, from the cache.

`attention.eager.walk` is what computes; here its numbers are taken out for `views.walk`, which knows no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .attention import PagedBatch, eager
from .errors import InvalidParams, NotRunning
from .memory.table import translate
from .views.walk import Entry, Walk

if TYPE_CHECKING:
    from .engine import LLMEngine
    from .llm import LLM
    from .runner import ModelRunner
    from .sequence import Sequence


@torch.inference_mode()
def walk_of(llm: "LLM", layer: int, head: int, seq_id: int | None = None, position: int | None = None) -> Walk:
    """The attention of one token of a running request in one layer and head; the engine is left as it was.

    The cache holds keys and values but no query, so the model runs once more for the token, over what is in the
    cache, without writing. Take the walk between two iterations, as in a loop over `LLM.stream`.

    Parameters
    ----------
    layer, head : int
        Of the model, from 0; a query head.
    seq_id : int or None
        As in the engine's trace and block tables; None: the first sequence that runs.
    position : int or None
        Of a token whose keys and values are in the cache; None: the newest.

    Raises
    ------
    NotRunning
        No such sequence has its blocks on the device now.
    InvalidParams
        The model has no such layer or head, or the cache no such token.
    """
    engine = llm.engine
    with engine.between_steps():
        seq = _running(engine, seq_id)
        position = seq.num_computed - 1 if position is None else position
        heads, cache = engine.runner.hf_config.num_attention_heads, engine.runner.cache
        num_layers, _, _, block_size, num_kv_heads, _ = cache.data.shape
        for name, value, count in (("layer", layer, num_layers), ("head", head, heads),
                                   ("position", position, seq.num_computed)):
            if not 0 <= value < count:
                raise InvalidParams(f"{name} is {value}; give one from 0 to {count - 1}")
        table = engine.manager.get_block_table(seq).blocks
        query, scale = _queries(engine.runner, seq.token_ids[position], position, table)[layer]
        kv_head = head * num_kv_heads // heads
        keys, values = (blocks[:, :, kv_head:kv_head + 1] for blocks in cache.layers[layer])
        texts = [engine.tokens.text_of(token) for token in seq.token_ids[:seq.num_computed]]
        entries, plain = record(query[None, head:head + 1], keys, values, table, position, scale, texts)
    return Walk(layer, head, kv_head, seq.seq_id, position, block_size, entries, table[len(entries):], plain)


def record(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: list[int], position: int,
           scale: float, texts: list[str]) -> tuple[list[Entry], list[float]]:
    """The walk of one query of one head, as `Walk.entries`, and the output of Eq. 3 beside it, as `Walk.plain`.

    Parameters
    ----------
    query : Tensor [1, 1, head_dim]
        Of the token at ``position``.
    keys, values : Tensor [blocks, block_size, 1, head_dim]
        One layer and KV head of the cache.
    table, scale
        As in `eager.walk`.
    texts : list[str]
        Of the sequence's tokens, as far as they are in the cache.
    """
    size, entries = keys.shape[1], []
    for index, state in enumerate(eager.walk(query, keys, values, table, position + 1, scale)):
        entries.append(Entry(table[index], texts[index * size:(index + 1) * size], state.score.flatten().tolist(),
                             state.largest.item(), state.shrink.item(), state.total.item(),
                             state.weighted.flatten().tolist()))
    block, offset = translate(torch.tensor(table, device=keys.device),
                              torch.arange(position + 1, device=keys.device), size)
    k, v = keys[block, offset, 0].float(), values[block, offset, 0].float()  # [tokens, head_dim], in one piece
    a = torch.softmax(k @ query[0, 0].float() * scale, 0)  # Eq. 3
    return entries, (a @ v).tolist()


def _running(engine: "LLMEngine", seq_id: int | None) -> "Sequence":
    running = [seq for group in engine.scheduler.running for seq in group.unfinished if seq.num_computed]
    for seq in running:
        if seq_id in (None, seq.seq_id):
            return seq
    which = "no sequence runs" if seq_id is None else f"sequence {seq_id} does not run"
    raise NotRunning(f"{which} now (running: {', '.join(str(seq.seq_id) for seq in running) or 'none'}); take the walk "
                     "while a request generates, for example in a loop over llm.stream(...)")


def _queries(runner: "ModelRunner", token_id: int, position: int,
             table: list[int]) -> list[tuple[torch.Tensor, float]]:
    """Query, Tensor [heads, head_dim], and scale of every layer, for a token that is in the cache."""
    found: list[tuple[torch.Tensor, float]] = []

    def attend(query: torch.Tensor, *rest: object) -> torch.Tensor:
        """A layer's attention, whose query and scale are kept."""
        found.append((query[0].clone(), rest[-1]))  # the next layer's may come to lie in its place
        return runner.backend.attend(query, *rest)

    batch = PagedBatch([1], [position + 1], runner.tensor([table]), runner.tensor([]), runner.tensor([]), runner.cache,
                       replace(runner.backend, attend=attend, works=None))
    runner.model(input_ids=runner.tensor([[token_id]]), position_ids=runner.tensor([[position]]), use_cache=False, logits_to_keep=1,
                 paged_batch=batch)
    return found
