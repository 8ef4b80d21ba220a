"""Which code computes attention and linear layers: chosen once, when the engine is made, with the reason."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from .attention import eager, plain, write
from .errors import InvalidConfig
from .memory.cache import PLAIN, BlockMoves


@dataclass(frozen=True)
class Backend:
    """What computes attention, and why it was chosen.

    Attributes
    ----------
    name : str
        "eager", "torch", "cpu" or "triton".
    reason : str
        For the trace.
    write, attend : Callable
        The contract of `minipaged.attention`.
    moves : BlockMoves
        What copies and swaps blocks.
    works : Callable or None
        In the place of both, of all layers at once, for a batch without prompts; see `minipaged.attention.cpu.works`.
    """

    name: str
    reason: str
    write: Callable[..., None]
    attend: Callable[..., torch.Tensor]
    moves: BlockMoves = PLAIN
    works: Callable[..., np.ndarray] | None = None


def choose_backend(name: str, device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int) -> Backend:
    """The backend asked for; with "auto" Triton on a GPU, the compiled kernel on a CPU, and plain PyTorch for what
    these do not take, which is told.

    Raises
    ------
    InvalidConfig
        "triton" or "cpu" was asked for and cannot run here; with the reason.
    """
    best = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch") if name == "auto" else name
    problem = _problem(best, device, head_dim, dtype, block_size)
    if problem and name != "auto":
        raise InvalidConfig(f"attention is {name!r}, but {problem}; give auto, torch or eager")
    if problem:
        warnings.warn(f"attention runs in plain PyTorch, which is slow: {problem}", stacklevel=2)
        return Backend("torch", f"torch: plain PyTorch, since {problem}", write, plain.attend)
    why = "asked for" if name != "auto" else f"the device is a {device.type.upper() if best == 'cpu' else 'GPU'}"
    return Backend(best, f"{best}: {why}", *_functions(best))


def choose_linears(model: torch.nn.Module) -> str:
    """Lay the weights of all linear layers out for this processor, if all of them can be; returns how they are computed,
    and why, for the trace."""
    if problem := _linears_problem(model):
        return f"linear layers as PyTorch has them, since {problem}"
    from .linears import pack_linears
    from .products import COLUMNS

    pack_linears(model)
    return f"linear layers packed in panels of {COLUMNS}"


def _linears_problem(model: torch.nn.Module) -> str | None:
    if not find_spec("numba"):
        return "numba, which compiles their products, is not installed"
    from .products import problem

    weights = (module.weight for module in model.modules() if type(module) is torch.nn.Linear)
    return next(filter(None, map(problem, weights)), None)


def _functions(name: str) -> tuple[Any, ...]:
    """What a backend consists of, in the order of its attributes; what its compiler needs is imported here, only where
    it is used."""
    if name == "triton":
        from .attention import triton_blocks, triton_kernels

        return triton_blocks.reshape_and_cache, triton_kernels.attend, triton_blocks.MOVES
    if name == "cpu":
        from .attention import cpu

        return cpu.write, cpu.attend, PLAIN, cpu.works
    return write, {"eager": eager.attend, "torch": plain.attend}[name], PLAIN


def _problem(name: str, device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int) -> str | None:
    """Why a backend cannot run, with what it supports; None if it can. Eq. 4 and plain PyTorch always can."""
    if name == "cpu":
        return _cpu_problem(device, dtype)
    if name != "triton":
        return None
    if find_spec("triton") is None:
        return "Triton is not to be had on this platform"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton runs on {device.type} under its interpreter alone, with TRITON_INTERPRET=1"
    from .attention.triton_kernels import supported

    return supported(head_dim, dtype, block_size)


def _cpu_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the compiled CPU kernel runs on a CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled CPU kernel takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None if find_spec("numba") else "numba, which compiles the CPU kernel, is not installed"
