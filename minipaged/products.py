"""Products of a few rows with weights laid out beforehand, compiled for the vector units of this processor.

The linear layers of an iteration that decodes have as many rows as there are sequences: few. Then the weights, of which
each is read once from memory for all rows, cost more than the arithmetic, and `torch.nn.Linear` rearranges them at every
call. Here a weight is cut into panels of `COLUMNS` outputs, in which all that is needed for one input lies together; a
thread takes whole panels, and a tile of at most `ROWS` rows by a panel's outputs is summed up in the processor's
registers. The innermost loop is written in LLVM's language, since no compiler keeps a tile in registers by itself.

Measured against `torch.nn.Linear` and against the product of weights that oneDNN laid out, which PyTorch reaches by a
private operator (ms a layer, medians in turn, on two cores of a Zen 4):

    rows, layer               float32                       bfloat16
                              Linear   oneDNN   here        Linear   oneDNN   here
    1     768 to 2304         0.55     0.29     0.23        0.22     0.14     0.11
    32    768 to 2304         1.12     0.67     0.61        0.49     0.33     0.31
    1     768 to 50272        11.7     5.8      4.5         4.6      2.8      2.4
    8     768 to 50272        22.4     6.4      4.9         5.7      3.2      2.4
    32    768 to 50272        32.7     13.2     11.8        9.9      6.8      6.0
    400   768 to 50272        232      170      147         90       86       76

One row takes as long as its weights need from memory; from 32 on, arithmetic decides. Between them the one must not wait
for the other, so that tiles which share a panel have the next one fetched meanwhile: on a Zen 5, which multiplies twice
as fast, 16 to 32 rows took 0.7 to 0.9 of the time with it, and 64 rows 0.9. Nor must stores wait for lines that lie in
memory: on a Zen 4, 480 rows of 768 inputs and 3072 outputs took 0.84 of the time once those were fetched ahead and a
tile's sums finished together, in float32 and in bfloat16.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import bits_of, compiled, gnu_openmp, number

FEATURES = numba.config.CPU_FEATURES or llvmlite.binding.get_host_cpu_features().flatten()
LANES = 16 if "+avx512f" in FEATURES else 8  # float32 numbers in a register
COLUMNS = 2 * LANES  # outputs in a panel
ROWS = 12 if LANES == 16 else 6  # rows in a tile, so that two registers a row, and the panel's two, are there
STORE, RELU, ADD, NORM = range(4)  # what a step of a chain does


def problem(weight: torch.Tensor) -> str | None:
    """Why products with a weight [outputs, inputs] cannot be computed here, or None."""
    if weight.device.type != "cpu":
        return f"the device is no CPU but {weight.device.type}"
    needed = {torch.float32: "fma", torch.bfloat16: "avx512bf16"}.get(weight.dtype)
    if needed is None:
        return f"they are packed in float32 and bfloat16, not in {str(weight.dtype).removeprefix('torch.')}"
    if f"+{needed}" not in FEATURES.split(","):
        return f"this processor lacks {needed}"
    if gnu_openmp() is None:
        return "PyTorch's threads here are not GNU's"
    if weight.dtype == torch.bfloat16 and weight.shape[1] % 2:
        return f"a layer has {weight.shape[1]} inputs, which are no pairs"
    return None


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lay a weight [outputs, inputs] out in panels; the outputs that the last one lacks are 0.

    Returns
    -------
    Tensor [panels, inputs, COLUMNS]
        Of bfloat16 [panels, inputs / 2, 2 COLUMNS]: an output's weights of two inputs lie side by side, as the processor
        multiplies them.
    """
    outputs, inputs = weight.shape
    together = 2 if weight.dtype == torch.bfloat16 else 1
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % COLUMNS))
    pairs = padded.view(-1, COLUMNS, inputs // together, together)  # [panels, COLUMNS, inputs / together, together]
    return pairs.transpose(1, 2).reshape(-1, inputs // together, COLUMNS * together).contiguous()


@compiled
def tiles(x: np.ndarray, packed: np.ndarray, bias: np.ndarray, out: np.ndarray, outputs: int, first: int, end: int,
          then: int) -> None:
    """out [rows, outputs and more] = x [rows, inputs and more] times a packed weight, plus a bias, or none, which is
    empty: the panels from ``first`` up to ``end``, tile by tile. Five tiles of rows, about equally high, take a panel in
    turn, while it is in the processor's cache; meanwhile each has its share of the next one fetched, and the lines that
    its sums go to. For a tile alone memory is all that counts, and the processor fetches weights ahead by itself."""
    sums, count = np.empty((ROWS, COLUMNS), np.float32), (len(x) + ROWS - 1) // ROWS
    height, steps = (len(x) + count - 1) // count, packed.shape[1]
    for block in range(0, len(x), 5 * height):
        turns = min(5, (len(x) - block + height - 1) // height)
        for panel in range(first, end):
            columns = slice(panel * COLUMNS, min((panel + 1) * COLUMNS, outputs))
            fetched = steps if turns > 1 and panel + 1 < end else 0
            for turn in range(turns):
                row = block + turn * height
                rows = x[row:min(row + height, len(x))]
                ahead = packed[min(panel + 1, end - 1), turn * fetched // turns:(turn + 1) * fetched // turns]
                target = out[row:row + len(rows)]
                for r in range(len(target)):
                    prefetch(target[r, columns], 0, 1)
                tile_sums(rows, packed[panel], sums, ahead)
                finish(sums, bias[columns], target, columns, then)


@compiled
def finish(sums: np.ndarray, bias: np.ndarray, out: np.ndarray, columns: slice, then: int) -> None:
    """A tile's sums, at least as many columns as there are outputs, become what is asked for, in some columns of its
    rows. One loop for each thing to do: in one for all, numbers would not be taken several at a time."""
    for r in range(len(out)):
        for c in range(len(bias)):
            sums[r, c] += number(bias[c])
    if then == RELU:
        for r in range(len(out)):
            for c in range(COLUMNS):
                sums[r, c] = np.float32(0) if sums[r, c] < 0 else sums[r, c]  # what is not a number stays
    for r in range(len(out)):
        row = out[r, columns]
        if then == ADD:
            for c in range(len(row)):
                sums[r, c] = number(bits_of(sums[r, c], row)) + number(row[c])
        for c in range(len(row)):
            row[c] = bits_of(sums[r, c], row)


@compiled
def prefetch(array: np.ndarray, part: int, parts: int) -> None:
    """Have the processor fetch a part of an array's memory."""
    for line in range(part * array.nbytes // parts, (part + 1) * array.nbytes // parts, 64):
        fetch_line(array.ctypes.data + line)


@intrinsic
def fetch_line(typing_context: Any, address: types.Integer) -> tuple:
    """In a compiled function: have the line at an address fetched into the second cache, and do not wait."""
    def generate(context: Any, builder: ir.IRBuilder, call: Any, args: tuple) -> Any:
        """The instruction for it."""
        fetch(builder, builder.inttoptr(args[0], cgutils.voidptr_t))
        return context.get_dummy_value()
    return types.void(address), generate


class _BFloat16(ir.Type):
    """LLVM's type of that name, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


@intrinsic
def tile_sums(typing_context: Any, x: types.Array, panel: types.Array, sums: types.Array, ahead: types.Array) -> tuple:
    """In a compiled function: sums = x times a panel.

    Parameters
    ----------
    x : array [rows, inputs]
        At most `ROWS` rows.
    panel : array [inputs, COLUMNS], or of bfloat16's bits [inputs / 2, 2 COLUMNS]
        As `pack` lays it out.
    sums : float32 array [ROWS, COLUMNS]
        Receives them.
    ahead : array, of at most as many inputs as ``panel``
        Memory to be fetched meanwhile.
    """
    def generate(context: Any, builder: ir.IRBuilder, call: Any, args: tuple) -> Any:
        """Of each number of rows a loop of its own, as registers have no index; two, as a loop that fetches nothing is
        faster without asking."""
        x, panel, sums, ahead = (context.make_array(kind)(context, builder, value) for kind, value in zip(call.args, args))
        rows, steps, fetched = (builder.extract_value(array.shape, 0) for array in (x, panel, ahead))
        stride = builder.extract_value(x.strides, 0)  # bytes
        after = builder.append_basic_block("after")
        size = builder.mul(fetched, builder.extract_value(ahead.strides, 0))
        each = builder.udiv(builder.add(size, builder.sub(steps, steps.type(1))), steps)  # bytes a step, rounded up
        some = builder.icmp_signed(">", fetched, fetched.type(0))
        cases = builder.switch(builder.add(rows, builder.select(some, rows.type(ROWS), rows.type(0))), after)
        for case in range(1, 2 * ROWS + 1):
            block = builder.append_basic_block(f"case{case}")
            cases.add_case(rows.type(case), block)
            builder.position_at_end(block)
            _sum(builder, (case - 1) % ROWS + 1, x.data, stride, panel.data, steps, sums.data,
                 call.args[0].dtype == types.uint16, (ahead.data, each) if case > ROWS else None)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()
    return types.void(x, panel, sums, ahead), generate


def _sum(builder: ir.IRBuilder, rows: int, x: ir.Value, stride: ir.Value, panel: ir.Value, steps: ir.Value,
         sums: ir.Value, pairs: bool, ahead: tuple[ir.Value, ir.Value] | None) -> None:
    """The loop over the inputs, or over pairs of them: two registers of the panel times a number of each row. From the
    address ``ahead`` on, so many bytes are fetched at each."""
    of_floats, of_ints = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
    kind = of_ints if pairs else of_floats
    tile = [[cgutils.alloca_once_value(builder, ir.Constant(of_floats, None)) for _ in range(2)] for _ in range(rows)]
    starts = [builder.bitcast(builder.gep(builder.bitcast(x, ir.IntType(8).as_pointer()),
                                          [builder.mul(stride, ir.Constant(stride.type, r))]),
                              kind.element.as_pointer()) for r in range(rows)]
    panel = builder.bitcast(panel, kind.as_pointer())
    with cgutils.for_range(builder, steps) as loop:
        _keep_rolled(builder)
        if ahead:
            fetch(builder, cgutils.pointer_add(builder, ahead[0], builder.mul(loop.index, ahead[1])))
        first = builder.mul(loop.index, ir.Constant(loop.index.type, 2))
        weights = [builder.load(builder.gep(panel, [builder.add(first, ir.Constant(first.type, half))]),
                                align=4) for half in range(2)]
        for start, totals in zip(starts, tile):
            broadcast = _splat(builder, builder.load(builder.gep(start, [loop.index])), kind)
            for weight, total in zip(weights, totals):
                builder.store(_add_product(builder, broadcast, weight, builder.load(total), pairs), total)
    sums = builder.bitcast(sums, of_floats.as_pointer())
    for index, total in enumerate(sum(tile, [])):
        builder.store(builder.load(total), builder.gep(sums, [ir.Constant(steps.type, index)]), align=4)


def fetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """LLVM's instruction to have a line of memory fetched: to read, for the second cache, data."""
    values = [builder.bitcast(address, cgutils.voidptr_t), *map(ir.IntType(32), (0, 2, 1))]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), values)


def _keep_rolled(builder: ir.IRBuilder) -> None:
    """Keeps LLVM from unrolling the loop, for which there are not registers enough: an instruction that says of itself
    that it must not be copied, and does nothing."""
    nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", side_effect=True)
    builder.call(nothing, [], attrs=("convergent",))


def _splat(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    """A vector of which each number is this."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None))


def _add_product(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value, pairs: bool) -> ir.Value:
    """total + a times b, rounded once; of pairs of bfloat16, both products."""
    name, kind = f"llvm.fma.v{LANES}f32", a.type
    if pairs:
        name, kind = "llvm.x86.avx512bf16.dpbf16ps.512", _PAIRS
        a, b = builder.bitcast(a, kind), builder.bitcast(b, kind)
    args = [total, a, b] if pairs else [a, b, total]
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(total.type, [arg.type for arg in args]), name)
    return builder.call(function, args)
