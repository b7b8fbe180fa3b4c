"""Sixty-four bytes at a time in numba's kernels: LLVM's own vectors, which it lowers to whatever the processor has.

For code that builds an `intrinsic`; see `overlap.kernels` and `detect.features`. Compiled functions are kept by the
time of their own file alone: after a change here, touch those that use it.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

BLOCK = 64
I32, I64 = ir.IntType(32), ir.IntType(64)
BYTES = ir.VectorType(ir.IntType(8), BLOCK)


def filled(kind: ir.VectorType, value: int) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


def pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, kind: ir.Type) -> Any:
    """To `kind` at array[index]."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def load(context: Any, builder: Any, array_type: Any, array: Any, index: Any, kind: ir.Type) -> Any:
    """`kind` at array[index], which need not be aligned."""
    value = builder.load(pointer(context, builder, array_type, array, index, kind))
    value.align = 1
    return value


def store(context: Any, builder: Any, array_type: Any, array: Any, index: Any, value: Any) -> None:
    builder.store(value, pointer(context, builder, array_type, array, index, value.type)).align = 1


def among(builder: Any, block: Any, first: int, count: int) -> Any:
    """Which bytes of a block are first, first + 1, … of `count` values."""
    return builder.icmp_unsigned("<", builder.sub(block, filled(BYTES, first)), filled(BYTES, count))


def mask(builder: Any, which: Any) -> Any:
    """64 truths as the bits of an integer, the first byte's lowest."""
    return builder.bitcast(which, I64)


@intrinsic
def trailing_zeros(typing: Any, bits: Any) -> Any:
    """The index of the lowest bit of a uint64; 64 when there is none."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), build
