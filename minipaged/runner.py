"""Runs a Hugging Face model over a packed batch, with its attention replaced by `minipaged.attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import attention
from .backends import choose_backend, choose_linears
from .errors import InvalidConfig
from .loading import load_config, load_model, pick_device, pick_dtype
from .memory.cache import KVCache
from .memory.table import translate

if TYPE_CHECKING:
    from .memory.table import BlockTable
    from .params import EngineConfig
    from .sequence import Sequence

GIB = 1 << 30


class ModelRunner:
    """A model, its tokenizer, and its KV cache on one device.

    Parameters
    ----------
    config : EngineConfig
        Which model, where, and how large the pool.

    Attributes
    ----------
    max_model_len, vocab_size : int
        Tokens per sequence, and rows of the embedding.
    eos_token_ids : set[int]
        The model's end-of-sequence tokens.
    num_gpu_blocks, num_cpu_blocks : int
        Blocks in the device and in the host pool.
    backend : Backend
        What computes attention, and why.
    linears : str
        What computes the linear layers, and why.

    Raises
    ------
    UnknownModel, MissingWeights, UnsupportedModel
        As `load_config`.
    InvalidConfig
        ``max_model_len`` is more than the model's, not a single block fits in memory, or the device or the attention
        backend asked for cannot be used.
    """

    def __init__(self, config: "EngineConfig") -> None:
        source, self.hf_config = load_config(config.model)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.hf_config, self.device)
        longest = self.hf_config.max_position_embeddings
        self.max_model_len = config.max_model_len or longest
        if self.max_model_len > longest:
            raise InvalidConfig(f"max_model_len is {self.max_model_len}, but {config.model} has {longest} positions")
        self.vocab_size = self.hf_config.vocab_size
        heads = self.hf_config.num_attention_heads
        self.head_dim = getattr(self.hf_config, "head_dim", None) or self.hf_config.hidden_size // heads
        self.backend = choose_backend(config.attention, self.device, self.head_dim, self.dtype, config.block_size)
        self.model, self.tokenizer = load_model(source, self.dtype, self.device)
        self.linears = choose_linears(self.model)
        eos = self.model.generation_config.eos_token_id
        self.eos_token_ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self._size_pools(config)

    def _size_pools(self, config: "EngineConfig") -> None:
        hf = self.hf_config
        kv_heads = getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
        self.bytes_per_token = 2 * hf.num_hidden_layers * kv_heads * self.head_dim * self.dtype.itemsize
        block_bytes = self.bytes_per_token * config.block_size
        useful = config.max_num_seqs * -(-self.max_model_len // config.block_size)
        self.num_gpu_blocks = config.num_gpu_blocks_override or min(_free_bytes(self.device, config) // block_bytes,
                                                                    useful)
        if self.num_gpu_blocks < 1:
            raise InvalidConfig(f"not one block of {block_bytes} bytes fits beside the weights; "
                                "raise gpu_memory_utilization, lower block_size, or take a smaller model")
        # §4.5: the space for swapped blocks is bounded by the device's; without room there, requests are recomputed.
        self.num_cpu_blocks = min(int(config.swap_space * GIB) // block_bytes, self.num_gpu_blocks)
        self.cache = KVCache(hf.num_hidden_layers, self.num_gpu_blocks, self.num_cpu_blocks, config.block_size,
                             kv_heads, self.head_dim, self.dtype, self.device, self.backend.moves)

    def run(self, seqs: list["Sequence"], tables: list["BlockTable"]) -> torch.Tensor:
        """Run the new tokens of all sequences through the model in one packed row (§4.3).

        Returns
        -------
        Tensor [sequences, vocabulary] float32
            The logits after the last token of each sequence.
        """
        token_ids, positions, slots, written, last = [], [], [], [], []
        for seq, table in zip(seqs, tables):
            for position in range(seq.num_computed, len(seq.token_ids)):
                if position >= table.num_shared:
                    block, offset = translate(table.blocks, position, table.block_size)
                    slots.append(block * table.block_size + offset)
                    written.append(len(positions))
                positions.append(position)
            token_ids.extend(seq.token_ids[seq.num_computed:])
            last.append(len(token_ids) - 1)
        longest = max(len(table.blocks) for table in tables)
        batch = attention.PagedBatch(
            query_lens=[seq.num_new for seq in seqs],
            context_lens=[len(seq.token_ids) for seq in seqs],
            block_tables=self.tensor([table.blocks + [0] * (longest - len(table.blocks)) for table in tables]),
            write_rows=None if len(written) == len(positions) else self.tensor(written),
            write_slots=self.tensor(slots),
            cache=self.cache,
            backend=self.backend)
        out = self.model(input_ids=self.tensor([token_ids]), position_ids=self.tensor([positions]), use_cache=False,
                         logits_to_keep=self.tensor(last), paged_batch=batch)
        return out.logits[0].float()

    def tensor(self, values: list) -> torch.Tensor:
        """Whole numbers on the model's device, int64."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _free_bytes(device: torch.device, config: "EngineConfig") -> int:
    """Bytes that KV blocks may take once the weights are loaded."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - total * (1 - config.gpu_memory_utilization)))
    import psutil

    return min(int(psutil.virtual_memory().available * config.gpu_memory_utilization), 4 * GIB)
