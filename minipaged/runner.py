"""Runs a Hugging Face model over a packed batch, with its attention replaced by `minipaged.attention`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import attention
from .errors import InvalidConfig, MissingWeights, UnknownModel, UnsupportedModel
from .memory.cache import KVCache
from .memory.table import translate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .memory.table import BlockTable
    from .params import EngineConfig
    from .sequence import Sequence

FAMILIES = ("opt", "llama", "qwen2", "qwen3")
BUNDLED = {"tiny-opt": Path(__file__).parent / "tiny_opt"}
GIB = 1 << 30


def load_config(name: str) -> tuple[str, "PreTrainedConfig"]:
    """Find a model and read its configuration, before anything large is touched.

    Parameters
    ----------
    name : str
        ``"tiny-opt"``, a folder, or a name on the Hugging Face hub.

    Returns
    -------
    (source, config)
        ``source`` is what ``from_pretrained`` takes.

    Raises
    ------
    UnknownModel
        Neither of them.
    MissingWeights
        A folder without a weights file.
    UnsupportedModel
        Another architecture than OPT, Llama, Qwen2 and Qwen3, or one of these with sliding-window attention.
    """
    from transformers import AutoConfig

    source = str(BUNDLED.get(name, name))
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")) and not any(Path(source).glob("*.bin")):
        raise MissingWeights(f"the folder {source!r} holds no *.safetensors or *.bin; "
                             "write the model into it with save_pretrained")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UnknownModel(f"no model {name!r}: give {', '.join(map(repr, BUNDLED))}, a folder with config.json and "
                           f"weights, or a name on the Hugging Face hub ({error})") from error
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(f"{name!r} is of type {config.model_type!r}, whose attention the block table has not "
                               f"been checked with; supported are {', '.join(FAMILIES)}")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        raise UnsupportedModel(f"{name!r} has layers with sliding-window attention; the paper's block tables keep "
                               "every token, so give a model with full attention in all layers")
    return source, config


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
    backend : attention.Backend
        What computes attention, and why.

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
        self.device = _pick_device(config.device)
        self.dtype = _pick_dtype(config.dtype, self.hf_config, self.device)
        longest = self.hf_config.max_position_embeddings
        self.max_model_len = config.max_model_len or longest
        if self.max_model_len > longest:
            raise InvalidConfig(f"max_model_len is {self.max_model_len}, but {config.model} has {longest} positions")
        self.vocab_size = self.hf_config.vocab_size
        heads = self.hf_config.num_attention_heads
        self.head_dim = getattr(self.hf_config, "head_dim", None) or self.hf_config.hidden_size // heads
        self.backend = attention.choose_backend(config.attention, self.device, self.head_dim, self.dtype,
                                                config.block_size)
        self.model, self.tokenizer = _load(source, self.dtype, self.device)
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
            block_tables=self._tensor([table.blocks + [0] * (longest - len(table.blocks)) for table in tables]),
            write_rows=None if len(written) == len(positions) else self._tensor(written),
            write_slots=self._tensor(slots),
            cache=self.cache,
            backend=self.backend)
        out = self.model(input_ids=self._tensor([token_ids]), position_ids=self._tensor([positions]), use_cache=False,
                         logits_to_keep=self._tensor(last), paged_batch=batch)
        return out.logits[0].float()

    def _tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _load(source: str, dtype: torch.dtype, device: torch.device,
          ) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase | None"]:
    from safetensors import SafetensorError
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    AttentionInterface.register("minipaged", attention.paged_attention)
    with _progress_bars(sys.stderr.isatty() and Path(source) not in BUNDLED.values()):
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="minipaged")
        except (OSError, SafetensorError) as error:
            raise MissingWeights(f"the weights of {source!r} cannot be read: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_ids):
        tokenizer = None  # transformers made an empty one for a folder that has none
    return model.to(device).eval(), tokenizer


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Let transformers show a bar or not while it loads; in a notebook it would stay in the saved outputs."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def _pick_device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise InvalidConfig(f"device {name!r} cannot be used: {error}; give auto, cpu or cuda") from error
    return device


def _pick_dtype(name: str, hf_config: "PreTrainedConfig", device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if hf_config.dtype in (None, torch.float32) else hf_config.dtype


def _free_bytes(device: torch.device, config: "EngineConfig") -> int:
    """Bytes that KV blocks may take once the weights are loaded."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - total * (1 - config.gpu_memory_utilization)))
    import psutil

    return min(int(psutil.virtual_memory().available * config.gpu_memory_utilization), 4 * GIB)
