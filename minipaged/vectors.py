"""What the CPU's attention does with vectors, in LLVM's language: sums of products.

Of a loop over bfloat16 a compiler makes vectors by widening each number to a word of its own, and it adds up every dot
product by itself; that is where most of the time went. Here a word of two bfloat16 is shifted for the one and masked for
the other, and the dot products of `LANES` tokens are added up together. Products and sums are float32.

A row's numbers lie side by side. Of each row the first ``vectors`` times `LANES` words take part, of 4 bytes each: one
float32, or two bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .products import LANES

_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)


@intrinsic
def dots(typing_context: Any, q: types.Array, k: types.Array, vectors: types.Integer, out: types.Array) -> tuple:
    """In a compiled function: dot products of a query with the keys of tokens.

    Parameters
    ----------
    q : array [head_dim]
        Of float32, or uint16 with the bits of bfloat16, as is ``k``.
    k : array [tokens, head_dim]
        At most `LANES` tokens.
    vectors : int
        How much of a row takes part.
    out : float32 array [LANES]
        Receives them; what is left over is as for the last token.
    """
    def generate(context: Any, builder: ir.IRBuilder, call: Any, args: tuple) -> Any:
        """A register of sums for each token, of which neighbours are added up until one register is left."""
        q, k, out = _arrays(context, builder, call, args)
        sums = [cgutils.alloca_once_value(builder, _FLOATS(None)) for _ in range(LANES)]
        last = builder.sub(builder.extract_value(k.shape, 0), ir.IntType(64)(1))
        tokens = [builder.select(builder.icmp_signed("<", last, last.type(t)), last, last.type(t)) for t in range(LANES)]
        with cgutils.for_range(builder, args[2]) as loop:
            query = _load(builder, call.args[0], q, last.type(0), loop.index)
            for token, total in zip(tokens, sums):
                for pair in zip(query, _load(builder, call.args[1], k, token, loop.index)):
                    _add_product(builder, *pair, total)
        sums = [builder.load(total) for total in sums]
        while len(sums) > 1:
            sums = [builder.fadd(*(_choose(builder, pair, range(odd, 2 * LANES, 2)) for odd in range(2)))
                    for pair in zip(sums[::2], sums[1::2])]
        builder.store(sums[0], builder.bitcast(out.data, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()
    return types.void(q, k, vectors, out), generate


@intrinsic
def weigh(typing_context: Any, a: types.Array, v: types.Array, vectors: types.Integer, o: types.Array) -> tuple:
    """In a compiled function: add to a row the values of tokens, each times a weight.

    Parameters
    ----------
    a : float32 array [at least tokens]
        The weights.
    v : array [tokens, head_dim]
        Of float32, or uint16 with the bits of bfloat16.
    vectors : int
        How much of a row takes part.
    o : float32 array [head_dim]
        What is added to.
    """
    def generate(context: Any, builder: ir.IRBuilder, call: Any, args: tuple) -> Any:
        """A register of sums at a time, or two: of the numbers of even index, and of odd, as `_load` gives them."""
        a, v, o = _arrays(context, builder, call, args)
        count = 32 // call.args[1].dtype.bitwidth
        order = [lane + part * LANES for lane in range(LANES) for part in range(count)]
        with cgutils.for_range(builder, args[2]) as loop:
            first = builder.mul(loop.index, loop.index.type(count))
            row = builder.bitcast(o.data, _FLOATS.as_pointer())
            places = [builder.gep(row, [builder.add(first, first.type(part))]) for part in range(count)]
            before = [builder.load(place, align=4) for place in places]
            sums = [cgutils.alloca_once_value(builder, _choose(builder, before, range(part, count * LANES, count)))
                    for part in range(count)]
            with cgutils.for_range(builder, builder.extract_value(v.shape, 0)) as token:
                weight = builder.load(builder.gep(a.data, [token.index]))
                weight = builder.insert_element(_FLOATS(ir.Undefined), weight, ir.IntType(32)(0))
                for number, total in zip(_load(builder, call.args[1], v, token.index, loop.index), sums):
                    _add_product(builder, _choose(builder, [weight], [0] * LANES), number, total)
            after = [builder.load(total) for total in sums]
            for part, place in enumerate(places):
                builder.store(_choose(builder, after, order[part * LANES:][:LANES]), place, align=4)
        return context.get_dummy_value()
    return types.void(a, v, vectors, o), generate


def _arrays(context: Any, builder: ir.IRBuilder, call: Any, args: tuple) -> list[Any]:
    """Those arguments that are arrays, with their parts by name."""
    return [context.make_array(kind)(context, builder, value) for kind, value in zip(call.args, args)
            if isinstance(kind, types.Array)]


def _load(builder: ir.IRBuilder, kind: types.Array, array: Any, row: ir.Value, step: ir.Value) -> list[ir.Value]:
    """A step's `LANES` words of a row as float32: of bfloat16 those of even index, and those of odd."""
    offset = builder.mul(row, builder.extract_value(array.strides, 0))
    offset = builder.add(offset, builder.mul(step, step.type(4 * LANES)))
    words = builder.load(cgutils.pointer_add(builder, array.data, offset, _WORDS.as_pointer()), align=2)
    parts = [words]
    if kind.dtype == types.uint16:
        parts = [builder.shl(words, _WORDS([16] * LANES)), builder.and_(words, _WORDS([0xFFFF0000] * LANES))]
    return [builder.bitcast(part, _FLOATS) for part in parts]


def _choose(builder: ir.IRBuilder, vectors: list[ir.Value], index: Iterable[int]) -> ir.Value:
    """Numbers of a vector, or of two one behind the other."""
    return builder.shuffle_vector(vectors[0], vectors[-1], ir.VectorType(ir.IntType(32), LANES)(list(index)))


def _add_product(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> None:
    """total += a times b, rounded once where the processor can."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
