"""Pointers for the Numba kernels: one compiled kernel serves every dtype, layout and rank.

Numba compiles a function anew for every dtype, layout and read-only flag of its arrays. The
kernels therefore take addresses, and leave the caller's dtypes to small row functions that they
call by address.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import types
from numba.extending import intrinsic


@intrinsic
def data(typingctx: Any, array: Any) -> Any:
    """The pointer to an array's first element. The caller keeps the array alive."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def shift(typingctx: Any, pointer: Any, count: Any) -> Any:
    """The pointer ``count`` elements on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def shift_bytes(typingctx: Any, pointer: Any, count: Any) -> Any:
    """The pointer ``count`` bytes on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.bitcast(args[0], ir.IntType(8).as_pointer())
        return builder.bitcast(builder.gep(byte, [args[1]]), args[0].type)

    return pointer(pointer, types.intp), codegen


@intrinsic
def address(typingctx: Any, pointer: Any) -> Any:
    """The pointer as an integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], context.get_value_type(types.intp))

    return types.intp(pointer), codegen


@intrinsic
def at_address(typingctx: Any, pointer: Any, address: Any) -> Any:
    """The pointer of the same type to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], args[0].type)

    return pointer(pointer, types.intp), codegen


@intrinsic
def bytes_at(typingctx: Any, address: Any) -> Any:
    """The pointer to unsigned bytes at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.intp), codegen


@intrinsic
def item_size(typingctx: Any, pointer: Any) -> Any:
    """Bytes of an element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, signature.args[0].dtype.bitwidth // 8)

    return types.intp(pointer), codegen


@intrinsic
def like(typingctx: Any, pointer: Any, number: Any) -> Any:
    """The number in the pointer's dtype: a bare literal would turn the arithmetic to float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], signature.args[1], signature.return_type)

    return pointer.dtype(pointer, number), codegen


@intrinsic
def select(typingctx: Any, condition: Any, yes: Any, no: Any) -> Any:
    """One of two numbers, both computed. What Numba makes of an expression with "if" is a branch,
    and where several depend on the same condition, LLVM joins them and vectorises none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(args[0], args[1], args[2])

    return yes(types.boolean, yes, yes), codegen


@intrinsic
def call_row(
    typingctx: Any, function: Any, source: Any, stride: Any, count: Any, target: Any
) -> Any:
    """Call a row function, see `fastloss.backends._numba_rows`, by its address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        intp = context.get_value_type(types.intp)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, intp, intp, pointer])
        builder.call(
            builder.inttoptr(args[0], kind.as_pointer()),
            [
                builder.inttoptr(args[1], pointer),
                args[2],
                args[3],
                builder.inttoptr(args[4], pointer),
            ],
        )
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), codegen


LINE = 64  # bytes


@intrinsic
def stream_line(typingctx: Any, target: Any, source: Any) -> Any:
    """Copy a cache line to ``target``, which begins one, past the caches."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(ir.IntType(32), LINE // 4).as_pointer()
        value = builder.load(builder.bitcast(args[1], line), align=4)
        stored = builder.store(value, builder.bitcast(args[0], line), align=LINE)
        one = ir.Constant(ir.IntType(32), 1)
        stored.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(target, source), codegen


@intrinsic
def stream_negated(typingctx: Any, target: Any, source: Any) -> Any:
    """As `stream_line`, of the negative numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = LINE * 8 // target.dtype.bitwidth
        line = ir.VectorType(args[0].type.pointee, count).as_pointer()
        value = builder.fneg(builder.load(builder.bitcast(args[1], line), align=4))
        stored = builder.store(value, builder.bitcast(args[0], line), align=LINE)
        one = ir.Constant(ir.IntType(32), 1)
        stored.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(target, source), codegen


# The second level, as the first takes too few lines at once; but on processors with AVX-512 that
# was the slower one (Zen 5).
_LEVEL = 3 if get_host_cpu_features().get("avx512f", False) else 2


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Bring the cache line of an address to the caches; any address will do."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, level, is_data = (ir.Constant(word, n) for n in (0, _LEVEL, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer), read, level, is_data])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def take(typingctx: Any, counter: Any) -> Any:
    """Add 1 to an array of one integer, whoever else does at the same time; what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = context.make_array(signature.args[0])(context, builder, args[0]).data
        one = ir.Constant(context.get_value_type(types.intp), 1)
        return builder.atomic_rmw("add", pointer, one, "monotonic")

    return types.intp(counter), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """What went past the caches is there before anything that follows."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def to_bits(typingctx: Any, number: Any) -> Any:
    """The bits of a float32 as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def to_int32(typingctx: Any, number: Any) -> Any:
    """A float64 in the range of int32, cut off. Numba itself goes by way of 64 bits, for which
    processors without AVX-512 have no vectors."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fptosi(args[0], ir.IntType(32))

    return types.int32(types.float64), codegen


@intrinsic
def power_of_two(typingctx: Any, shifted: Any) -> Any:
    """2^n for the float32 n + 1.5·2^23, whose last bits are n."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Numba's own integers are of 64 bits and would halve the vectors.
        word = ir.IntType(32)
        bits = builder.shl(builder.bitcast(args[0], word), ir.Constant(word, 23))
        return builder.bitcast(builder.add(bits, ir.Constant(word, 0x3F800000)), ir.FloatType())

    return types.float32(types.float32), codegen


_SQRT_HALF = 0x3F3504F3


@intrinsic
def exponent(typingctx: Any, number: Any) -> Any:
    """e of a normal positive float32 f 2^e with f in [√½, √2)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.sub(builder.bitcast(args[0], word), ir.Constant(word, _SQRT_HALF))
        return builder.sitofp(builder.ashr(bits, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.float32), codegen


@intrinsic
def mantissa(typingctx: Any, number: Any) -> Any:
    """f of a normal positive float32 f 2^e with f in [√½, √2)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.sub(builder.bitcast(args[0], word), ir.Constant(word, _SQRT_HALF))
        bits = builder.and_(bits, ir.Constant(word, 0x007FFFFF))
        bits = builder.add(bits, ir.Constant(word, _SQRT_HALF))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), codegen
