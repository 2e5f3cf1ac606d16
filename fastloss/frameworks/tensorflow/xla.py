"""The two passes in a program that XLA compiles for the CPU: functions of the host on its buffers.

TensorFlow's operator for a module of StableHLO holds one call by XLA's foreign function interface.
Its library has the interface's table of functions, by which the function of the host is made known.
Shapes that a trace does not know are known when XLA compiles. Versions of TensorFlow that lack a
part of it are told by a program that is tried once: `is_there`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_int, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from fastloss.backends import chosen_backend
from fastloss.borrowed import Extras
from fastloss.frameworks.tensorflow import graph
from fastloss.frameworks.xla import frame, host
from fastloss.protocol import FusedLoss

Dim: TypeAlias = "int | tuple[int, int]"
"""A dimension: a number, or the axis of the first operand and by how much its length is multiplied.
"""
Result: TypeAlias = "tuple[str, tuple[Dim, ...]]"
"""A dtype and a shape."""

_GET_API = "_ZN3xla3ffi12GetXlaFfiApiEv"
"""xla::ffi::GetXlaFfiApi() of the library."""
_API_MAJOR, _API_REGISTER = 32, 72
"""Places in XLA_FFI_Api: the version, and XLA_FFI_Handler_Register."""
_TRIAL = "fastloss_trial"
_MODULE_VERSION = 9
_TYPES = {
    "bool": "i1", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "ui8", "uint16": "ui16", "uint32": "ui32", "uint64": "ui64",
    "float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64",
}  # fmt: skip


class Call(graph.Call):
    """One call in a program of XLA. The numbers of the loss are constants in it."""

    def __init__(
        self, loss: FusedLoss, logits: Any, target: Any, voxel_weight: Any, extras: Extras | None
    ) -> None:
        super().__init__(loss, logits, target, voxel_weight, extras)
        regions = 0
        if loss.lacks_regions(extras):
            raise ValueError(
                "regions: a program that XLA compiles cannot make them, as it has to know how many "
                "there are; give those that Loss.fields makes, and region_count"
            )
        if extras is not None and extras.regions is not None:
            if extras.region_count is None:
                raise ValueError(
                    "region_count: expected how many regions a sample has at most, which a program "
                    "that XLA compiles cannot look for, got None"
                )
            regions = extras.region_count
        arrays = self.shapes.arrays
        loss.keep_terms()
        numbers = np.concatenate([np.ravel(operand) for operand in loss.operands])
        self.rows = regions or 1
        self.call = host.Call(
            step="value",
            structure=loss.structure,
            numbers=tuple(numbers.tolist()),
            backend=chosen_backend(),
            rank=len(self.shapes.logits),
            weighted=self.has_weight,
            fields=() if extras is None else extras.names,
            regions=regions,
            dense=arrays.dense,
            sums=(loss.request(arrays).slots, 0, self.shapes.classes),
            dtype=arrays.value_dtype.name,
        )

    def forward(self, logits: Any) -> tuple[Any, Sequence[Any]]:
        call, given = self.call, list(self.given)
        names = call.fields
        if self.makes or names != self.loss.field_names:
            given = self._with_fields(logits)
            call = call._replace(fields=self.loss.field_names)
        slots, _, classes = call.sums
        numbers = 0 if self.loss.maps_voxels else self.rows * (slots * classes + 1)
        results = [(call.dtype, self._value()), ("float64", (self._of_batch(numbers),))]
        result, statistics = in_program(call.text, results, [logits, *given])
        return result, (statistics, *given)

    def gradient(self, logits: Any, kept: Sequence[Any], upstream: Any) -> Any:
        statistics, *given = kept
        call = self.call._replace(step="gradient", fields=self.loss.field_names)
        upstream = tf.cast(upstream, call.dtype)
        results = [(logits.dtype.name, self._dims(self.shapes.logits))]
        (found,) = in_program(call.text, results, [logits, *given, statistics, upstream])
        return found

    def _with_fields(self, logits: Any) -> list[Any]:
        """The arrays beside the logits, with all fields that the loss reads, in its order."""
        names, count = self.call.fields, 1 + self.has_weight
        others, fields = self.given[:count], self.given[count : count + len(names)]
        regions = self.given[count + len(names) :]
        results = [
            (np.dtype(self.shapes.form(name).dtype).name, self._dims(self.shapes.field(name)))
            for name in self.makes
        ]
        made: Sequence[Any] = ()
        if results:
            text = self.call._replace(step="fields").text
            made = in_program(text, results, [tf.stop_gradient(logits), *self.given])
        known = dict(zip((*names, *self.makes), (*fields, *made), strict=True))
        return [*others, *(known[name] for name in self.loss.field_names), *regions]

    def _dims(self, shape: Sequence[int | None]) -> tuple[Dim, ...]:
        """A shape that is that of the logits, or lacks their channel axis."""
        axes = list(range(len(self.shapes.logits)))
        if len(shape) < len(axes):
            axes.remove(self.loss.channel_axis % len(axes))
        return tuple((i, 1) if n is None else n for i, n in zip(axes, shape, strict=True))

    def _value(self) -> tuple[Dim, ...]:
        shape = self.shapes.value
        if self.loss.maps_voxels:
            return self._dims(shape)
        return tuple(self._of_batch(self.rows) if n is None else n for n in shape)

    def _of_batch(self, times: int) -> Dim:
        """So many for each sample."""
        batch = self.shapes.logits[0]
        return (0, times) if batch is None else batch * times


def in_program(
    text: str, results: Sequence[Result], operands: Sequence[Any], name: str = frame.NAME
) -> Sequence[Any]:
    """The results of the host's function, in a graph that XLA compiles."""
    from tensorflow.compiler.mlir.stablehlo import stablehlo
    from tensorflow.compiler.tf2xla.python import xla

    module = _module(name, text, results, operands)
    found: Sequence[Any] = xla.call_module(
        list(operands),
        version=_MODULE_VERSION,
        module=stablehlo.serialize_portable_artifact_str(module, stablehlo.get_current_version()),
        Tout=[tf.dtypes.as_dtype(dtype) for dtype, _ in results],
        Sout=[[None if isinstance(n, tuple) else n for n in shape] for _, shape in results],
        platforms=["CPU"],
    )
    return found


