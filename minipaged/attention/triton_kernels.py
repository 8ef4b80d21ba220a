"""The paper's fused GPU kernel for attention in Triton (§5.1), with the contract of `minipaged.attention`.

Of the three that §5.1 names this is "Fusing block read and attention"; the two others are in `triton_blocks`. `attend`
gives each sequence with one new token to ``decode_kernel`` (split along the context, with ``reduce_kernel`` after it,
when the batch leaves the GPU idle) and each prompt to ``prefill_kernel``; both walk the block table in
``_attend_rows``, which is `eager.attend_one` on a GPU.

The paper's keys lie in a layout of their own for its CUDA kernel; here a token's keys stay together, [kv_heads,
head_dim], as the model makes them. They are read 16 bytes at a time as they lie, so that no reshape is left to do.
Sums are float32 whatever the cache holds, and addresses have 64 bits: a pool may have more than 2^31 elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..errors import InvalidConfig

if TYPE_CHECKING:
    from . import PagedBatch


@triton.jit
def _attend_rows(q, row_position, first, end, block_table, keys, values, kv_head, scale,  # q [ROWS, D]
                 BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
                 ROWS: tl.constexpr, TILE: tl.constexpr):
    """Eq. 4 for some queries of one sequence and KV head, over the positions from ``first`` to ``end``.

    The paper gives each block to a warp; here a program takes TILE positions at a time and each of them finds its own
    block, so that TILE suits the GPU and the block size can be any. As in `eager.attend_one`, sums are kept relative
    to the largest score so far. Returns that score [ROWS], the sum of the exponentials [ROWS] and the sum of the
    values weighted with them [ROWS, D].
    """
    d = tl.arange(0, D)  # the head's elements, up to a power of two
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, D], tl.float32)
    for start in range(first, end, TILE):
        position = start + tl.arange(0, TILE)
        written = position < end
        # `memory.table.translate`: what lies outside the context is not read, neither in the table nor in the cache.
        block = tl.load(block_table + position // BLOCK_SIZE, written, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        address = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d
        inside = written[:, None] & (d < HEAD_DIM)
        k = tl.load(keys + address, inside, other=0)  # [TILE, D]
        score = tl.dot(q, k.T, input_precision="ieee") * scale  # [ROWS, TILE]; "ieee": float32, never TF32
        score = tl.where(position <= row_position[:, None], score, float("-inf"))  # a token sees none after it
        new_largest = tl.maximum(largest, tl.max(score, 1))
        shrink = tl.exp(largest - new_largest)
        a = tl.exp(score - new_largest[:, None])
        total = total * shrink + tl.sum(a, 1)
        v = tl.load(values + address, inside, other=0)  # [TILE, D]
        weighted = tl.dot(a.to(v.dtype), v, weighted * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return largest, total, weighted


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(query, keys, values, output, part_largest, part_total, part_weighted,
                  sequences, query_starts, context_lens, block_tables, table_stride, scale,
                  GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                  PARTS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """One program: one new token, one KV head and all GROUP query heads that share it, one part of the context.

    Its keys and values are read once for the whole group. With one part the output is written [tokens, heads,
    head_dim], else what `_attend_rows` returns, [sequences, heads, parts(, head_dim)], for `reduce_kernel`.
    """
    i, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(sequences + i).to(tl.int64)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    head, inside = kv_head * GROUP + row, (row < GROUP)[:, None] & (d < HEAD_DIM)
    token = tl.load(query_starts + sequence).to(tl.int64)
    at = ((token * KV_HEADS * GROUP + head) * HEAD_DIM)[:, None] + d
    q = tl.load(query + at, inside, other=0)  # [ROWS, D]; the rows past GROUP are zeros, since tl.dot wants 16
    length = tl.cdiv(tl.cdiv(context_len, TILE), PARTS) * TILE  # of a part; the last ones may be empty
    first = part * length
    end = tl.minimum(first + length, context_len)
    largest, total, weighted = _attend_rows(
        q, tl.zeros([ROWS], tl.int32) + context_len - 1, first, end, block_tables + sequence * table_stride, keys,
        values, kv_head, scale, BLOCK_SIZE, KV_HEADS, HEAD_DIM, D, ROWS, TILE)
    if PARTS == 1:
        tl.store(output + at, weighted / total[:, None], inside)
    else:
        to = (i.to(tl.int64) * KV_HEADS * GROUP + head) * PARTS + part
        tl.store(part_largest + to, largest, row < GROUP)
        tl.store(part_total + to, total, row < GROUP)
        tl.store(part_weighted + (to[:, None] * HEAD_DIM + d), weighted, inside)


@triton.jit
def reduce_kernel(part_largest, part_total, part_weighted, output, sequences, query_starts,
                  HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr):
    """One program puts the parts of one token and one query head together; an empty part weighs exp(-inf) = 0."""
    i, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D)
    of = (i * HEADS + head) * PARTS + tl.arange(0, PARTS)
    largest = tl.load(part_largest + of)
    weight = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(weight * tl.load(part_total + of), 0)
    weighted = tl.load(part_weighted + of[:, None] * HEAD_DIM + d, (d < HEAD_DIM)[None, :], other=0)  # [PARTS, D]
    token = tl.load(query_starts + tl.load(sequences + i)).to(tl.int64)
    result = tl.sum(weight[:, None] * weighted, 0) / total
    tl.store(output + (token * HEADS + head) * HEAD_DIM + d, result, d < HEAD_DIM)


@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(query, keys, values, output, sequences, query_starts, query_lens, context_lens, block_tables,
                   table_stride, scale, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                   BLOCK_SIZE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """One program: as many neighbouring tokens of a prompt as fill ROWS with the heads that share one KV head."""
    QUERIES: tl.constexpr = ROWS // GROUP
    first_query = tl.program_id(0) * QUERIES
    sequence, kv_head = tl.load(sequences + tl.program_id(1)).to(tl.int64), tl.program_id(2)
    query_len = tl.load(query_lens + sequence).to(tl.int32)
    if first_query < query_len:  # the grid is as long as the longest prompt
        context_len = tl.load(context_lens + sequence).to(tl.int32)
        row, d = tl.arange(0, ROWS), tl.arange(0, D)
        q_index, head = first_query + row // GROUP, kv_head * GROUP + row % GROUP
        inside = ((row < QUERIES * GROUP) & (q_index < query_len))[:, None] & (d < HEAD_DIM)
        token = tl.load(query_starts + sequence).to(tl.int64) + q_index
        at = ((token * KV_HEADS * GROUP + head) * HEAD_DIM)[:, None] + d
        q = tl.load(query + at, inside, other=0)  # [ROWS, D]
        position = context_len - query_len + q_index  # the queries are the context's last tokens
        end = tl.minimum(context_len - query_len + first_query + QUERIES, context_len)
        _, total, weighted = _attend_rows(
            q, position, 0, end, block_tables + sequence * table_stride, keys, values, kv_head, scale,
            BLOCK_SIZE, KV_HEADS, HEAD_DIM, D, ROWS, TILE)
        tl.store(output + at, weighted / total[:, None], inside)


def supported(head_dim: int, dtype: torch.dtype, block_size: int) -> str | None:
    """Why these kernels cannot take a model and a block size, or None if they can.

    Head dims that are no power of two are padded in registers, never in memory.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in range(16, 257, 16):  # tl.dot wants 16; more than 256 would not fit the registers
        return f"the Triton kernels take head dims from 16 to 256 in steps of 16, not {head_dim}"
    if block_size not in range(1, 257):
        return f"the Triton kernels take block sizes from 1 to 256, not {block_size}"
    return None


