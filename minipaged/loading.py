"""Finds a Hugging Face model, the device and the type of its weights, and loads it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .attention import paged_attention
from .errors import InvalidConfig, MissingWeights, UnknownModel, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("opt", "llama", "qwen2", "qwen3")
BUNDLED = {"tiny-opt": Path(__file__).parent / "tiny_opt"}


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


def load_model(source: str, dtype: torch.dtype, device: torch.device,
          ) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase | None"]:
    """The model with its attention replaced by `minipaged.attention`, and its tokenizer, if it has one.

    Raises `MissingWeights` if they cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    AttentionInterface.register("minipaged", paged_attention)
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


def pick_device(name: str) -> torch.device:
    """The device asked for; with "auto" a GPU, if there is one. Raises `InvalidConfig` if it cannot be used."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise InvalidConfig(f"device {name!r} cannot be used: {error}; give auto, cpu or cuda") from error
    return device


def pick_dtype(name: str, hf_config: "PreTrainedConfig", device: torch.device) -> torch.dtype:
    """The type asked for; "auto" is `EngineConfig.dtype`'s."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if hf_config.dtype in (None, torch.float32) else hf_config.dtype
