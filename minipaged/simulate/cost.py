"""How long an iteration takes on the paper's GPUs: weights, keys and values, arithmetic, and what an engine adds.

A roofline: weights are read once per iteration, unless the arithmetic takes longer; keys and values are read for every
sequence that decodes. The constants below are all there are, the same for every model, workload, system and figure.
Each says whether it is a data sheet's or to which points of the paper it is fitted; those points prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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

WEIGHTS = 0.80  # share of the bandwidth. Fitted: FasterTransformer's first points in Figure 12a, b and c
FLOPS = 0.65  # share of the arithmetic. Fitted: Figure 19a, recomputation of 256 tokens
KEYS_AND_VALUES = 0.50  # share of the bandwidth. Fitted: Figure 18a's slope, 32 requests, context 128 to 256
# What a block costs the attention kernel beyond its bytes, in tokens of reading, at sizes below the paper's 16. Fitted:
# Figure 18b, ShareGPT, block size 8, as `minipaged reproduce` draws it.
PER_BLOCK = 6.5


@dataclass(frozen=True)
class Engine:
    """Seconds that an engine adds to an iteration: per layer; per layer and each GPU beyond the first, for its part in
    the all-reduce; and per sequence, for sampling and bookkeeping."""

    per_layer: float
    per_hop: float
    per_sequence: float


# The paper's Orcas and vLLM are one engine (§6.1). Fitted: per layer, Figure 1's throughput, drawn on to no request;
# per hop, vLLM's first two points in Figure 12b; per sequence, vLLM's first point in Figure 12d.
VLLM = Engine(0.1325 * MS, 0.071 * MS, 0.335 * MS)
# Fitted, with WEIGHTS: FasterTransformer's first points in Figure 12a, b and c.
FASTER_TRANSFORMER = Engine(0.0, 0.034 * MS, 0.0)


class Transfer(NamedTuple):
    """PCIe in one direction: seconds per copy, and bytes per second."""

    per_copy: float
    bandwidth: float

    def seconds(self, blocks: int, block_bytes: float, layers: int) -> float:
        """Of moving blocks, with one copy per block, layer, and key or value, as the artifact does it."""
        return 2 * layers * blocks * self.per_copy + blocks * block_bytes / self.bandwidth


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
        engine, bandwidth = self.engine, gpus * gpu.bandwidth
        return (model.weight_bytes / (bandwidth * WEIGHTS),
                model.weight_bytes / (gpus * gpu.flops * FLOPS),  # two operations per weight, which has two bytes
                model.kv_bytes / (bandwidth * KEYS_AND_VALUES) * self.small_blocks,
                model.layers * (engine.per_layer + (gpus - 1) * engine.per_hop), engine.per_sequence)

    @property
    def small_blocks(self) -> float:
        """How much longer reading keys and values takes than in blocks of 16, where the kernel has more to look up."""
        return 1 + PER_BLOCK * max(0.0, 1 / self.block_size - 1 / 16)

    def seconds(self, work: Work) -> float:
        """Of one iteration."""
        weights, per_token, per_context, base, per_sequence = self._constants
        moved = self.swap_seconds(work.swapped_in, SWAP_IN) + self.swap_seconds(work.swapped_out, SWAP_OUT)
        if not work.seqs:
            return moved
        return (max(weights, per_token * work.tokens) + per_context * (work.context + 2 * work.copied) + base
                + per_sequence * work.seqs + moved)

    def swap_seconds(self, blocks: int, transfer: Transfer) -> float:
        """Of moving blocks over PCIe; each GPU moves its share."""
        if not blocks:
            return 0.0
        model = self.server.model
        return transfer.seconds(blocks, self.block_size * model.kv_bytes / self.server.gpus, model.layers)
