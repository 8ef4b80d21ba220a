"""Products and norms one behind the other, in one call for all threads.

A few rows go through six steps between one attention and the next, and called one by one from Python, some of them cost
as much to call as to compute. So a chain is laid out once as an array of numbers, and a compiled function goes through
it: its threads share the panels of a product, or the rows of a norm, and wait for each other before the next step.
On two cores of a Zen 4 `minipaged bench --pool full --dtype bfloat16` took 8.9 s with a call for each step and 8.2 s
with one between attentions; one for all layers, attention included, saves about 1 % more, and of a model of 6 layers of
width 256, whose weights are small, 7 to 10 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numba import carray
from numba.core.ccallback import CFunc

from .compiled import bits_of, compiled, edition, machine_code, number, numbers_at, pointer, work
from .products import COLUMNS, NORM, ROWS, STORE, tiles

WORTH_A_THREAD = 1 << 19  # bytes of weights, multiplied by a tile in the time that it takes to wake another thread


@dataclass(frozen=True)
class Step:
    """A product, or a norm, from one of a chain's buffers to another.

    Attributes
    ----------
    source, target : int
        Which buffers.
    weight : Tensor
        [panels, inputs, COLUMNS], as `pack` gave it; of a norm [outputs].
    bias : Tensor [outputs] or None
        What is added; a norm has one.
    outputs : int
        Numbers of a row.
    then : int
        What becomes of a product: ``STORE``, ``RELU`` (what is negative becomes 0) or ``ADD`` (to what is there); or
        ``NORM`` for a layer norm.
    eps : float
        Of a norm, added to the variance.
    """

    source: int
    target: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    outputs: int
    then: int = STORE
    eps: float = 0.0

    @property
    def numbers(self) -> list[int]:
        """What the compiled code reads of it: buffers, addresses, sizes, what to do, and the bits of ``eps``."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        together = 2 if self.weight.dtype == torch.bfloat16 else 1
        inputs = self.outputs if self.then == NORM else self.weight.shape[1] * together
        return [self.source, self.target, self.weight.data_ptr(), bias, inputs, self.outputs, self.then,
                np.float64(self.eps).view(np.int64)]


class Chain:
    """Steps one behind the other, computed in one call by all threads together.

    Parameters
    ----------
    sections : list[Step]
        Of one type of numbers. Between one section and the next, others may have their turn.
    """

    def __init__(self, *sections: list[Step]) -> None:
        self.sections, code = sections, _code(sections[0][0].weight.dtype)
        self.numbers = [np.array([step.numbers for step in steps]) for steps in sections]
        self.bytes = np.array([sum(step.weight.nbytes for step in steps) for steps in sections])
        self._works = np.concatenate([work(code, 1, len(numbers), numbers.ctypes.data) for numbers in self.numbers])

    def works(self, *buffers: torch.Tensor) -> np.ndarray:
        """What `minipaged.compiled.run` takes to compute each section, an int64 array [sections, WORK].

        Parameters
        ----------
        buffers : Tensor [rows, numbers of a row]
            What `Step.source` and `Step.target` count in, of the weights' type. The numbers of a row lie side by side.
            Results are rounded once to that type; with ``ADD`` the product is, and then the sum.
        """
        rows, works = buffers[0].shape[0], self._works.copy()
        works[:, 0] = np.minimum(torch.get_num_threads(), 1 + self.bytes * -(-rows // ROWS) // WORTH_A_THREAD)
        works[:, 5:6 + 2 * len(buffers)] = rows, *(number for buffer in buffers
                                                   for number in (buffer.data_ptr(), buffer.stride(0)))
        return works


@cache
def _code(dtype: torch.dtype) -> CFunc:
    """A chain's steps; the order of the numbers is that of `Chain.works`."""
    element, together = {torch.float32: (np.float32, 1), torch.bfloat16: (np.uint16, 2)}[dtype]
    sources = edition()

    def share(address: int, step: int, part: int, parts: int) -> None:
        """One thread's panels of a product, or rows of a norm."""
        sources  # see `edition`
        n = numbers_at(address)
        rows, buffers = n[5], n[6:]
        record = carray(pointer(n[4]), (n[3], 8), np.int64)[step]
        source, target, weight, bias, inputs, outputs, then = record[:7]
        x = carray(pointer(buffers[2 * source]), (rows, buffers[2 * source + 1]), element)
        out = carray(pointer(buffers[2 * target]), (rows, buffers[2 * target + 1]), element)
        offsets = carray(pointer(bias), (outputs if bias else 0,), element)
        if then == NORM:
            mine = slice(part * rows // parts, (part + 1) * rows // parts)
            normalise(x[mine], carray(pointer(weight), (outputs,), element), offsets,
                      record[7:].view(np.float64)[0], out[mine])
        else:
            panels = (outputs + COLUMNS - 1) // COLUMNS
            packed = carray(pointer(weight), (panels, inputs // together, COLUMNS * together), element)
            tiles(x, packed, offsets, out, outputs, part * panels // parts, (part + 1) * panels // parts, then)

    return machine_code(share)


@compiled
def normalise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray) -> None:
    """The first numbers of each row, as many as there are weights: brought to mean 0 and variance 1, times the weight,
    plus a bias."""
    width = len(weight)
    for r in range(len(x)):
        mean, squares = np.float32(0), np.float32(0)
        for i in range(width):
            mean += number(x[r, i])
        mean /= np.float32(width)
        for i in range(width):
            apart = number(x[r, i]) - mean
            squares += apart * apart
        scale = np.float32(1 / np.sqrt(squares / width + eps))
        for i in range(width):
            out[r, i] = bits_of((number(x[r, i]) - mean) * scale * number(weight[i]) + number(bias[i]), out)
