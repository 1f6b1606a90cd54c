"""Buffers as torch tensors: storage order, windows into them, weights."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from partitioner.errors import ExecutionError
from partitioner.geometry import Interval
from partitioner.ops.dtypes import torch_dtype
from runtime.arena import LARGE, LARGE_PAGE, Arena
from runtime.program import MAPPED_FROM, BufferSpec, Window, storage_order


def storage_on(device: torch.device, storage: str) -> str:
    """The axis order for a device: cuDNN's float32 convolutions of volumes take channels first."""
    return storage if device.type == "cpu" else "channels_first"


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, storage: str) -> torch.Tensor:
    """An empty tensor whose memory is in storage order."""
    order = storage_order(storage, len(shape))
    stored = torch.empty([shape[a] for a in order], dtype=dtype, device=device)
    return stored.permute([order.index(a) for a in range(len(order))])


def allocate_buffer(spec: BufferSpec, device: torch.device, storage: str, poison: bool,
                    arena: Arena | None = None) -> torch.Tensor:
    """Memory for a buffer; poisoned with NaN where a test wants to see what nobody wrote."""
    dtype = torch_dtype(spec.dtype)
    if spec.place != "memory" and device.type == "cpu" and spec.nbytes >= MAPPED_FROM:
        tensor = _map(spec, dtype, storage)
    elif arena is not None and device.type == "cpu" and spec.nbytes > LARGE:
        tensor = arena.allocate(spec.box.shape, dtype, storage)
    else:
        tensor = allocate(spec.box.shape, dtype, device, storage)
    if poison and tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    return tensor


class _Mapping(mmap.mmap):
    """Pages of no file, or of one that has no name any more; remembered by the tensor that lies in them."""


def _map(spec: BufferSpec, dtype: torch.dtype, storage: str) -> torch.Tensor:
    """A tensor in pages of its own."""
    order = storage_order(storage, len(spec.box.shape))
    count = spec.box.size
    if spec.place == "file":
        pages = _map_file(count * dtype.itemsize)
    else:
        pages = _Mapping(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if spec.nbytes >= _LARGE_PAGES * LARGE_PAGE * spec.runs(order)[1] and hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
    stored = torch.frombuffer(pages, dtype=dtype, count=count).view([spec.box.shape[a] for a in order])
    tensor = stored.permute([order.index(a) for a in range(len(order))])
    _PAGES[tensor.data_ptr()] = pages
    return tensor


def _map_file(nbytes: int) -> _Mapping:
    """Pages of a file without a name, its space taken now: no later write finds the disk full.

    Raises:
        ExecutionError: no room for it.
    """
    try:
        with tempfile.TemporaryFile(prefix="partitioner-") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return _Mapping(file.fileno(), nbytes)
    except OSError as error:
        raise ExecutionError(f"{tempfile.gettempdir()}: no room for {nbytes} bytes of a resting tensor "
                             f"({error.strerror}); set TMPDIR to a folder with room, or give more memory") from None


_PAGES: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()
"""The mappings that are alive, by the address of their first value."""

_LARGE_PAGES = 16
"""Large pages in every run of a resting buffer, from which on it is filled by such: one more or less is little then."""

_PARTS = 64
"""In how many parts a resting buffer is filled again."""


def refill(tensor: torch.Tensor, saved: torch.Tensor, axis: int) -> None:
    """Copy what a resting buffer held; pages that held nothing yet, or nothing any more, stay untaken.

    Args:
        axis: along which the buffer is filled and given back.
    """
    if tensor.data_ptr() not in _PAGES:
        tensor.copy_(saved)
        return
    bits = saved.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[saved.element_size()])
    planes = max(1, saved.shape[axis] // _PARTS)
    for start in range(0, saved.shape[axis], planes):
        count = min(planes, saved.shape[axis] - start)
        if bits.narrow(axis, start, count).any():
            tensor.narrow(axis, start, count).copy_(saved.narrow(axis, start, count))


def give_back(tensor: torch.Tensor, spec: BufferSpec, storage: str, cells: Interval) -> None:
    """Return the memory of some cells of a resting buffer to the system, as far as they fill pages.

    Cells before these are gone already: a page that they share goes too.
    """
    pages = _PAGES.get(tensor.data_ptr())
    if pages is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    plane, blocks = spec.runs(storage_order(storage, tensor.dim()))
    block = plane * tensor.shape[spec.axis]
    for index in range(blocks):
        first = index * block
        start = max(-(-first // mmap.PAGESIZE), (first + cells.start * plane) // mmap.PAGESIZE)
        stop = (first + cells.stop * plane) // mmap.PAGESIZE
        if stop > start:
            pages.madvise(mmap.MADV_DONTNEED, start * mmap.PAGESIZE, (stop - start) * mmap.PAGESIZE)


def view(tensor: torch.Tensor, window: Window) -> torch.Tensor:
    """The cells of a window: a view where every axis is one slice, else a copy."""
    for axis, slices in enumerate(window.slices):
        first = slices[0]
        if len(slices) > 1:
            parts = [tensor.narrow(axis, s.start, s.stop - s.start) for s in slices]
            tensor = torch.cat(parts, axis)
        elif first.stop - first.start != tensor.shape[axis]:
            tensor = tensor.narrow(axis, first.start, first.stop - first.start)
    return tensor


def views(tensor: torch.Tensor, window: Window) -> list[torch.Tensor]:
    """The cells of a window as views, one per combination of slices, in order."""
    found = [tensor]
    for axis, slices in enumerate(window.slices):
        found = [t.narrow(axis, s.start, s.stop - s.start) for t in found for s in slices]
    return found


def parts_of(tensor: torch.Tensor, window: Window) -> list[torch.Tensor]:
    """The cells of a window, cut where it is cut in its buffer: they go with `views`, one by one."""
    found = [tensor]
    for axis, slices in enumerate(window.slices):
        if len(slices) > 1:
            lengths = [s.stop - s.start for s in slices]
            found = [piece for t in found for piece in t.split(lengths, axis)]
    return found


def in_storage_order(tensor: torch.Tensor, storage: str) -> torch.Tensor:
    """The same view with its axes from outermost to innermost."""
    return tensor.permute(storage_order(storage, tensor.dim()))


def load_weight(tensor: ir.TensorProtocol, device: torch.device, storage: str) -> torch.Tensor:
    """A weight on its device, in storage order."""
    if tensor.dtype == ir.DataType.BFLOAT16:
        bits = np.array(tensor.numpy().view(np.int16), copy=True)
        found = torch.from_numpy(bits).view(torch.bfloat16)
    else:
        found = torch.from_numpy(np.array(tensor.numpy(), copy=True)).to(torch_dtype(tensor.dtype))
    found = found.to(device)
    if storage == "channels_last" and found.dim() == 4:
        return found.contiguous(memory_format=torch.channels_last)
    if storage == "channels_last" and found.dim() == 5:
        return found.contiguous(memory_format=torch.channels_last_3d)
    return found
