"""Makes Triton's interpreter compute as the matrix units and the bfloat16 instructions of a GPU do.

The interpreter keeps a bfloat16 as the integer of its bits. It adds and multiplies these integers, and it cuts what it
converts instead of rounding it. Within `hardware_arithmetic` a bfloat16 operation runs in float32 and its result is
rounded to the nearest bfloat16, ties to even. Three more things are as on a GPU:

- a product of float32 in tf32 uses the upper 19 bits of its operands; the lower 13 are dropped, not rounded;
- a product of float32 in "ieee" is one chain of fused multiply-adds over K, which is how Triton builds it;
- a fused multiply-add rounds once;
- conversions to and from FP8 (e4m3) round to nearest, ties to even, and what is too large becomes the largest number.

What stays different: the matrix units add a few products at a time and cut the last bits of the sum (about 2^-24 of the
largest product), and exponentials, divisions and square roots of a GPU may be off by two units in the last place of
float32. Both are thousands of times smaller than a rounding to 16 bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

Array = npt.NDArray[Any]
NAN = 0x7FFF  # the bits that NVIDIA's conversion gives for NaN


def to_float32(bits: Array) -> Array:
    """Returns the float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """Returns the bits of the bfloat16 nearest to each value, ties to even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(NAN), rounded)


def of_fp8(bits: Array) -> Array:
    """Returns the float32 values of e4m3 bits."""
    values: Array = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).float().numpy()
    return values


def to_fp8(values: Array) -> Array:
    """Returns the bits of the e4m3 number nearest to each value."""
    limited = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448.0, 448.0)
    bits: Array = limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return bits


def cut_to_tf32(values: Array) -> Array:
    """Cuts float32 operands to the 19 bits that a matrix unit reads in tf32."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """Computes x y + z in float32; the float64 product is exact, and the float64 sum is precise enough for float32."""
    return (x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)).astype(np.float32)


def sum_of_products(left: Array, right: Array) -> Array:
    """Computes left @ right. In float64 it is not seen in which order numpy adds, which may depend on a row's place."""
    product: Array = (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
    return product


def chain_of_products(left: Array, right: Array, sums: Array) -> Array:
    """Computes sums + left @ right in float32, as one chain of fused multiply-adds over k."""
    sums, left64, right64 = sums.copy(), left.astype(np.float64), right.astype(np.float64)
    for k in range(left.shape[-1]):
        product = left64[..., :, k : k + 1] * right64[..., k : k + 1, :]
        np.add(product, sums, out=sums, dtype=np.float64, casting="same_kind")
    return sums


def _is_bfloat16(*handles: TensorHandle) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def _values(handle: TensorHandle) -> Array:
    if handle.dtype.scalar == tl.float8e4nv:
        return of_fp8(handle.data)
    return to_float32(handle.data) if _is_bfloat16(handle) else handle.data


def _handle(values: Array, dtype: tl.dtype) -> TensorHandle:
    """Converts values to `dtype`'s representation; booleans, which comparisons give, stay as they are."""
    if dtype.scalar == tl.bfloat16 and values.dtype != np.bool_:
        values = to_bfloat16(values)
    return TensorHandle(values, dtype.scalar)


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, *_: object) -> TensorHandle:
    values = _values(src)
    if dst_type.scalar == tl.float8e4nv:
        return TensorHandle(to_fp8(values), dst_type.scalar)
    if dst_type.scalar != tl.bfloat16:
        with np.errstate(over="ignore", invalid="ignore"):  # values too large for float16 become infinity, as on a GPU
            values = values.astype(interpreter._get_np_dtype(dst_type.scalar))
    return _handle(values, dst_type)


def _elementwise(original: Callable[..., TensorHandle], num_operands: int) -> Callable[..., TensorHandle]:
    def of_floats(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        operands, op = arguments[:num_operands], arguments[num_operands]
        if not _is_bfloat16(*operands) or op is np.where:
            return original(self, *arguments)
        return _handle(op(*map(_values, operands)), operands[-1].dtype)

    return of_floats


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    return _handle(fused_multiply_add(_values(x), _values(y), _values(z)), z.dtype)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, *_: object
) -> TensorHandle:
    left, right, sums = _values(a), _values(b), d.data
    assert sums.dtype == np.float32, f"sums of a dot: expected float32, got {sums.dtype}"
    if a.dtype.scalar != tl.float32:
        return TensorHandle(sum_of_products(left, right) + sums, d.dtype.scalar)
    if input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        return TensorHandle(sum_of_products(cut_to_tf32(left), cut_to_tf32(right)) + sums, d.dtype.scalar)
    assert input_precision == interpreter._ir.INPUT_PRECISION.IEEE, f"precision of a dot: {input_precision}"
    return TensorHandle(chain_of_products(left, right, sums), d.dtype.scalar)


def _check_tensor(original: Callable[..., None]) -> Callable[..., None]:
    def without_bfloat16(self: ReduceScanOpInterface, tensors: Any) -> None:
        original(self, tensors)
        assert not _is_bfloat16(*(tensor.handle for tensor in tensors)), "a reduction: expected float32, got bfloat16"

    return without_bfloat16


PATCHES: dict[tuple[type, str], Callable[[Any], Any]] = {
    (InterpreterBuilder, "cast_impl"): lambda original: _cast,
    (InterpreterBuilder, "create_fp_to_fp"): lambda original: _cast,
    (InterpreterBuilder, "unary_op"): lambda original: _elementwise(original, 1),
    (InterpreterBuilder, "binary_op"): lambda original: _elementwise(original, 2),
    (InterpreterBuilder, "ternary_op"): lambda original: _elementwise(original, 3),
    (InterpreterBuilder, "create_fma"): lambda original: _fma,
    (InterpreterBuilder, "create_dot"): lambda original: _dot,
    (ReduceScanOpInterface, "check_tensor"): _check_tensor,
}


@contextmanager
def hardware_arithmetic() -> Iterator[None]:
    """Makes kernels that run in the interpreter compute as the module's docstring describes."""
    originals = {(owner, name): vars(owner)[name] for owner, name in PATCHES}
    try:
        for (owner, name), patch in PATCHES.items():
            setattr(owner, name, patch(originals[owner, name]))
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
