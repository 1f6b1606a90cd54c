"""Operators without a rule: onnxruntime computes them on whole tensors."""

from __future__ import annotations

import numpy as np

from tests.builder import Builder, draws

IN_FLOAT32 = frozenset({"GRU", "RNN", "LSTM", "Det"})
"""What onnxruntime computes in float32 only."""

WITHOUT_RULE = (*IN_FLOAT32, "DFT", "RoiAlign")


@draws("GRU", "RNN", "LSTM")
def recurrent(b: Builder) -> bool:
    op, x = b.op("GRU", "RNN", "LSTM"), b.last
    if len(x.shape) != 3 or not b.style.runtime:
        return False
    gates, hidden = {"GRU": 3, "RNN": 1, "LSTM": 4}[op], b.integer(1, 3)
    outputs = b.integer(1, 2)
    weights = [b.data(1, gates * hidden, n) for n in (x.shape[2], hidden)]
    bias = [b.data(1, 2 * gates * hidden)] if b.flag() else []
    direction = "forward"
    return b.add(op, [x, *weights, *bias], {"hidden_size": hidden, "direction": direction}, outputs)


@draws("DFT")
def fourier(b: Builder) -> bool:
    x = b.last
    if not b.op("DFT") or len(x.shape) > 4 or len(x.shape) < 2:
        return False
    if not b.add("Reshape", [x, np.array([*x.shape, 1], np.int64)]):
        return False
    axis = b.integer(1 if len(x.shape) > 1 else 0, len(x.shape) - 1)
    if b.opset < 20:
        return b.add("DFT", [b.values[-1]], {"axis": axis, "onesided": b.integer(0, 1)})
    return b.add("DFT", [b.values[-1], None, np.array(axis, np.int64)], {"onesided": b.integer(0, 1)})


@draws("RoiAlign")
def regions(b: Builder) -> bool:
    x = b.last
    if not b.op("RoiAlign") or len(x.shape) != 4 or b.opset < 16:
        return False
    count = b.integer(1, 3)
    corners = b.random.uniform(0, 3, (count, 2))
    boxes = np.concatenate([corners, corners + b.random.uniform(1, 4, (count, 2))], 1).astype(np.float32)
    batch = b.whole_data(np.int64, count, low=0, high=x.shape[0])
    given = b.feed_array(boxes) if b.flag() else boxes
    return b.add("RoiAlign", [x, given, batch], {"output_height": b.integer(1, 3), "output_width": b.integer(1, 3),
                                                 "sampling_ratio": 2, "mode": "avg"})


@draws("Det")
def determinant(b: Builder) -> bool:
    x = b.last
    if not b.style.runtime or len(x.shape) < 3:
        return False
    size = min(x.shape[-2:])
    cut = [np.array([v, v], np.int64) for v in (0, size)]
    if not b.add("Slice", [x, *cut, np.array([-2, -1], np.int64)] if b.opset >= 10 else [x],
                 None if b.opset >= 10 else {"starts": [0, 0], "ends": [size, size],
                                             "axes": [len(x.shape) - 2, len(x.shape) - 1]}):
        return False
    return b.add("Det", [b.values[-1]])
