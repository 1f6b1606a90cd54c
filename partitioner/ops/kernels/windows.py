"""What convolutions and pools share: reading window attributes, and padding a shard locally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitioner.geometry import Interval
from partitioner.maps import Window, ceil_div
from partitioner.ops.base import Need, NodeView, Unsupported, WrongExtents

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional
else:
    from partitioner.lazy import functional


@dataclass(frozen=True)
class Border:
    """Padding that a shard needs along one axis, and how its kernel gets it.

    Args:
        lo: cells before.
        hi: cells after.
        kernel_pad: what the kernel itself pads on both sides.
        skip: outputs to drop at the front, because the kernel padded more than `lo`.
        explicit: whether `lo` and `hi` are added to the tensor first (then kernel_pad is 0).
    """

    lo: int
    hi: int
    kernel_pad: int = 0
    skip: int = 0
    explicit: bool = False


def read_windows(view: NodeView, extents: Sequence[int], kernel: Sequence[int], *,
                 ceil_mode: bool = False, pooling: bool = False) -> tuple[tuple[Window, ...], tuple[int, ...]]:
    """Windows per spatial axis and the padding after each axis, from ONNX attributes.

    ceil_mode becomes a longer output; the padding returned is the declared one, which is what an
    average counts.

    Raises:
        Unsupported: when the attributes contradict one another or leave no output.
    """
    if pooling:
        _refuse_short_windows(view, extents, kernel)
    count = len(extents)
    strides = view.ints("strides") or (1,) * count
    dilations = view.ints("dilations") or (1,) * count
    pads = view.ints("pads") or (0,) * (2 * count)
    auto = view.text("auto_pad", "NOTSET")
    if not len(kernel) == len(strides) == len(dilations) == count or len(pads) != 2 * count:
        raise Unsupported(f"kernel, strides, dilations and pads do not fit {count} spatial axes; correct the file")
    windows: list[Window] = []
    ends: list[int] = []
    for axis in range(count):
        n, k, s, d = extents[axis], kernel[axis], strides[axis], dilations[axis]
        if min(k, s, d) < 1:
            raise Unsupported(f"kernel {k}, stride {s}, dilation {d} must be positive; correct the file")
        lo, hi = _pads(auto, n, (k - 1) * d + 1, s, pads[axis], pads[count + axis])
        out = _window_count(n, lo, hi, (k - 1) * d + 1, s, ceil_mode)
        if out < 1:
            raise WrongExtents(
                f"a window of {(k - 1) * d + 1} cells does not fit the {n} cells of axis {axis + 2} "
                f"(padding {lo} and {hi}); use a larger volume"
            )
        windows.append(Window(n, out, k, s, d, lo))
        ends.append(hi)
    return tuple(windows), tuple(ends)


def _refuse_short_windows(view: NodeView, extents: Sequence[int], kernel: Sequence[int]) -> None:
    """onnxruntime's pools take the padding of auto_pad as negative where a window is shorter than its stride."""
    strides = view.ints("strides") or (1,) * len(extents)
    dilations = view.ints("dilations") or (1,) * len(extents)
    if not view.text("auto_pad", "NOTSET").startswith("SAME"):
        return
    for n, k, s, d in zip(extents, kernel, strides, dilations, strict=False):
        if (ceil_div(n, max(1, s)) - 1) * s + (k - 1) * d + 1 < n:
            raise Unsupported(f"auto_pad with a window of {(k - 1) * d + 1} cells at stride {s} leaves cells out, "
                              "which runtimes see differently; export it with explicit pads")


def _pads(auto: str, n: int, reach: int, stride: int, lo: int, hi: int) -> tuple[int, int]:
    if auto in ("NOTSET", ""):
        return lo, hi
    if auto == "VALID":
        return 0, 0
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise Unsupported(f"auto_pad '{auto}' is unknown; correct the file")
    total = max(0, (ceil_div(n, stride) - 1) * stride + reach - n)  # 0 for a window shorter than its stride
    small, large = total // 2, total - total // 2
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _window_count(n: int, lo: int, hi: int, reach: int, stride: int, ceil_mode: bool) -> int:
    room = n + lo + hi - reach
    if not ceil_mode:
        return room // stride + 1
    count = ceil_div(room, stride) + 1
    starts_in_padding = (count - 1) * stride >= n + lo
    return count - 1 if starts_in_padding else count


def needed_end(window: Window) -> int:
    """Padding after an axis without which its last window would not fit."""
    return max(0, (window.n_out - 1) * window.stride + window.reach - window.n_in - window.lo)


def explicit_pads(windows: Sequence[Window]) -> dict[str, tuple[int, ...]]:
    """`pads` with which the windows are these, without auto_pad and ceil_mode."""
    return {"pads": (*(w.lo for w in windows), *map(needed_end, windows))}


def window_needs(windows: Sequence[Window]) -> tuple[Need, ...]:
    """Needs of the spatial axes, which follow batch and channel."""
    return tuple(Need(axis + 2, window) for axis, window in enumerate(windows))


def local_padding(window: Window, held: Interval, out: Interval) -> tuple[int, int]:
    """Cells that clipping to the tensor cut off before and after a shard's input."""
    want = window.unclipped(out)
    if not held:
        return len(want), 0
    return held.start - want.start, want.stop - held.stop


def plan_border(window: Window, held: Interval, out: Interval, limit: int | None = None) -> Border:
    """How to give a kernel that pads symmetrically its (often one-sided) padding without a copy.

    The kernel pads both sides by the larger amount and surplus outputs are dropped; where that would
    misalign the stride, exceed the kernel's limit or waste much work, the tensor is padded instead.
    """
    lo, hi = local_padding(window, held, out)
    pad = max(lo, hi)
    skip, phase = divmod(pad - lo, window.stride)
    surplus = abs(lo - hi) // window.stride
    allowed = limit is None or pad <= limit
    if held and phase == 0 and allowed and surplus <= max(1, len(out) // 8):
        return Border(lo, hi, kernel_pad=pad, skip=skip)
    return Border(lo, hi, explicit=True)


def pad_explicitly(tensor: torch.Tensor, borders: Sequence[Border], value: float) -> torch.Tensor:
    """The tensor with the padding that its kernel will not add; itself when there is none."""
    amounts: list[int] = []
    for border in reversed(borders):
        amounts += [border.lo, border.hi] if border.explicit else [0, 0]
    return functional.pad(tensor, amounts, value=value) if any(amounts) else tensor


def crop_outputs(tensor: torch.Tensor, borders: Sequence[Border], outs: Sequence[Interval]) -> torch.Tensor:
    """Drops the outputs that exist only because the kernel padded more than was asked."""
    for axis, (border, out) in enumerate(zip(borders, outs, strict=True)):
        if tensor.shape[axis + 2] != len(out):
            tensor = tensor.narrow(axis + 2, border.skip, len(out))
    return tensor


def strided_taps(tensor: torch.Tensor, axis: int, window: Window, count: int) -> list[torch.Tensor]:
    """Per tap of a window the cells that it reads for the first `count` outputs, of a tensor padded before."""
    index = [slice(None)] * tensor.dim()
    found: list[torch.Tensor] = []
    for tap in range(window.kernel):
        first = tap * window.dilation
        index[axis] = slice(first, first + (count - 1) * window.stride + 1, window.stride)
        found.append(tensor[tuple(index)])
    return found
