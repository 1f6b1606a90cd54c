"""The C interface of oneDNN: a library of kernels that write where they are told.

It comes with the package `onednn-cpu-gomp`, or from the path in PARTITIONER_ONEDNN; "off" there leaves everything to
torch.  It is used where it shares torch's threads: both have to be linked with the same OpenMP.

Source: oneDNN developer guide, C API of version 3 (dnnl.h), whose objects are all opaque.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

PACKAGE = "onednn-cpu-gomp"
"""The distribution that brings the library."""

SWITCH = "PARTITIONER_ONEDNN"
"""Environment variable: the path of another library, or "off"."""

# Values of the enumerations in dnnl_types.h and dnnl_common_types.h.
_CPU, _IN_ORDER, _ANY = 1, 1, 1
_OWN_SCRATCHPAD, _IMPLEMENTATION, _SCRATCHPAD_LAYOUT, _OPENMP = 1, 8, 136, 2
_OUT_OF_MEMORY = 1
SOURCE, TARGET, WEIGHTS, BIAS, _SCRATCHPAD = 1, 17, 33, 41, 80
"""Numbers of the arguments of primitives."""

FLOAT32 = 3
"""The number of the type."""


class _Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int),
                ("commit", ctypes.c_char_p), ("cpu_runtime", ctypes.c_uint), ("gpu_runtime", ctypes.c_uint))


class Unimplemented(Exception):
    """The library has no kernel of its fast ones for this."""


def is_available() -> bool:
    """Whether there is a library to call."""
    return load() is not None


def is_installed() -> bool:
    """Whether there seems to be one, found without loading it: for plans."""
    return _path() is not None


@dataclass(frozen=True)
class Object:
    """Something of the library's, destroyed with this; functions take it as it is."""

    handle: ctypes.c_void_p

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return self.handle

    @functools.cached_property
    def address(self) -> int:
        """The handle as a number."""
        return self.handle.value or 0


class Step:
    """A primitive and the places of its arguments.

    Args:
        described: the primitive's description.
        open: per argument the layout of the tensors that it is given, in their order.
        fixed: arguments that stay.
    """

    def __init__(self, library: Library, described: Object, open: Mapping[int, Object],
                 fixed: Mapping[int, Object] | None = None) -> None:
        self._library, self._lock = library, threading.Lock()
        self._primitive = library.make("primitive", described)
        scratch = library.layout_of(described, _SCRATCHPAD_LAYOUT)
        self._scratch = library.size_of(scratch)
        self._open = {number: library.memory(layout) for number, layout in open.items()}
        self._given = [memory.address for memory in self._open.values()]
        self._room = library.memory(scratch)
        every = {**self._open, **(fixed or {}), _SCRATCHPAD: self._room}
        self._fixed = fixed
        self._count = len(every)
        self._arguments = (_Argument * len(every))(*(_Argument(n, m.handle) for n, m in every.items()))

    def run(self, *tensors: torch.Tensor) -> None:
        """Run it on tensors that lie as it was told.

        Raises:
            MemoryError: for want of memory.
            RuntimeError: it cannot.
        """
        point, room = self._library.point, torch.empty(self._scratch, dtype=torch.uint8) if self._scratch else None
        with self._lock:
            for address, tensor in zip(self._given, tensors, strict=True):
                point(address, tensor.data_ptr())
            if room is not None:
                point(self._room.address, room.data_ptr())
            self._library.execute(self._primitive, self._count, self._arguments)


class Library:
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
            Unimplemented: it does not return success.
        """
        status = getattr(self._functions, f"dnnl_{name}")(*arguments)
        if status:
            raise Unimplemented(f"oneDNN: {name} returned {status}")

    def make(self, kind: str, *arguments: Any, by: str = "create") -> Object:
        """An object of the library's."""
        handle = ctypes.c_void_p()
        self.call(f"{kind}_{by}", ctypes.byref(handle), *arguments)
        made = Object(handle)
        destroy = "primitive_desc" if kind.endswith("primitive_desc") else kind
        weakref.finalize(made, getattr(self._functions, f"dnnl_{destroy}_destroy"), handle).atexit = False
        return made

    def describe(self, kind: str, *arguments: Any) -> Object:
        """The description of a primitive.

        Raises:
            Unimplemented: there is only a slow one.
        """
        described = self.make(f"{kind}_primitive_desc", self._engine, *arguments)
        found = ctypes.c_char_p()
        self.call("primitive_desc_query", described, _IMPLEMENTATION, 0, ctypes.byref(found))
        if not (found.value or b"").removeprefix(b"conv:any+").startswith((b"jit", b"brg", b"brdgmm")):
            raise Unimplemented(f"oneDNN: only {found.value}")
        return described

    def layout(self, shape: Sequence[int], strides: Sequence[int] | None = None) -> Object:
        """Extents in memory: dense with channels last unless strides are given."""
        if strides is None:
            order = (0, *range(2, len(shape)), 1) if len(shape) > 1 else (0,)
            found, step = [0] * len(shape), 1
            for axis in reversed(order):
                found[axis], step = step, step * shape[axis]
            strides = found
        return self.make("memory_desc", len(shape), integers(shape), FLOAT32, integers(strides),
                         by="create_with_strides")

    def any_layout(self, shape: Sequence[int]) -> Object:
        """Extents in whatever order a primitive wants."""
        return self.make("memory_desc", len(shape), integers(shape), FLOAT32, _ANY, by="create_with_tag")

    def memory(self, layout: Object, cells: torch.Tensor | None = None) -> Object:
        """A tensor, or one that is still to be given."""
        return self.make("memory", layout, self._engine,
                         ctypes.c_void_p(cells.data_ptr() if cells is not None else 0))

    def size_of(self, layout: Object) -> int:
        """Bytes of memory in a layout."""
        return self._functions.dnnl_memory_desc_get_size(layout)

    def execute(self, primitive: Object, count: int, arguments: Any) -> None:
        """Run a primitive.

        Raises:
            MemoryError: for want of memory.
            RuntimeError: it cannot.
        """
        status = self._execute(primitive.address, self._stream.address, count, arguments)
        if status:
            raise (MemoryError if status == _OUT_OF_MEMORY else RuntimeError)(f"oneDNN returned {status}")

    def reorder(self, source: Object, target: Object) -> Step:
        """A step that copies a tensor from one layout to another."""
        described = self.make("reorder_primitive_desc", source, self._engine, target, self._engine, self.attributes())
        return Step(self, described, {SOURCE: source, TARGET: target})

    def attributes(self) -> Object:
        """Attributes of a primitive that is given the memory that it needs beside."""
        found = self.make("primitive_attr")
        self.call("primitive_attr_set_scratchpad_mode", found, _OWN_SCRATCHPAD)
        return found

    def are_equal(self, one: Object, other: Object) -> bool:
        """Whether two layouts are the same."""
        return bool(self._functions.dnnl_memory_desc_equal(one, other))

    def layout_of(self, described: Object, what: int) -> Object:
        """One of a primitive's own layouts, which go with it: a copy."""
        inner = self._functions.dnnl_primitive_desc_query_md(described, what, 0)
        return self.make("memory_desc", ctypes.c_void_p(inner), by="clone")


def integers(values: Sequence[int]) -> Any:
    """Numbers as the library takes them."""
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
def load() -> Library | None:
    """The library, if there is one that can be used."""
    where = _path()
    if where is None:
        return None
    _ = torch.__version__  # its OpenMP is there before the library asks for one of the same name
    try:
        library = Library(where)
        return library if library.suits else None
    except (OSError, AttributeError, Unimplemented):
        return None
