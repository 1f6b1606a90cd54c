"""oneDNN called by its own C interface: convolutions that write where they are told.

torch brings the result of every convolution into new memory, from where it has to be copied to its place; oneDNN itself
takes the place.  It also pads either side of an axis by its own amount, and takes weights in the order that it wants
once and for all, where torch reorders them at every call.  The kernels are those that torch calls, and so are the bits.

The library comes with the package `onednn-cpu-gomp`, or from the path in PARTITIONER_ONEDNN; "off" there leaves
everything to torch.  It is used where it shares torch's threads: both have to be linked with the same OpenMP.

Source: oneDNN developer guide, C API of version 3 (dnnl.h), whose objects are all opaque.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    import torch

    from partitioner.ops.base import TensorType
else:
    from partitioner.lazy import torch

PACKAGE = "onednn-cpu-gomp"
"""The distribution that brings the library."""

SWITCH = "PARTITIONER_ONEDNN"
"""Environment variable: the path of another library, or "off"."""

# Values of the enumerations in dnnl_types.h and dnnl_common_types.h.
_CPU, _IN_ORDER, _FORWARD_INFERENCE, _RELU, _FLOAT32, _ANY = 1, 1, 96, 0x20, 3, 1
_DIRECT = {"convolution": 0x1, "deconvolution": 0xA}
_OWN_SCRATCHPAD, _IMPLEMENTATION, _WEIGHTS_LAYOUT, _SCRATCHPAD_LAYOUT, _OPENMP = 1, 8, 131, 136, 2
_OUT_OF_MEMORY = 1
_SOURCE, _TARGET, _WEIGHTS, _BIAS, _SCRATCHPAD = 1, 17, 33, 41, 80


class _Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int),
                ("commit", ctypes.c_char_p), ("cpu_runtime", ctypes.c_uint), ("gpu_runtime", ctypes.c_uint))


class _Unimplemented(Exception):
    """The library has no kernel of its fast ones for this."""


@dataclass(frozen=True)
class Task:
    """A convolution without its data.

    Args:
        data, weight: extents; those of the weight (out, in / groups, ...), or (in, out / groups, ...) when transposed.
        stride, dilation: per spatial axis.
        padding: per spatial axis before and after it (cropping, when transposed), none of them negative.
        slope: of the LeakyRelu that follows, where one does.
        adds: to what is there already.
    """

    data: tuple[int, ...]
    weight: tuple[int, ...]
    has_bias: bool
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    slope: float | None = None
    transposed: bool = False
    adds: bool = False

    @property
    def channels(self) -> int:
        """Those of the result."""
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    @property
    def result(self) -> tuple[int, ...]:
        """Extents of the result."""
        spatial = zip(self.data[2:], self.weight[2:], self.stride, self.dilation, self.padding, strict=True)
        if self.transposed:
            extents = [(n - 1) * s + (k - 1) * d + 1 - lo - hi for n, k, s, d, (lo, hi) in spatial]
        else:
            extents = [(n + lo + hi - (k - 1) * d - 1) // s + 1 for n, k, s, d, (lo, hi) in spatial]
        return (self.data[0], self.channels, *extents)


def is_available() -> bool:
    """Whether there is a library to call."""
    return _library() is not None


def is_installed() -> bool:
    """Whether there seems to be one, found without loading it: for plans."""
    return _path() is not None


def makes(result: TensorType) -> bool:
    """Whether kernels may write results of this type, in a plan for a machine like this one."""
    return is_installed() and result.rank > 3 and result.dtype == ir.DataType.FLOAT


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether an image or a volume lies densely with channels last: then kernels take it as it is."""
    return tensor.is_contiguous(memory_format=_last(tensor))