def _module(name: str, text: str, results: Sequence[Result], operands: Sequence[Any]) -> str:
    """The module of StableHLO of one call; shapes that depend on the first operand's are computed
    in it, and given as further operands, which XLA folds away."""
    given = [_type(tensor.dtype.name, tensor.shape) for tensor in operands]
    new = [_type(dtype, shape) for dtype, shape in results]
    names = [f"%a{i}" for i in range(len(given))]
    types, layouts, lines = list(given), [len(tensor.shape) for tensor in operands], []
    indices = ""
    if any(isinstance(n, tuple) for _, shape in results for n in shape):
        for i, (_, shape) in enumerate(results):
            lines += _shape(f"%s{i}", shape, given[0])
            names.append(f"%s{i}")
            types.append(f"tensor<{len(shape)}xi32>")
            layouts.append(1)
        places = ", ".join(str(len(given) + i) for i in range(len(results)))
        indices = f", indices_of_shape_operands = dense<[{places}]> : tensor<{len(results)}xi64>"
    escaped = text.replace("\\", "\\5C").replace('"', "\\22")
    signature = f"({', '.join(types)}) -> ({', '.join(new)})"
    options = (
        f'api_version = 4 : i32, backend_config = {{{frame.ATTRIBUTE} = "{escaped}"}}, '
        f"operand_layouts = [{', '.join(map(_layout, layouts))}], "
        f"result_layouts = [{', '.join(_layout(len(shape)) for _, shape in results)}]{indices}"
    )
    found = [f"%r#{i}" for i in range(len(new))] if len(new) > 1 else ["%r"]
    many = f":{len(new)}" if len(new) > 1 else ""
    arguments = ", ".join(f"%a{i}: {kind}" for i, kind in enumerate(given))
    return "\n".join(
        [
            "module @fastloss attributes {jax.uses_shape_polymorphism = true} {",
            f"func.func public @main({arguments}) -> ({', '.join(new)}) {{",
            *lines,
            f"%r{many} = stablehlo.custom_call @{name}({', '.join(names)}) "
            f"{{{options}}} : {signature}",
            f"return {', '.join(found)} : {', '.join(new)}",
            "}",
            "}",
        ]
    )