def attention_constants(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int,
                        parts: int | None) -> dict[str, int]:
    """What ``decode_kernel`` (``parts`` given) or ``prefill_kernel`` (None) is compiled with, warps and stages too.

    A tile is 8 KiB of keys: small, so that many decode programs share a processor and some load while others compute.
    A prefill program has many rows, so that a key once read meets many queries; in float32, which tensor cores do not
    take, few, to fit the registers.
    """
    group, padded = heads // kv_heads, triton.next_power_of_2(head_dim)
    rows = 64 if parts is None and dtype.itemsize == 2 else 16
    tile = max(16, min(64, 8192 // (padded * dtype.itemsize)))
    constants = dict(GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, D=padded, TILE=tile,
                     ROWS=max(rows, triton.next_power_of_2(group)), num_warps=8 if padded == 256 else 4, num_stages=2)
    return constants if parts is None else constants | dict(PARTS=parts)


def parts_of(programs: int, longest_context: int, processors: int) -> int:
    """Into how many parts contexts are split: a power of two, so that few variants are compiled.

    ``programs``, decoding sequences * KV heads, would run without a split. If they are fewer than two for each of the
    GPU's ``processors``, some processors idle and the rest wait for memory, one load after the other; then contexts
    are split until there are two, but not into parts of less than 256 tokens nor into more than 64 parts: both numbers
    were chosen without a GPU to try them on.
    """
    parts = min(2 * processors // programs, longest_context // 256, 64)
    return 1 << max(0, parts.bit_length() - 1)


def _plan(batch: "PagedBatch") -> tuple[list[torch.Tensor], int, int]:
    """What the launches of all layers of an iteration share: made at the first, kept on the batch.

    Which sequences have one new token, which have more; of each sequence the row of its first token among the packed
    ones, its new tokens, its context. Then the longest context of the former and the most new tokens.
    """
    if "triton_plan" not in vars(batch):
        query, context = batch.query_lens, batch.context_lens
        lists = batch.decodes, batch.prompts, batch.starts[:-1], query, context
        tensors = [torch.tensor(numbers, dtype=torch.int64, device=batch.block_tables.device) for numbers in lists]
        vars(batch)["triton_plan"] = tensors, max((context[i] for i in batch.decodes), default=0), max(query)
    return vars(batch)["triton_plan"]


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: "PagedBatch", scale: float,
           parts: int | None = None) -> torch.Tensor:
    """Attention of every sequence over its own block table; the contract is that of `minipaged.attention`.

    ``parts``, a power of two, says into how many parts decoding contexts are split, instead of `parts_of`.
    Raises `InvalidConfig` for what `supported` refuses.
    """
    (_, heads, head_dim), (_, block_size, kv_heads, _) = query.shape, keys.shape
    if reason := supported(head_dim, keys.dtype, block_size):
        raise InvalidConfig(reason)
    (decodes, prompts, starts, query_lens, context_lens), longest_context, longest_query = _plan(batch)
    query, shape = query.contiguous(), (heads, kv_heads, head_dim, keys.dtype, block_size)
    output, table = torch.empty_like(query), (batch.block_tables, batch.block_tables.stride(0))
    if n := len(decodes):
        if parts is None:  # under the interpreter there is no GPU to fill
            gpu = torch.cuda.get_device_properties(query.device) if query.is_cuda else None
            parts = parts_of(n * kv_heads, longest_context, gpu.multi_processor_count) if gpu else 1
        constants, of = attention_constants(*shape, parts), (n, heads, parts)
        part = [query.new_empty(size, dtype=torch.float32) if parts > 1 else None for size in (of, of, (*of, head_dim))]
        decode_kernel[n, kv_heads, parts](query, keys, values, output, *part, decodes, starts, context_lens, *table,
                                          scale, **constants)
        if parts > 1:
            reduce_kernel[n, heads](*part, output, decodes, starts, HEADS=heads, HEAD_DIM=head_dim, PARTS=parts,
                                    D=constants["D"])
    if n := len(prompts):
        constants = attention_constants(*shape, None)
        tiles = triton.cdiv(longest_query, constants["ROWS"] // constants["GROUP"])
        prefill_kernel[tiles, n, kv_heads](query, keys, values, output, prompts, starts, query_lens, context_lens,
                                           *table, scale, **constants)
    return output
