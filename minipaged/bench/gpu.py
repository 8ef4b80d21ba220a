"""What only a GPU can show: Figures 18 and 19a on the card at hand, and the share of its bandwidth that attention gets.

No GPU has run this yet. Its shapes, its bytes and its tables are tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention import PagedBatch
from ..backends import Backend, choose_backend
from ..display import text_table
from ..errors import MinipagedError
from ..memory.cache import PLAIN, BlockMoves, KVCache
from ..reproduce.paper import curves
from .contenders import Minipaged
from .workload import make_checkpoint, make_workload

BATCHES, CONTEXTS = (8, 32), (64, 128, 256)  # Figure 18a
BLOCK_SIZES = tuple(2**i for i in range(9))  # Figures 18b and 19a
MOVED_TOKENS = 256  # Figure 19a


class NoGPU(MinipagedError, RuntimeError):
    """A measurement that means something on a GPU alone, and PyTorch sees none."""


@dataclass(frozen=True)
class Shape:
    """A model's attention; the defaults are OPT-13B's, which the paper measured."""

    layers: int = 40
    heads: int = 40
    kv_heads: int = 40
    head_dim: int = 128
    ffn: int = 20480
    dtype: torch.dtype = torch.float16

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens in one layer."""
        return 2 * tokens * self.kv_heads * self.head_dim * self.dtype.itemsize


def gpu_bench(shape: Shape = Shape()) -> str:
    """Measure everything on the first GPU; returns the tables.

    Raises
    ------
    NoGPU
        PyTorch sees none.
    """
    if not torch.cuda.is_available():
        raise NoGPU("PyTorch sees no GPU (CUDA or ROCm), and a CPU's times say nothing about one; without a GPU, "
                    "minipaged kernels --report states what the kernels must move and the time that takes at least")
    device = torch.device("cuda", torch.cuda.current_device())
    with TemporaryDirectory() as folder:
        return "\n\n".join([f"{torch.cuda.get_device_name(device)}, {shape}", attention_table(shape, device),
                            block_size_table(shape, device), swap_table(shape, device),
                            engine_table(make_checkpoint(Path(folder)), "float16")])


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The median time of a call once it is compiled and warm, on the GPU's own clock if there is one."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1000)
        else:
            start_s = perf_counter()
            call()
            times.append(perf_counter() - start_s)
    return median(times)


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second that the card's own copy reads and writes, over ``size`` bytes."""
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    return 2 * size / seconds(partial(target.copy_, source), device)


