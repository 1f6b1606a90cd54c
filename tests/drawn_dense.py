"""Matrix products and contractions."""

from __future__ import annotations

import math

from tests.builder import MICROSOFT, Array, Builder, Value, draws


def factor(b: Builder, shape: list[int]) -> Value | Array:
    """A weight, an input or what is there."""
    same = [v for v in b.values if v.is_float and list(v.shape) == shape]
    if same and b.integer(0, 2):
        return b.choose(*same)
    return b.feed(*shape) if b.integer(0, 2) == 0 else b.data(*shape)


@draws("MatMul", f"{MICROSOFT}:FusedMatMul", exact=True)
def matmul(b: Builder) -> bool:
    op, x = b.op("MatMul", "MatMul", f"{MICROSOFT}:FusedMatMul"), b.last
    fused = op != "MatMul"
    if len(x.shape) < 2:
        return not fused and b.add(op, [x, factor(b, [x.shape[0], b.integer(1, 4)])])
    flips = [b.integer(0, 1) if fused else 0 for _ in range(2)]
    left = b.flag()
    front = [n if b.integer(0, 2) else 1 for n in x.shape[:-2]][b.integer(0, len(x.shape) - 2) :]
    rows, columns = x.shape[-2:][:: -1 if flips[0 if left else 1] else 1]
    width = b.integer(1, 4)
    other = [columns, width] if left else [width, rows]
    if flips[1 if left else 0]:
        other.reverse()
    if not fused and b.integer(0, 5) == 0:
        pair = [x, factor(b, [columns])] if left else [factor(b, [rows]), x]
        return len(x.shape) > 2 and b.add(op, pair)
    attributes = {"transA": flips[0], "transB": flips[1], "alpha": 2.0 if b.flag() else 1.0} if fused else None
    pair = [x, factor(b, front + other)]
    return b.add(op, pair if left else pair[::-1], attributes)


@draws("MatMul", exact=True)
def attention(b: Builder) -> bool:
    """The products of attention: x x' over its last axis, and that on x again."""
    x = b.last
    if len(x.shape) < 3 or len(x.shape) > 4:
        return False
    perm = [*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2]
    if not b.add("Transpose", [x], {"perm": perm}) or not b.add("MatMul", [x, b.values[-1]]):
        return False
    if not b.style.integers and not b.add("Softmax", [b.values[-1]], {"axis": len(x.shape) - 1}):
        return False
    return b.add("MatMul", [b.values[-1], x])


@draws("Gemm", exact=True)
def gemm(b: Builder) -> bool:
    x = b.last
    if len(x.shape) != 2:
        if not b.add("Flatten", [x], {"axis": b.integer(1, len(x.shape))}):
            return False
        x = b.values[-1]
    if math.prod(x.shape) > 2500:
        return False
    flips = [b.integer(0, 1), b.integer(0, 1)]
    rows, inner = x.shape[::-1] if flips[0] else x.shape
    columns = b.integer(1, 4)
    other = factor(b, [columns, inner] if flips[1] else [inner, columns])
    biased = b.opset < 11 or b.flag()
    bias = [factor(b, b.choose([columns], [rows, columns], [1, columns], [rows, 1], [1]))] if biased else []
    scale = b.choose(1.0, 2.0, -1.0) if b.style.integers else b.choose(1.0, 0.5)
    return b.add("Gemm", [x, other, *bias], {"transA": flips[0], "transB": flips[1], "alpha": scale,
                                             "beta": b.choose(1.0, 2.0) if bias else None})


@draws("Einsum", exact=True)
def einsum(b: Builder) -> bool:
    """One or two factors; every letter is kept, summed over or both factors'."""
    x = b.last
    if not b.op("Einsum") or len(x.shape) > 5:
        return False
    letters = "abcde"[: len(x.shape)]
    sizes = dict(zip(letters, x.shape, strict=True))
    terms, parts = [letters], [x]
    if b.integer(0, 3):
        shared = [c for c in letters if b.flag()]
        own = ["k"] if b.flag() or not shared else []
        sizes["k"] = b.integer(1, 4)
        second = list(b.draw(_orders([*shared, *own])))
        terms.append("".join(second))
        other = factor(b, [sizes[c] for c in second])
        parts = [x, other]  # type: ignore[list-item]
    used = sorted(set("".join(terms)))
    kept = [c for c in b.draw(_orders(used)) if b.integer(0, 2)]
    if len(kept) < 2:
        return False
    if b.integer(0, 5) == 0 and letters[0] in kept and all(t.startswith(letters[0]) for t in terms):
        rest = [c for c in kept if c != letters[0]]
        return bool(rest) and b.add("Einsum", parts, {"equation": ",".join(
            "..." + t[1:] for t in terms) + "->..." + "".join(rest)})
    return b.add("Einsum", parts, {"equation": ",".join(terms) + "->" + "".join(kept)})


def _orders(letters: list[str]):
    from hypothesis import strategies as st

    return st.permutations(letters)
