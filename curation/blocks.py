"""Sixty-four bytes at a time in numba's kernels: LLVM's own vectors, which it lowers to whatever the processor has.

For code that builds an `intrinsic`; see `overlap.kernels` and `detect.features`. Compiled functions are kept by the
time of their own file alone: after a change here, touch those that use it.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
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


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index], which need not be inside the array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        where = pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [where.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [where, I32(0), I32(3), I32(1)])  # to read, and again, of data
        return context.get_dummy_value()

    return types.void(array, types.uint64), build


@intrinsic
def high_product(typing: Any, a: Any, b: Any) -> Any:
    """The upper 64 of the 128 bits of a * b, both uint64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(side, wide) for side in args))
        return builder.trunc(builder.lshr(product, wide(64)), I64)

    return types.uint64(types.uint64, types.uint64), build
