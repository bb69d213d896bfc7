"""Correct bf16 in Triton's interpreter: how kernels are tested on a machine without a GPU.

    TRITON_INTERPRET=1 pytest tests/kernels

With TRITON_INTERPRET=1 (set before triton is imported) `@triton.jit` functions run in numpy on CPU tensors. numpy has no bf16,
so the interpreter keeps the raw uint16 bits, and in every version up to 3.9 it computes on those *bits*: `a + b`, `tl.dot` and
`tl.max` of bf16 values are silently wrong (triton issue 11584), and the cast from fp32 truncates instead of rounding to nearest
even. `install()` lifts bf16 operands to fp32 around each operation and rounds the result back, as the hardware does.

It also gives the interpreter fp32 `desc.atomic_add` (the TMA unit's reduction), which, like the hardware, leaves alone what
lies outside the descriptor.

Still not supported: autotune over several configs, inline assembly, bf16 atomics, Gluon. Out-of-bounds loads
return garbage instead of failing: tests pad their buffers with canaries.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_OPERATORS = ("binary_op", "unary_op", "ternary_op")
_UNARY = ("create_fabs", "create_rsqrt", "create_erf", "create_fma")


def is_interpreting() -> bool:
    """Whether kernels decorated from now on are interpreted (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def bf16_bits_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Values of raw bf16 bits: exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Raw bf16 bits of fp32 values, rounded to nearest even; NaN stays NaN, overflow becomes infinity."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    word = values.view(np.uint32).astype(np.uint64)  # 64 bits: the rounding carry of 0xFFFFFFFF must not wrap
    rounded = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patch the interpreter of this process; a second call does nothing.

    Raises RuntimeError if triton was imported before TRITON_INTERPRET was set: its library functions would then be compiled
    ones, which the interpreter cannot call.
    """
    if not is_interpreting():
        raise RuntimeError("the interpreter is off: set TRITON_INTERPRET=1 before triton is imported.")
    import triton.language as tl
    from triton.runtime import interpreter as machine
    from triton.runtime.jit import JITFunction

    if isinstance(tl.sum, JITFunction):
        raise RuntimeError(
            "triton was imported before TRITON_INTERPRET=1 was set: set it in the environment, or before the import."
        )
    builder = machine.InterpreterBuilder
    if getattr(builder, "chatmill_bf16", False):
        return
    handle, bf16 = machine.TensorHandle, tl.bfloat16

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and not isinstance(x.dtype, tl.pointer_type) and x.dtype.scalar == bf16

    def lift(x: Any) -> Any:
        return handle(bf16_bits_to_float32(x.data), tl.float32) if is_bf16(x) else x

    def lower(x: Any) -> Any:
        return handle(float32_to_bf16_bits(x.data), bf16)

    def lifted(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any) -> Any:
            if not any(is_bf16(x) for x in args):
                return method(self, *args)
            out = method(self, *[lift(x) for x in args])
            # a comparison keeps its bool data whatever the operands were
            return lower(out) if out.data.dtype == np.float32 else out

        return run

    for name in (*_OPERATORS, *_UNARY):
        if hasattr(builder, name):
            setattr(builder, name, lifted(getattr(builder, name)))

    plain_cast, plain_dot, plain_fp_to_fp = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        src_type, dst_scalar = src.dtype.scalar, dst_type.scalar
        if src_type == dst_scalar or bf16 not in (src_type, dst_scalar):
            return plain_cast(self, src, dst_type)
        if src_type == bf16:
            wide = lift(src)
            return wide if dst_scalar == tl.float32 else plain_cast(self, wide, dst_type)
        return lower(src if src_type == tl.float32 else plain_cast(self, src, tl.float32))

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == bf16 and rounding != machine._ir.ROUNDING_MODE.RTZ:
            return lower(src)
        return plain_fp_to_fp(self, src, dst_type, rounding)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return plain_dot(self, lift(a), lift(b), d, *options)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, fp_to_fp, dot
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: lower(self.get_fp32(value))
    if not hasattr(builder, "create_descriptor_reduce"):
        builder.create_descriptor_reduce = _descriptor_reduce
    _patch_reductions(machine, tl, lift)
    builder.chatmill_bf16 = True


def _descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> None:
    """desc.atomic_add of fp32: the descriptor's own pointers and bounds, the interpreter's own atomics."""
    from triton._C.libtriton import ir

    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or value.data.dtype != np.float32:
        raise NotImplementedError(f"interpreter: descriptors add fp32 values, no {kind} of {value.data.dtype}.")
    pointers, inside = desc.materialize_pointers(indices)
    mask = type(value)(inside, value.dtype)
    self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU)


def _patch_reductions(machine: Any, tl: Any, lift: Callable[[Any], Any]) -> None:
    """tl.sum, tl.max, tl.cumsum ... of bf16: the interpreter hands the bits to numpy."""
    for kind in (machine.ReduceOps, machine.ScanOps):
        plain = kind.apply_impl

        def apply(self: Any, inputs: Any, plain: Callable[..., Any] = plain) -> Any:
            wide = tuple(
                tl.core.tensor(lift(x.handle), tl.block_type(tl.float32, list(x.shape)) if x.shape else tl.float32)
                if x.dtype == tl.bfloat16
                else x
                for x in inputs
            )
            if all(w is x for w, x in zip(wide, inputs, strict=True)):
                return plain(self, inputs)
            out = plain(self, wide)
            results = list(out) if isinstance(out, list | tuple) else [out]
            for i, result in enumerate(results):
                if result.dtype == tl.float32:
                    bits = float32_to_bf16_bits(result.handle.data)
                    shape = list(result.shape)
                    kind_of = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
                    results[i] = tl.core.tensor(machine.TensorHandle(bits, tl.bfloat16), kind_of)
            return results if isinstance(out, list | tuple) else results[0]

        kind.apply_impl = apply
