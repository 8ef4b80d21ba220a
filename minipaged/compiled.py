"""What numba lacks for the CPU kernel: bfloat16, an exponential of several numbers at a time, and threads that PyTorch's
do not fight with.

Two pools on the same cores fight: a thread of the one spins, waiting for its next work, on the core that a thread of the
other needs. PyTorch's wheels for Linux bring GNU's OpenMP, and where a program's parallel regions begin is a function of
that library, which a compiled function can be given to. Elsewhere Python's threads serve, whose waking is slower.
Attention of one layer of opt-125m between two of PyTorch's products, ms (float32, 128 tokens a sequence, 2 cores):

    sequences    one thread    Python's threads    PyTorch's pool
    4            0.24          0.30                0.17
    8            0.48          0.59                0.33
    32           1.72          1.27                1.03
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.ccallback import CFunc
from numba.core.cgutils import voidptr_t
from numba.core.typing import signature
from numba.extending import intrinsic, overload

if TYPE_CHECKING:
    from numba.core.dispatcher import Dispatcher

WORK = 24  # numbers that say what to do
_PART = ctypes.CFUNCTYPE(None, *4 * [ctypes.c_int64])
FAST = dict(nogil=True, fastmath={"reassoc", "contract"})  # sums in any order, several at a time; infinities stay


def compiled(function: Callable[..., Any]) -> "Dispatcher":
    """Compiled once for each type that it meets, within the `machine_code` that calls it."""
    return njit(**FAST)(function)


@cache
def edition() -> int:
    """A number for the sources of all compiled functions: another one after each change.

    numba keeps machine code on disk until the file of the outermost function changes, or what that function closes over:
    this, so that no code of an older product is called with weights packed for a newer one.
    """
    names = "chains", "compiled", "decoding", "products", "vectors"
    return crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names))


def number(bits: float) -> float:
    """An element of the cache as a number: a bfloat16 is the upper half of a float32."""


@overload(number)
def _number_of_type(bits):
    if bits == types.uint16:
        return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return lambda bits: bits


def bits_of(value: float, like: np.ndarray) -> float:
    """A float32 as an element of an array: as it is, or rounded to the bits of a bfloat16."""


@overload(bits_of)
def _bits_of_type(value, like):
    if like.dtype == types.uint16:
        def rounded(value, like):
            """To the nearest, and of two to the even one."""
            bits = np.float32(value).view(np.uint32)
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        return rounded
    return lambda value, like: value


@njit(inline="always", **FAST)
def exp(x: float) -> float:
    """e to the power of x, at most 0, in float32: 2 to a whole power, times a series for the rest, which is at most
    ln 2 / 2. Unlike the library's, it is taken of several numbers at a time."""
    x = max(x, np.float32(-87))  # below, the result is no normal number, and as good as 0
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - whole * np.float32(0.693147181)
    series = np.float32(1 / 720)
    for k in (120, 24, 6, 2, 1, 1):
        series = series * r + np.float32(1 / k)
    return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@intrinsic
def pointer(typing_context: Any, address: types.Integer) -> tuple:
    """In a compiled function: an integer as the pointer that ``numba.carray`` takes."""
    def generate(context: Any, builder: Any, call: Any, args: tuple) -> Any:
        """The instruction for it."""
        return builder.inttoptr(args[0], voidptr_t)
    return types.voidptr(types.int64), generate