def _last(tensor: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d


def suits(data: torch.Tensor) -> bool:
    """Whether data is what the kernels take: images or volumes in float32, on the CPU, without gradients."""
    return (data.device.type == "cpu" and data.dtype == torch.float32 and data.dim() in (4, 5) and data.numel() > 0
            and _plainly() and is_available())


def _plainly() -> bool:
    """Whether torch computes neither gradients nor in another precision now."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def kernel_for(weight: torch.Tensor, task: Task) -> Kernel | None:
    """The kernel for a convolution with these weights of data that `suits`, or None where there is no fast one."""
    if min(task.result) < 1 or weight.dtype != torch.float32 or weight.numel() == 0:
        return None
    if not weight.is_inference():
        return _make_kernel(weight, task, ())
    known: dict[tuple[Task, int], Kernel | None] = _kernels().setdefault(weight, {})
    key = (task, torch.get_num_threads())
    if key not in known:
        known[key] = _make_kernel(weight, task, [k.packed for k in known.values() if k is not None])
    return known[key]


class Kernel:
    """A primitive with its weights in the order that it wants."""

    def __init__(self, library: _Library, weight: torch.Tensor, task: Task, packed: Sequence[_Packed]) -> None:
        self.task = task
        self._shape, self._adds = task.result, task.adds
        self._weight = weakref.ref(weight) if weight.is_inference() else None  # others may change
        self._threads = torch.get_num_threads()
        self._library, self._lock = library, threading.Lock()
        self._primitive, self.packed, scratch = library.convolution(weight, task, packed)
        self._scratch = library.size_of(scratch)
        layouts = (library.layout(task.data), library.layout(task.result), library.layout((task.channels,)))
        self._source, self._target, self._bias = (library.memory(layout) for layout in layouts)
        self._room = library.memory(scratch)
        given = [(_SOURCE, self._source), (_WEIGHTS, self.packed.memory), (_TARGET, self._target),
                 (_SCRATCHPAD, self._room)]
        if task.has_bias:
            given.append((_BIAS, self._bias))
        self._count = len(given)
        self._arguments = (_Argument * len(given))(*(_Argument(n, m.handle) for n, m in given))

    def serves(self, data: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether it is still the one for such a call: the same weights, as many threads, extents as before."""
        return (self._weight is not None and self._weight() is weight and data.shape == self.task.data
                and torch.get_num_threads() == self._threads and _plainly())

    def run(self, data: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor | None) -> torch.Tensor:
        """The convolution of data, into memory that is given, or added to what is there (which must lie densely)."""
        place = into
        if place is None or not is_dense(place):
            assert not self._adds
            place = torch.empty(self._shape, dtype=data.dtype, memory_format=_last(data))
        self._run(data.contiguous(memory_format=_last(data)), None if bias is None else bias.contiguous(), place)
        return place if into is None or place is into else into.copy_(place)

    def _run(self, data: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor) -> None:
        point, room = self._library.point, torch.empty(self._scratch, dtype=torch.uint8) if self._scratch else None
        with self._lock:
            point(self._source.address, data.data_ptr())
            point(self._target.address, into.data_ptr())
            if bias is not None:
                point(self._bias.address, bias.data_ptr())
            if room is not None:
                point(self._room.address, room.data_ptr())
            self._library.execute(self._primitive, self._count, self._arguments)


@dataclass(frozen=True)
class _Object:
    """Something of the library's, destroyed with this; functions take it as it is."""

    handle: ctypes.c_void_p

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return self.handle

    @functools.cached_property
    def address(self) -> int:
        """The handle as a number."""
        return self.handle.value or 0


@dataclass(frozen=True)
class _Packed:
    """Weights in the order that a kernel wants."""

    layout: _Object
    memory: _Object
    cells: torch.Tensor


class _Library:
    """The C interface."""

    def __init__(self, path: str) -> None:
        self._functions = ctypes.CDLL(path)
        for name in ("primitive_desc_query_md", "memory_desc_get_size", "version"):
            getattr(self._functions, f"dnnl_{name}").restype = {
                "memory_desc_get_size": ctypes.c_size_t, "version": ctypes.POINTER(_Version),
            }.get(name, ctypes.c_void_p)
        self.point = self._functions.dnnl_memory_set_data_handle
        self.point.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._execute = self._functions.dnnl_primitive_execute
        self._execute.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._engine = self.make("engine", _CPU, ctypes.c_size_t(0))
        self._stream = self.make("stream", self._engine, _IN_ORDER)

    @property
    def suits(self) -> bool:
        """Whether it has the interface used here, and the threads that torch has."""
        version = self._functions.dnnl_version().contents
        if version.major != 3 or version.cpu_runtime != _OPENMP:
            return False
        torchs = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        threads = [ctypes.cast(lib.omp_get_max_threads, ctypes.c_void_p).value for lib in (self._functions, torchs)]
        return threads[0] == threads[1]

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the library.

        Raises:
            _Unimplemented: it does not return success.
        """
        status = getattr(self._functions, f"dnnl_{name}")(*arguments)
        if status:
            raise _Unimplemented(f"oneDNN: {name} returned {status}")

    def make(self, kind: str, *arguments: Any, by: str = "create") -> _Object:
        """An object of the library's."""
        handle = ctypes.c_void_p()
        self.call(f"{kind}_{by}", ctypes.byref(handle), *arguments)
        made = _Object(handle)
        destroy = "primitive_desc" if kind.endswith("primitive_desc") else kind
        weakref.finalize(made, getattr(self._functions, f"dnnl_{destroy}_destroy"), handle).atexit = False
        return made

    def layout(self, shape: Sequence[int], strides: Sequence[int] | None = None) -> _Object:
        """Extents in memory: dense with channels last unless strides are given."""
        if strides is None:
            order = (0, *range(2, len(shape)), 1) if len(shape) > 1 else (0,)
            found, step = [0] * len(shape), 1
            for axis in reversed(order):
                found[axis], step = step, step * shape[axis]
            strides = found
        return self.make("memory_desc", len(shape), _integers(shape), _FLOAT32, _integers(strides),
                         by="create_with_strides")

    def memory(self, layout: _Object, cells: torch.Tensor | None = None) -> _Object:
        """A tensor, or one that is still to be given."""
        return self.make("memory", layout, self._engine,
                         ctypes.c_void_p(cells.data_ptr() if cells is not None else 0))

    def size_of(self, layout: _Object) -> int:
        """Bytes of memory in a layout."""
        return self._functions.dnnl_memory_desc_get_size(layout)

    def execute(self, primitive: _Object, count: int, arguments: Any) -> None:
        """Run a primitive.

        Raises:
            MemoryError: for want of memory.
            RuntimeError: it cannot.
        """
        status = self._execute(primitive.address, self._stream.address, count, arguments)
        if status:
            raise (MemoryError if status == _OUT_OF_MEMORY else RuntimeError)(f"oneDNN returned {status}")

    def convolution(self, weight: torch.Tensor, task: Task,
                    packed: Sequence[_Packed]) -> tuple[_Object, _Packed, _Object]:
        """A primitive, its weights, and the layout of the memory that it needs beside.

        Raises:
            _Unimplemented: there is only a slow one.
        """
        shape, strides = _weight_order(weight, task)
        kind = "deconvolution" if task.transposed else "convolution"
        wanted = self.make("memory_desc", len(shape), _integers(shape), _FLOAT32, _ANY, by="create_with_tag")
        before, after = zip(*task.padding, strict=True)
        described = self.make(
            f"{kind}_forward_primitive_desc", self._engine, _FORWARD_INFERENCE, _DIRECT[kind],
            self.layout(task.data), wanted,
            self.layout((task.channels,)) if task.has_bias else None, self.layout(task.result),
            _integers(task.stride), _integers([d - 1 for d in task.dilation]), _integers(before), _integers(after),
            self._attributes(task))
        name = ctypes.c_char_p()
        self.call("primitive_desc_query", described, _IMPLEMENTATION, 0, ctypes.byref(name))
        if not (name.value or b"").startswith((b"jit", b"brg")):
            raise _Unimplemented(f"oneDNN: only {name.value}")
        layout, scratch = (self._layout_of(described, what) for what in (_WEIGHTS_LAYOUT, _SCRATCHPAD_LAYOUT))
        same = (p for p in packed if self._functions.dnnl_memory_desc_equal(p.layout, layout))
        own = next(same, None) or self._pack(weight, self.layout(shape, strides), layout)
        return self.make("primitive", described), own, scratch

    def _attributes(self, task: Task) -> _Object:
        attributes = self.make("primitive_attr")
        self.call("primitive_attr_set_scratchpad_mode", attributes, _OWN_SCRATCHPAD)
        after = self.make("post_ops")
        if task.adds:
            self.call("post_ops_append_sum", after, ctypes.c_float(1.0), ctypes.c_int32(0), _FLOAT32)
        if task.slope is not None:
            self.call("post_ops_append_eltwise", after, _RELU, ctypes.c_float(task.slope), ctypes.c_float(0.0))
        self.call("primitive_attr_set_post_ops", attributes, after)
        return attributes

    def _layout_of(self, described: _Object, what: int) -> _Object:
        """One of a primitive's own layouts, which go with it: a copy."""
        inner = self._functions.dnnl_primitive_desc_query_md(described, what, 0)
        return self.make("memory_desc", ctypes.c_void_p(inner), by="clone")

    def _pack(self, weight: torch.Tensor, layout: _Object, wanted: _Object) -> _Packed:
        cells = torch.empty(max(1, self.size_of(wanted)), dtype=torch.uint8)
        packed = _Packed(wanted, self.memory(wanted, cells), cells)
        described = self.make("reorder_primitive_desc", layout, self._engine, wanted,
                              self._engine, None)
        given = self.memory(layout, weight)
        arguments = (_Argument * 2)(_Argument(_SOURCE, given.handle), _Argument(_TARGET, packed.memory.handle))
        self.execute(self.make("primitive", described), 2, arguments)
        return packed


def _weight_order(weight: torch.Tensor, task: Task) -> tuple[list[int], list[int]]:
    """Extents and strides as the library counts them: (groups, if there are several, out, in, ...)."""
    shape, strides = list(weight.shape), list(weight.stride())
    if task.groups > 1:
        shape[:1] = [task.groups, shape[0] // task.groups]
        strides[:1] = [strides[0] * shape[1], strides[0]]
    if task.transposed:
        first = len(shape) - weight.dim()
        for values in (shape, strides):
            values[first], values[first + 1] = values[first + 1], values[first]
    return shape, strides


def _integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


@functools.cache
def _path() -> str | None:
    """The library's file."""
    switch = os.environ.get(SWITCH, "")
    if switch:
        return switch if os.path.isfile(switch) else None
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "libdnnl.so.3"), None)


@functools.cache
def _library() -> _Library | None:
    path = _path()
    if path is None:
        return None
    _ = torch.__version__  # its OpenMP is there before the library asks for one of the same name
    try:
        library = _Library(path)
        return library if library.suits else None
    except (OSError, AttributeError, _Unimplemented):
        return None


@functools.cache
def _kernels() -> Any:
    """Kernels by task, by the weight tensor that they have taken over, as long as that lives."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def _make_kernel(weight: torch.Tensor, task: Task, packed: Sequence[_Packed]) -> Kernel | None:
    library = _library()
    assert library is not None
    try:
        return Kernel(library, weight, task, packed)
    except _Unimplemented:
        return None