def _type(dtype: str, shape: Sequence[Any]) -> str:
    dims = "".join(f"{n}x" if isinstance(n, int) else "?x" for n in shape)
    return f"tensor<{dims}{_TYPES[dtype]}>"


def _layout(rank: int) -> str:
    """In C order."""
    order = f"[{', '.join(map(str, reversed(range(rank))))}]" if rank else ""
    return f"dense<{order}> : tensor<{rank}xindex>"


def _shape(name: str, shape: Sequence[Dim], first: str) -> list[str]:
    """What computes a shape of the first operand, whose type is given."""
    count = len(shape)
    if not count:
        return [f"{name} = stablehlo.constant dense<> : tensor<0xi32>"]
    lines = []
    for i, n in enumerate(shape):
        own = f"{name}_{i}"
        if isinstance(n, int):
            lines.append(f"{own} = stablehlo.constant dense<{n}> : tensor<1xi32>")
            continue
        axis, times = n
        lines += [
            f"{own}_n = stablehlo.get_dimension_size %a0, dim = {axis} : ({first}) -> tensor<i32>",
            f"{own}_t = stablehlo.constant dense<{times}> : tensor<i32>",
            f"{own}_p = stablehlo.multiply {own}_n, {own}_t : tensor<i32>",
            f"{own} = stablehlo.reshape {own}_p : (tensor<i32>) -> tensor<1xi32>",
        ]
    parts = ", ".join(f"{name}_{i}" for i in range(count))
    kinds = ", ".join(["tensor<1xi32>"] * count)
    joined = f"stablehlo.concatenate {parts}, dim = 0 : ({kinds}) -> tensor<{count}xi32>"
    return [*lines, f"{name} = {joined}"]


# ------------------------------------------------------------------ the interface


class _Bytes(ctypes.Structure):
    _fields_ = [("start", ctypes.c_char_p), ("size", c_size_t)]


class _Registration(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("name", _Bytes),
        ("platform", _Bytes),
        ("stages", c_void_p * 4),
        ("traits", c_uint32),
    ]


_register_in = ctypes.CFUNCTYPE(c_void_p, ctypes.POINTER(_Registration))


@cache
def _api() -> int:
    """The address of the interface's table in TensorFlow's library.

    Raises:
        OSError, AttributeError: it has none.
    """
    (path,) = Path(tf.sysconfig.get_lib()).glob("libtensorflow_cc.so*")
    # The library that is loaded, and not another one.
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    get = library[_GET_API]
    get.restype, get.argtypes = c_void_p, []
    address: int = get()
    return address


@cache
def _version() -> tuple[int, int]:
    major, minor = (c_int * 2).from_address(_api() + _API_MAJOR)
    return major, minor


def _try(_: bytes, operands: list[np.ndarray], results: list[np.ndarray]) -> None:
    results[0][...] = operands[0].sum() + 1


_handlers = {
    frame.NAME: frame.function(_version, host.run),
    _TRIAL: frame.function(_version, _try),
}


def _register() -> bool:
    """Make the functions known to XLA."""
    if _version()[0] != 0 or c_size_t.from_address(_api()).value <= _API_REGISTER:
        return False
    register = _register_in(c_void_p.from_address(_api() + _API_REGISTER).value or 0)
    for name, handler in _handlers.items():
        stages = (c_void_p * 4)(None, None, None, ctypes.cast(handler, c_void_p))
        told = [_Bytes(text, len(text)) for text in (name.encode(), b"Host")]
        arguments = _Registration(ctypes.sizeof(_Registration), None, *told, stages, 0)
        if register(ctypes.byref(arguments)) is not None:
            return False
    return True


@cache
def is_there() -> bool:
    """Whether this TensorFlow's XLA can call: the functions are made known, and one is tried."""
    try:
        if not _register():
            return False

        def trial(x: Any) -> Any:
            return in_program("", [("float32", ((0, 2), 3))], [x], _TRIAL)[0]

        signature = [tf.TensorSpec((None, 1, 3))]
        with tf.init_scope():
            compiled = tf.function(trial, signature, autograph=False, jit_compile=True)
            found = compiled(tf.zeros((2, 1, 3)))
        return bool(np.array_equal(found, np.ones((4, 3))))
    except Exception:  # of any kind: another version has other parts
        return False