@intrinsic
def _call(typing_context: Any, function: types.Integer, address: types.Integer, step: types.Integer,
          part: types.Integer, parts: types.Integer) -> tuple:
    """In a compiled function: call the one at an address, which is ``(address, step, part, parts) -> None``."""
    def generate(context: Any, builder: Any, call: Any, args: tuple) -> Any:
        """A call through a pointer."""
        kind = ir.FunctionType(ir.VoidType(), 4 * [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()
    return types.void(*5 * [types.int64]), generate


@njit
def numbers_at(address: int) -> np.ndarray:
    """In a compiled function: the numbers of the work at an address."""
    return carray(pointer(address), WORK, np.int64)


def machine_code(part_of_work: Callable[[int, int, int, int], None]) -> CFunc:
    """Compiles what does a part of a work.

    Parameters
    ----------
    part_of_work : Callable
        ``part_of_work(address, step, part, parts)`` gets where the numbers of the work are, for `numbers_at`, which of
        its steps to do, and which part of that, of how many: not more than were asked for. It is kept on disk for the
        next process where that is allowed, so it names the `edition` of what it calls.
    """
    kind = types.void(*4 * [types.int64])
    try:
        return cfunc(kind, cache=True, **FAST)(part_of_work)
    except RuntimeError:  # neither the package's folder nor the user's takes files
        return cfunc(kind, **FAST)(part_of_work)


def work(code: CFunc, parts: int, steps: int, *numbers: int) -> np.ndarray:
    """What `run` takes: an int64 array [1, WORK] of the number of parts, one that `run` sets, the code's address, the
    number of steps, and further numbers for the code, in this order."""
    row = np.zeros((1, WORK), np.int64)
    row[0, :4 + len(numbers)] = parts, 0, code.address, steps, *numbers
    return row


def run(works: np.ndarray) -> None:
    """Do works one behind the other, in one parallel region, and return when all are done: all parts of a step, each in
    a thread of its own, before any part of the next.

    Parameters
    ----------
    works : int64 array [works, WORK]
        Rows as `work` makes them.
    """
    if gnu_openmp() is None:
        for one in works:
            _in_threads(one)
    else:
        works[0, 1] = len(works)
        _begin()(_member().address, works.ctypes.data, works[:, 0].max(), 0)


@cache
def _begin() -> Any:
    """What begins a parallel region: of a function, its argument, threads, and flags."""
    begin = gnu_openmp().GOMP_parallel
    begin.argtypes, begin.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return begin


@cache
def _member() -> CFunc:
    """What each thread of a team does, compiled: its part of each step of the works."""
    thread, threads = (_symbol(f"omp_get_{name}", types.int32) for name in ("thread_num", "num_threads"))
    wait_for_all = _symbol("GOMP_barrier", types.void)

    @cfunc(types.void(types.int64))
    def member(address: int) -> None:
        """The part of this thread's number, of as many as there are, but not more than the team has threads."""
        for index in range(numbers_at(address)[1]):
            one = address + index * 8 * WORK
            numbers = numbers_at(one)
            parts = min(numbers[0], np.int64(threads()))
            for step in range(numbers[3]):
                if index or step:
                    wait_for_all()
                if thread() < parts:
                    _call(numbers[2], one, step, thread(), parts)
    return member


def _symbol(name: str, returns: types.Type) -> types.ExternalFunction:
    """A function of GNU's OpenMP without arguments, for compiled functions to call."""
    unique = f"minipaged_{name}"  # numba has one of that name too, of a pool of its own
    llvmlite.binding.add_symbol(unique, ctypes.cast(gnu_openmp()[name], ctypes.c_void_p).value)
    return types.ExternalFunction(unique, signature(returns))


def _in_threads(numbers: np.ndarray) -> None:
    """Do a work on Python's threads, of which one is this."""
    part_of_work, parts = _PART(int(numbers[2])), int(numbers[0])
    for step in range(numbers[3]):
        given = [(numbers.ctypes.data, step, part, parts) for part in range(parts)]
        others = [_threads(parts - 1).submit(part_of_work, *each) for each in given[1:]]
        part_of_work(*given[0])
        for other in others:
            other.result()


@cache
def gnu_openmp() -> ctypes.CDLL | None:
    """The library that PyTorch itself has loaded, or None."""
    file = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return ctypes.CDLL(str(file)) if file.exists() else None


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "minipaged-attention")
