"""How long an iteration takes on the paper's GPUs: weights, keys and values, arithmetic, and what an engine adds.

A roofline: weights are read once per iteration, unless the arithmetic takes longer; keys and values are read for every
sequence that decodes. The constants below are all there are, the same for every model, workload, system and figure.
Each says whether it is a data sheet's or to which points of the paper it is fitted; those points prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import NamedTuple

MS, US = 1e-3, 1e-6


class Work(NamedTuple):
    """What one iteration gives the GPUs to do.

    Attributes
    ----------
    seqs : int
        Sequences that get a token.
    tokens : int
        Tokens that go through the model: one per sequence that decodes, and whole prompts.
    context : int
        Tokens whose keys and values are read: the contexts of all sequences that decode. Prompts attend to themselves.
    copied : int
        Tokens whose keys and values are copied within the GPU.
    swapped_in, swapped_out : int
        Blocks moved from and to the host.
    """

    seqs: int
    tokens: int
    context: int
    copied: int = 0
    swapped_in: int = 0
    swapped_out: int = 0


@dataclass(frozen=True)
class GPU:
    """Bytes per second of its memory, and floating point operations per second in 16 bit; its data sheet's."""

    name: str
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Model:
    """Sizes of a model with 16-bit weights."""

    name: str
    hidden: int
    layers: int
    weight_bytes: float

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values: 2 x hidden size x layers x 2 bytes (§3)."""
        return 2 * self.hidden * self.layers * 2


@dataclass(frozen=True)
class Server:
    """A model on so many GPUs, and the slots for keys and values that they have left."""

    model: Model
    gpu: GPU
    gpus: int
    slots: int

    def blocks(self, block_size: int = 16) -> int:
        """Blocks of that size in the pool."""
        return self.slots // block_size


A100_40GB = GPU("A100-40GB", 1555e9, 312e12)
A100_80GB = GPU("A100-80GB", 2039e9, 312e12)
H100 = GPU("H100", 3350e9, 989e12)
# Weights as in Table 1.
OPT_13B = Model("OPT-13B", 5120, 40, 26e9)
OPT_66B = Model("OPT-66B", 9216, 64, 132e9)
OPT_175B = Model("OPT-175B", 12288, 96, 346e9)
LLAMA_13B = Model("LLaMA-13B", 5120, 40, 26e9)
# Table 1's slots; for OPT-13B the 984 blocks of 16 that a bar of Figure 2 gives away, and LLaMA-13B has the same sizes.
SERVERS = {"OPT-13B": Server(OPT_13B, A100_40GB, 1, 15_744), "OPT-66B": Server(OPT_66B, A100_40GB, 4, 9_700),
           "OPT-175B": Server(OPT_175B, A100_80GB, 8, 60_100), "LLaMA-13B": Server(LLAMA_13B, A100_40GB, 1, 15_744)}

# Share of the bandwidth. Fitted: FasterTransformer's first points in Figure 12a, b and c, which read little but weights;
# an hour each, 47 requests. Keys and values are taken to be read as fast; Figure 18a's kernel reads at half the
# bandwidth if it has OPT-13B's heads, which the paper does not tell.
BANDWIDTH = 0.772
FLOPS = 0.648  # share of the arithmetic. Fitted: Figure 19a, recomputation of 256 tokens
# Seconds of an all-reduce per layer, for each GPU beyond the first. Fitted, with BANDWIDTH: the same three points.
ALL_REDUCE = 0.0206 * MS
# By what share reading keys and values takes longer each time the block is halved, below the paper's 16. Fitted: Figure
# 18b, ShareGPT, block size 8, as `minipaged reproduce` draws it.
PER_HALVING = 0.64


@dataclass(frozen=True)
class Engine:
    """Seconds that an engine adds to an iteration: per layer; per worker beyond the first, for the scheduler's message
    to it and its answer (§4.6); and per sequence, for sampling and bookkeeping."""

    per_layer: float
    per_worker: float
    per_sequence: float


# The paper's Orcas and vLLM are one engine (§6.1). Fitted, all three at once, by least squares: the lightest loads in
# Figure 12, which are the first point of each of the Orcas' curves and the first two of each of vLLM's.
VLLM = Engine(0.120 * MS, 3.90 * MS, 0.394 * MS)
FASTER_TRANSFORMER = Engine(0.0, 0.0, 0.0)


class Transfer(NamedTuple):
    """PCIe in one direction: seconds per copy, and bytes per second."""

    per_copy: float
    bandwidth: float

    def begin(self, blocks: int, layers: int) -> float:
        """Seconds to begin the copies of so many blocks: one per block, layer, and key or value, as the artifact."""
        return 2 * layers * blocks * self.per_copy

    def move(self, size: float) -> float:
        """Seconds until so many bytes have moved."""
        return size / self.bandwidth


# Fitted: Figure 19a, block sizes 1 and 256.
SWAP_IN = Transfer(3.17 * US, 12.3e9)
SWAP_OUT = Transfer(1.93 * US, 13.2e9)


@dataclass(frozen=True)
class Cost:
    """The time of iterations on a server."""

    server: Server
    engine: Engine = VLLM
    block_size: int = 16

    @cached_property
    def _constants(self) -> tuple[float, ...]:
        model, gpu, gpus = self.server.model, self.server.gpu, self.server.gpus
        engine, bandwidth = self.engine, gpus * gpu.bandwidth * BANDWIDTH
        return (model.weight_bytes / bandwidth,
                model.weight_bytes / (gpus * gpu.flops * FLOPS),  # two operations per weight, which has two bytes
                model.kv_bytes / bandwidth * self.small_blocks,
                model.layers * engine.per_layer + (gpus - 1) * (model.layers * ALL_REDUCE + engine.per_worker),
                engine.per_sequence)

    @property
    def small_blocks(self) -> float:
        """How much longer reading keys and values takes than in blocks of 16.

        The artifact's kernel gives a warp of 32 threads to a block, so 32 / ``block_size`` threads to a token (§5.1);
        they add up their parts in rounds, one more each time the block is halved.
        """
        return 1 + PER_HALVING * max(0.0, log2(16 / self.block_size))

    def seconds(self, work: Work) -> float:
        """Of one iteration.

        The thread that launches the kernels begins the copies of a swap first, one after the other. Their bytes then
        move on a stream of their own, of which each layer awaits its part (the artifact has an event per layer), so
        that the slower of moving and computing counts.
        """
        begin, moving = map(sum, zip(self._swap(work.swapped_in, SWAP_IN), self._swap(work.swapped_out, SWAP_OUT)))
        return begin + max(moving, self._computing(work))

    def _computing(self, work: Work) -> float:
        if not work.seqs:
            return 0.0
        weights, per_token, per_context, base, per_sequence = self._constants
        return (max(weights, per_token * work.tokens) + per_context * (work.context + 2 * work.copied) + base
                + per_sequence * work.seqs)

    def _swap(self, blocks: int, transfer: Transfer) -> tuple[float, float]:
        """Seconds to begin swapping so many blocks, and to move them over PCIe; each GPU moves its share."""
        model, size = self.server.model, blocks * self.block_size * self.server.model.kv_bytes / self.server.gpus
        return transfer.begin(blocks, model.layers), transfer.move(size)