class Paged:
    """One new token for each of ``batch`` sequences, whose blocks lie scattered in a pool of their own.

    Parameters
    ----------
    shape : Shape
        The model. All its layers run in turn, so that no layer's keys wait in the GPU's cache from the last call.
    batch, context, block_size : int
        Sequences, tokens of each, tokens per block.
    """

    def __init__(self, shape: Shape, device: torch.device, batch: int, context: int, block_size: int) -> None:
        blocks = -(-context // block_size)
        self.shape, self.backend = shape, backend_for(shape, device, block_size)
        self.cache = KVCache(shape.layers, batch * blocks, 0, block_size, shape.kv_heads, shape.head_dim, shape.dtype,
                             device)
        self.cache.data.normal_()
        generator = torch.Generator().manual_seed(0)
        tables = torch.randperm(batch * blocks, generator=generator).view(batch, blocks).to(device)
        self.batch = PagedBatch([1] * batch, [context] * batch, tables, None, torch.empty(0), self.cache, self.backend)
        self.query = torch.randn(batch, shape.heads, shape.head_dim, device=device).to(shape.dtype)

    def __call__(self) -> torch.Tensor:
        """All layers; the output of the last, Tensor [batch, heads, head_dim]."""
        for layer in range(self.shape.layers):
            out = self.backend.attend(self.query, *self.cache.layers[layer], self.batch, self.shape.head_dim ** -0.5)
        return out

    def contiguous(self) -> Callable[[], torch.Tensor]:
        """The same with each sequence's keys and values in one piece, by PyTorch's own attention."""
        heads_first = [tensor[self.batch.block_tables].flatten(1, 2)[:, :self.batch.context_lens[0]].transpose(1, 2)
                       for tensor in self.cache.data.flatten(0, 1)]  # [batch, kv_heads, context, head_dim]
        layers = [tensor.contiguous() for tensor in heads_first]
        query = self.query[:, :, None]  # [batch, heads, 1, head_dim]

        def call() -> torch.Tensor:
            """As `__call__`."""
            for keys, values in zip(layers[::2], layers[1::2]):
                out = scaled_dot_product_attention(query, keys, values, scale=self.shape.head_dim ** -0.5,
                                                   enable_gqa=True)
            return out[:, :, 0]

        return call


def backend_for(shape: Shape, device: torch.device, block_size: int) -> Backend:
    """What the engine would choose here."""
    return choose_backend("auto", device, shape.head_dim, shape.dtype, block_size)


def attention_table(shape: Shape, device: torch.device) -> str:
    """Figure 18a: our kernel over blocks of 16 tokens against PyTorch's over contiguous keys, and both's bandwidth."""
    copy, rows = copy_bandwidth(device, 1 << 30 if device.type == "cuda" else 1 << 20), []
    for batch in BATCHES:
        theirs = {name: dict(curves("fig18a")[f"{name} (bs {batch})"]) for name in ("vLLM", "FT")}
        for context in CONTEXTS:
            paged = Paged(shape, device, batch, context, 16)
            ours, whole = (seconds(call, device) / shape.layers for call in (paged, paged.contiguous()))
            paper = theirs["vLLM"][context] / theirs["FT"][context] - 1
            rows.append((batch, context, round(1e6 * ours, 1), round(1e6 * whole, 1),
                         f"{100 * (ours / whole - 1):+.0f}", f"{100 * paper:+.0f}",
                         round(shape.kv_bytes(batch * context) / ours / 1e9, 1),
                         round(100 * shape.kv_bytes(batch * context) / ours / copy, 1)))
    header = ("sequences", "context", "paged us", "contiguous us", "more %", "paper's more %", "KV GB/s", "% of copy")
    return text_table(header, rows, f"Figure 18a: attention of one layer; this card's own copy: {copy / 1e9:,.0f} GB/s")


def block_size_table(shape: Shape, device: torch.device, batch: int = 32, context: int = 256) -> str:
    """The kernel alone by block size; Figure 18b is end to end, see `engine_table`."""
    rows = []
    for size in BLOCK_SIZES:
        took = seconds(Paged(shape, device, batch, context, size), device) / shape.layers
        rows.append((size, round(1e6 * took, 1), round(shape.kv_bytes(batch * context) / took / 1e9, 1)))
    title = f"The kernel by block size, {batch} sequences of {context}"
    return text_table(("block size", "us", "KV GB/s"), rows, title)


def engine_table(source: str, dtype: str, requests: int = 32, sizes: tuple[int, ...] = BLOCK_SIZES) -> str:
    """Figure 18b, end to end: tokens per second by block size, with memory for a quarter of the requests."""
    from ..loading import load_config

    load = make_workload(load_config(source)[1].vocab_size, requests)
    tokens = max(sum(load.blocks(1)) // 4, max(load.blocks(max(sizes))) * max(sizes))
    rows = []
    for size in sizes:
        contender = Minipaged(source, dtype, "quarter", tokens // size, size)
        contender.run(load)
        run = contender.run(load)
        rows.append((size, tokens // size, round(run.tokens / run.seconds, 1), run.preemptions))
    title = f"Figure 18b's question, asked of {requests} requests at once: the engine by block size"
    return text_table(("block size", "blocks", "tokens/s", "preemptions"), rows, title)


def swap_table(shape: Shape, device: torch.device) -> str:
    """Figure 19a: milliseconds to move 256 tokens of all layers, and to compute them again."""
    recompute, paper = recompute_seconds(shape, device), {name: dict(points) for name, points in
                                                          curves("fig19a").items()}
    rows = []
    for size in BLOCK_SIZES:
        ours = swap_seconds(shape, device, size, backend_for(shape, device, size).moves)
        single = swap_seconds(shape, device, size, BY_BLOCK)
        rows.append((size, *(round(1000 * took, 2) for took in (*ours, *single, recompute)),
                     *(round(paper[name][size], 1) for name in ("Swap out", "Swap in", "Recompute"))))
    header = ("block size", "out ms", "in ms", "out by block", "in by block", "recompute ms", "paper's out",
              "paper's in", "paper's recompute")
    return text_table(header, rows, f"Figure 19a: {MOVED_TOKENS} tokens of {shape.layers} layers; by block: a copy for "
                                    "each block, layer, and key or value, as the paper's")


def swap_seconds(shape: Shape, device: torch.device, block_size: int, moves: BlockMoves) -> tuple[float, float]:
    """To swap `MOVED_TOKENS` out, and back in."""
    count = -(-MOVED_TOKENS // block_size)
    cache = KVCache(shape.layers, 2 * count, count, block_size, shape.kv_heads, shape.head_dim, shape.dtype, device,
                    moves)
    cache.data.zero_()
    out = [(2 * i, i) for i in range(count)]  # every other block, so that they are scattered
    back = [(host, block) for block, host in out]
    return seconds(partial(cache.swap_out, out), device), seconds(partial(cache.swap_in, back), device)


def _by_block(source: torch.Tensor, target: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    for read, write in pairs:
        for blocks, copies in zip(source.flatten(0, 1), target.flatten(0, 1)):
            copies[write].copy_(blocks[read], non_blocking=True)


BY_BLOCK = BlockMoves(PLAIN.copy, _by_block, _by_block)


def recompute_seconds(shape: Shape, device: torch.device) -> float:
    """A prompt of `MOVED_TOKENS` through one layer of OPT's kind with random weights, times the number of layers."""
    from transformers import OPTConfig
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    hidden = shape.heads * shape.head_dim
    config = OPTConfig(hidden_size=hidden, ffn_dim=shape.ffn, num_attention_heads=shape.heads, num_hidden_layers=1,
                       word_embed_proj_dim=hidden, attn_implementation="sdpa")
    layer = OPTDecoderLayer(config, layer_idx=0).to(device, shape.dtype).eval()
    states = torch.randn(1, MOVED_TOKENS, hidden, device=device).to(shape.dtype)
    with torch.inference_mode():
        return shape.layers * seconds(lambda: layer(states, attention_mask=None), device)
