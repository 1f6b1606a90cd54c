"""Operators that rename, move, repeat and leave out cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from tests.builder import Array, Builder, Value, draws


@draws("Transpose", exact=True)
def transpose(b: Builder) -> bool:
    x = b.any if b.integer(0, 3) == 0 else b.last
    return bool(x.shape) and b.add("Transpose", [x], {"perm": list(b.draw(st.permutations(range(len(x.shape)))))})


@draws("Reshape", exact=True)
def reshape(b: Builder) -> bool:
    """Two neighbouring axes become one, or one becomes two."""
    x = b.last
    axis = b.axis(x)
    if b.flag() and axis + 1 < len(x.shape) and len(x.shape) > 2:
        shape = [*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]]
    else:
        divisor = b.choose(*(d for d in range(1, x.shape[axis] + 1) if x.shape[axis] % d == 0))
        shape = [*x.shape[:axis], divisor, x.shape[axis] // divisor, *x.shape[axis + 1 :]]
    return len(shape) <= 6 and reshaped(b, x, shape)


def reshaped(b: Builder, x: Value, shape: Sequence[int]) -> bool:
    target = list(shape)
    if b.flag():
        target[b.integer(0, len(target) - 1)] = -1
    elif target[0] == x.shape[0]:
        target[0] = 0
    return b.add("Reshape", [x, np.array(target, np.int64)])


@draws("Reshape", exact=True)
def regroup(b: Builder) -> bool:
    """Any factors of the number of cells, in any order."""
    x, shape = b.last, []
    left = math.prod(x.shape)
    while left > 1 and len(shape) < 4:
        shape.append(b.choose(*(d for d in range(1, left + 1) if left % d == 0)))
        left //= shape[-1]
    return reshaped(b, x, [*shape, left])


@draws("Reshape", exact=True)
def flat_space(b: Builder) -> bool:
    """Space as one axis, often behind a transposition and back again, as attention has it."""
    x = b.last
    if len(x.shape) < 4 or not b.add("Reshape", [x, np.array([0, 0, -1], np.int64)]):
        return False
    if b.flag() and not b.add("Transpose", [b.values[-1]], {"perm": [0, 2, 1]}):
        return False
    if b.flag() and not b.add("Mul" if not b.style.integers else "Add", [b.values[-1], b.data(b.values[-1].shape[-1])]):
        return False
    if b.values[-1].shape[1] != x.shape[1] or b.flag():
        return True
    return b.add("Reshape", [b.values[-1], np.array(x.shape, np.int64)])


@draws("Reshape", exact=True)
def shuffle(b: Builder) -> bool:
    """Pixel shuffles, pixel unshuffles and channel shuffles as exporters write them: Reshape, Transpose, Reshape."""
    x = b.last
    if len(x.shape) < 3:
        return False
    n, c, *space = x.shape
    rank, kind = len(space), b.choose("shuffle", "unshuffle", "channels")
    if kind == "channels":
        group = b.choose(*(g for g in range(1, c + 1) if c % g == 0))
        inner, perm = [n, group, c // group, *space], [0, 2, 1, *range(3, 3 + rank)]
        outer = list(x.shape)
    elif kind == "shuffle":
        up = [b.integer(1, 2) for _ in space]
        if c % math.prod(up):
            return False
        inner = [n, c // math.prod(up), *up, *space]
        perm = [0, 1, *(a for i in range(rank) for a in (2 + rank + i, 2 + i))]
        outer = [n, c // math.prod(up), *(m * f for m, f in zip(space, up, strict=True))]
    else:
        down = [b.choose(*(f for f in (1, 2, 3) if m % f == 0)) for m in space]
        inner = [n, c, *(v for m, f in zip(space, down, strict=True) for v in (m // f, f))]
        perm = [0, 1, *(3 + 2 * i for i in range(rank)), *(2 + 2 * i for i in range(rank))]
        outer = [n, c * math.prod(down), *(m // f for m, f in zip(space, down, strict=True))]
    return (b.add("Reshape", [x, np.array(inner, np.int64)]) and b.add("Transpose", [b.values[-1]], {"perm": perm})
            and b.add("Reshape", [b.values[-1], np.array(outer, np.int64)]))


@draws("Flatten", exact=True)
def flatten(b: Builder) -> bool:
    x = b.last
    return b.add("Flatten", [x], {"axis": b.integer(0, len(x.shape))})


@draws("Squeeze", "Unsqueeze", exact=True)
def squeeze(b: Builder) -> bool:
    op, x = b.op("Squeeze", "Unsqueeze"), b.any if b.integer(0, 4) == 0 else b.last
    if op == "Squeeze":
        ones = [a for a, n in enumerate(x.shape) if n == 1]
        if not ones and not b.add("Unsqueeze", *unsqueezed(b, x, [b.integer(0, len(x.shape))])):
            return False
        x = x if ones else b.values[-1]
        ones = [a for a, n in enumerate(x.shape) if n == 1]
        axes = sorted(b.draw(st.sets(st.sampled_from(ones), min_size=1)))
        return len(axes) < len(x.shape) and b.add(op, *unsqueezed(b, x, [b.signed(a, x) for a in axes]))
    count = b.integer(1, 2)
    places = b.draw(st.sets(st.integers(0, len(x.shape) + count - 1), min_size=count, max_size=count))
    return len(x.shape) + count <= 6 and b.add(op, *unsqueezed(b, x, sorted(places)))


def unsqueezed(b: Builder, x: Value, axes: list[int]) -> tuple[list[Value | Array], dict[str, list[int]]]:
    """Inputs and attributes, the axes where the opset has them."""
    return ([x], {"axes": axes}) if b.opset < 13 else ([x, np.array(axes, np.int64)], {})


@draws("Concat", exact=True)
def concat(b: Builder) -> bool:
    x = b.last
    axis = b.axis(x)
    partners = [v for v in b.values if len(v.shape) == len(x.shape) and v.is_float
                and v.shape[:axis] + v.shape[axis + 1 :] == x.shape[:axis] + x.shape[axis + 1 :]]
    parts: list[Value | Array] = [x, *(b.choose(*partners) for _ in range(b.integer(1, 2)))]
    if b.integer(0, 3) == 0:
        parts.append(b.data(*x.shape[:axis], b.integer(1, 3), *x.shape[axis + 1 :]))
    return b.add("Concat", parts, {"axis": b.signed(axis, x)})


@draws("Split", exact=True)
def split(b: Builder) -> bool:
    x = b.last
    axis = b.axis(x)
    n, count = x.shape[axis], b.integer(1, 3)
    if n < count:
        return False
    signed = b.signed(axis, x)
    if b.flag():
        size = -(-n // count) if b.opset >= 18 else n // count
        if size * (count - 1) >= n or (b.opset < 18 and n % count):
            return False
        return b.add("Split", [x], {"axis": signed, "num_outputs": count if b.opset >= 18 else None}, count)
    inner = b.draw(st.sets(st.integers(1, max(1, n - 1)), min_size=count - 1, max_size=count - 1)) if count > 1 else []
    places = [0, *sorted(inner), n]
    sizes = [high - low for low, high in itertools.pairwise(places)]
    if b.opset < 13:
        return b.add("Split", [x], {"axis": signed, "split": sizes}, count)
    return b.add("Split", [x, np.array(sizes, np.int64)], {"axis": signed}, count)


@draws("Slice", exact=True)
def slice_(b: Builder) -> bool:
    x = b.any if b.integer(0, 4) == 0 else b.last
    if not x.shape:
        return False
    axes = sorted(b.draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1, max_size=2)))
    starts, ends, steps = [], [], []
    for axis in axes:
        n = x.shape[axis]
        step = b.choose(1, 1, 1, 2, 3, -1, -2, -5) if b.opset >= 10 else 1
        low, high = sorted((b.integer(0, n), b.integer(0, n)))
        if low == high:
            return False
        far = high == n and b.flag()
        starts.append(low if step > 0 else high - 1)
        ends.append((2**31 - 1 if far else high) if step > 0 else low - 1 - n)
        steps.append(step)
    if b.opset < 10:
        return b.add("Slice", [x], {"axes": axes, "starts": starts, "ends": ends})
    signed = [b.signed(a, x) for a in axes]
    return b.add("Slice", [x, *(np.array(v, np.int64) for v in (starts, ends, signed, steps))])


@draws("Pad", exact=True)
def pad(b: Builder) -> bool:
    x = b.last
    mode = b.choose("constant", "reflect", "edge", *(["wrap"] if b.opset >= 19 else []))
    lows, highs = [], []
    for n in x.shape:
        most = {"reflect": n - 1, "wrap": n}.get(mode, 3)
        touched = b.integer(0, 2) != 0
        lo, hi = (b.integer(-min(2, n - 1), min(3, most)) if touched else 0 for _ in range(2))
        left = n + min(lo, 0) + min(hi, 0)
        if left < 1 or max(lo, hi) > {"reflect": left - 1, "wrap": left}.get(mode, 3):
            return False
        lows.append(lo)
        highs.append(hi)
    if b.opset < 11:
        return b.add("Pad", [x], {"mode": mode, "pads": lows + highs, "value": 1.0})
    value = np.array(1.0, np.float32) if b.flag() else None
    if b.opset < 18 or b.flag():
        return b.add("Pad", [x, np.array(lows + highs, np.int64), value], {"mode": mode})
    axes = [a for a in range(len(x.shape)) if lows[a] or highs[a]] or [0]
    axes = list(b.draw(st.permutations(axes)))
    amounts = np.array([lows[a] for a in axes] + [highs[a] for a in axes], np.int64)
    return b.add("Pad", [x, amounts, value, np.array([b.signed(a, x) for a in axes], np.int64)], {"mode": mode})


@draws("Expand", exact=True)
def expand(b: Builder) -> bool:
    x = b.last
    shape = [b.integer(1, 4) if n == 1 and b.flag() else b.choose(1, n) for n in x.shape]
    front = [b.integer(1, 3) for _ in range(b.integer(0, 1))] if len(x.shape) < 5 else []
    left_out = 0 if front else b.integer(0, len(shape) - 1)
    return b.add("Expand", [x, np.array([*front, *shape][left_out:], np.int64)])


@draws("Tile", exact=True)
def tile(b: Builder) -> bool:
    x = b.last
    return b.add("Tile", [x, np.array([b.choose(1, 1, 2, 3) for _ in x.shape], np.int64)])


@draws("DepthToSpace", "SpaceToDepth", exact=True)
def blocks(b: Builder) -> bool:
    op, x = b.op("DepthToSpace", "SpaceToDepth"), b.last
    if len(x.shape) != 4:
        return False
    size = b.choose(1, 2, 3)
    c, space = x.shape[1], x.shape[2:]
    if op == "DepthToSpace":
        if c % size**2 and not b.add("Tile", [x, np.array([1, size**2, 1, 1], np.int64)]):
            return False
        mode = b.choose("DCR", "CRD") if b.opset >= 11 else None
        return b.add(op, [b.values[-1] if c % size**2 else x], {"blocksize": size, "mode": mode})
    if any(m % size for m in space) and not b.add("Tile", [x, np.array([1, 1, size, size], np.int64)]):
        return False
    return b.add(op, [b.values[-1] if any(m % size for m in space) else x], {"blocksize": size})


@draws("Col2Im")
def col2im(b: Builder) -> bool:
    """Every cell as a block of equal cells."""
    x = b.last
    if b.style.integers or not b.op("Col2Im") or len(x.shape) != 4:
        return False
    block, strides, dilations = ([b.integer(1, most) for _ in x.spatial] for most in (3, 3, 2))
    pads = [b.integer(0, 1) for _ in range(4)]
    image = [(n - 1) * s + (k - 1) * d + 1 - lo - hi for n, k, s, d, lo, hi in zip(
        x.shape[2:], block, strides, dilations, pads[:2], pads[2:], strict=True)]
    count = math.prod(block)
    if min(image) < 1 or math.prod((*x.shape[:2], *image)) * count > 20000:
        return False
    if not b.add("Tile", [x, np.array([1, count, 1, 1], np.int64)]):
        return False
    if not b.add("Reshape", [b.values[-1], np.array([x.shape[0], x.shape[1] * count, -1], np.int64)]):
        return False
    return b.add("Col2Im", [b.values[-1], np.array(image, np.int64), np.array(block, np.int64)],
                 {"strides": strides, "pads": pads, "dilations": dilations})


@draws("CenterCropPad", exact=True)
def center_crop_pad(b: Builder) -> bool:
    x = b.last
    axes = sorted(b.draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1, max_size=3)))
    whole = b.integer(0, 3) == 0
    axes = list(range(len(x.shape))) if whole else axes
    extents = np.array([max(1, x.shape[a] + b.integer(-3, 3)) for a in axes], np.int64)
    given = None if whole else [b.signed(a, x) for a in axes]
    return bool(b.op("CenterCropPad")) and b.add("CenterCropPad", [x, extents], {"axes": given})


@draws("Trilu", "EyeLike", exact=True)
def diagonal(b: Builder) -> bool:
    op = b.op("Trilu", "EyeLike")
    x = b.choose(*(v for v in b.values if v.shape and v.is_float)) if op == "EyeLike" else b.last
    if op == "Trilu":
        diagonals = [np.array(b.integer(-4, 4), np.int64)] if b.flag() else []
        return len(x.shape) > 1 and b.add(op, [x, *diagonals], {"upper": b.integer(0, 1)})
    if len(x.shape) != 2 and not b.add("Flatten", [x], {"axis": b.integer(1, len(x.shape))}):
        return False
    x = x if len(x.shape) == 2 else b.values[-1]
    return b.add(op, [x], {"k": b.integer(-3, 3)})


@draws("ReverseSequence", exact=True)
def reverse_sequence(b: Builder) -> bool:
    x = b.last
    if len(x.shape) < 2 or not b.op("ReverseSequence"):
        return False
    batch = b.integer(0, 1)
    lengths = b.whole_data(np.int64, x.shape[batch], low=1, high=x.shape[1 - batch] + 1)
    given = b.feed_array(lengths) if b.flag() else lengths
    return b.add("ReverseSequence", [x, given], {"batch_axis": batch, "time_axis": 1 - batch})


@draws("Compress", exact=True)
def compress(b: Builder) -> bool:
    x = b.last
    if b.integer(0, 5) == 0:
        return b.add("Compress", [x, b.whole_data(bool, math.prod(x.shape))])
    axis = b.axis(x)
    chosen = b.whole_data(bool, b.integer(1, x.shape[axis]))
    return b.add("Compress", [x, chosen], {"axis": b.signed(axis, x)})
