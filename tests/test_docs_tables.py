"""The tables of the docs are those of the code: maps, node types, layouts, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from partitioner import dialect
from partitioner.layout import parse_layout
from partitioner.maps import AxisMap
from tests.examples import one_graph

DOCS = Path(__file__).parent.parent / "docs"


def cells(page: str, head: str) -> list[list[str]]:
    """The rows of the table whose first line begins with `| head |`."""
    lines = iter((DOCS / page).read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {head} |"))
    next(lines)
    rows: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def code_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_map_is_described() -> None:
    def concrete(cls: type[AxisMap]) -> set[str]:
        return {cls.__name__, *(name for sub in cls.__subclasses__() for name in concrete(sub))}

    assert {code_of(row[0])[0] for row in cells("architecture.md", "map")} == concrete(AxisMap) - {"AxisMap"}


def test_node_types_and_attributes_are_those_of_the_dialect() -> None:
    rows = cells("plan-format.md", "node")
    kinds = {"sum", "prod", "max", "min", "moments"}
    told = {code_of(row[0])[0]: {name for name in code_of(row[3]) if name not in kinds} for row in rows}
    known = {name: {a.name for a in build(name, 18).attributes.values()} for name, build in dialect.FUNCTIONS.items()}
    assert told == known
    for row in rows:
        function = dialect.FUNCTIONS[code_of(row[0])[0]]("f", 18)
        assert len(row[1].split(",")) == len(function.inputs) and len(row[2].split(",")) == len(function.outputs)


def test_metadata_keys_are_those_of_the_dialect() -> None:
    keys = {value for name, value in vars(dialect).items() if name.startswith("_") and name.isupper()
            and isinstance(value, str)}
    told = set(re.findall(r"`(partitioner\.[a-z]+)`", (DOCS / "plan-format.md").read_text()))
    assert told == keys


def test_layouts_parse_and_print_as_told() -> None:
    rows = cells("plan-format.md", "layout")
    assert len(rows) > 5
    for row in rows:
        (text,) = code_of(row[0])
        assert str(parse_layout(text)) == text


FLOAT, FEW = np.zeros((2, 3, 6, 6), np.float32), np.zeros((2, 3), np.float32)
INPUTS = {
    "x": FLOAT, "few": FEW, "v": np.zeros(3, np.float32), "where": np.zeros(4, np.int64), "k": np.zeros(1, np.int64),
    "volume": np.zeros((1, 1, 4, 4, 4), np.float32), "grid": np.zeros((1, 2, 2, 2, 3), np.float32),
    "ints": FLOAT.astype(np.int32), "bytes": FEW.astype(np.uint8), "row": np.zeros(3, np.uint8),
    "blocks": FLOAT.reshape(1, 6, -1)[:, :, :6],
    "image": FLOAT.astype(np.uint8), "mask": np.zeros(2, bool), "axis": np.zeros((), np.int64),
}
CONSTANTS = {
    "true": np.asarray(True), "sizes": np.array([2, 3, 9, 9]), "sizes5": np.array([1, 1, 9, 9, 9]),
    "eight": np.array([8]), "two": np.array([2]),
    "s": np.float32(1), "z": np.uint8(0), "w": np.zeros((2, 3, 1, 1), np.uint8), "square": np.zeros((3, 3), np.uint8),
}
QUANTISED = ["v", "z", "w", "s", "z", "s", "z"]
REFUSED = {
    "Conv": helper.make_node("Conv", ["few", "few"], ["y"]),
    "ConvTranspose": helper.make_node("ConvTranspose", ["few", "few"], ["y"]),
    "ConvInteger": helper.make_node("ConvInteger", ["bytes", "bytes"], ["y"]),
    "MaxPool": helper.make_node("MaxPool", ["few"], ["y"], kernel_shape=[2]),
    "AveragePool": helper.make_node("AveragePool", ["few"], ["y"], kernel_shape=[2]),
    "LpPool": helper.make_node("LpPool", ["few"], ["y"], kernel_shape=[2]),
    "BatchNormalization": helper.make_node("BatchNormalization", ["x", *["v"] * 4], ["y", "m", "s2"], training_mode=1),
    "Dropout": helper.make_node("Dropout", ["x", "", "true"], ["y"]),
    "InstanceNormalization": helper.make_node("InstanceNormalization", ["few", "v", "v"], ["y"]),
    "GroupNormalization": helper.make_node("GroupNormalization", ["few", "v", "v"], ["y"], num_groups=3),
    "GlobalLpPool": helper.make_node("GlobalLpPool", ["few"], ["y"]),
    "Resize": helper.make_node("Resize", ["volume", "", "", "sizes5"], ["y"], mode="cubic"),
    "Resize, integers": helper.make_node("Resize", ["ints", "", "", "sizes"], ["y"], mode="linear"),
    "Resize, data": helper.make_node("Resize", ["x", "", "", "where"], ["y"]),
    "Col2Im": helper.make_node("Col2Im", ["blocks", "eight", "two"], ["y"], dilations=[2]),
    "GridSample": helper.make_node("GridSample", ["volume", "grid"], ["y"], mode="bicubic"),
    "QuantizeLinear": helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], precision=1),
    "QuantizeLinear, float8": helper.make_node("QuantizeLinear", ["x", "s"], ["y"],
                                               output_dtype=TensorProto.FLOAT8E4M3FN),
    "QuantizeLinear, 4 bits": helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=TensorProto.INT4),
    "QLinearConv": helper.make_node("QLinearConv", ["image", *QUANTISED], ["y"]),
    "QLinearMatMul": helper.make_node("QLinearMatMul", ["bytes", "v", "z", "square", "s", "z", "s", "z"], ["y"]),
    "MatMulInteger": helper.make_node("MatMulInteger", ["bytes", "row"], ["y"]),
    "FusedMatMul": helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft", transBatchA=1),
    "Cast": helper.make_node("Cast", ["x"], ["y"], to=TensorProto.COMPLEX64),
    "Slice": helper.make_node("Slice", ["x", "where", "where"], ["y"]),
    "Pad": helper.make_node("Pad", ["x", "where"], ["y"]),
    "Reshape": helper.make_node("Reshape", ["x", "where"], ["y"]),
    "Expand": helper.make_node("Expand", ["x", "where"], ["y"]),
    "Tile": helper.make_node("Tile", ["x", "where"], ["y"]),
    "TopK": helper.make_node("TopK", ["x", "k"], ["y", "i"]),
    "CumSum": helper.make_node("CumSum", ["x", "axis"], ["y"]),
    "OneHot": helper.make_node("OneHot", ["ints", "axis", "sizes"], ["y"]),
    "Trilu": helper.make_node("Trilu", ["x", "axis"], ["y"]),
    "Compress": helper.make_node("Compress", ["x", "mask"], ["y"], axis=0),
}
"""At least one node per line of the table of what operators with a rule refuse."""

REFUSED_WHOLE = {
    "RandomNormalLike": helper.make_node("RandomNormalLike", ["x"], ["y"]),
    "RandomUniformLike": helper.make_node("RandomUniformLike", ["x"], ["y"]),
    "Bernoulli": helper.make_node("Bernoulli", ["x"], ["y"]),
    "Multinomial": helper.make_node("Multinomial", ["few"], ["y"]),
    "NonZero": helper.make_node("NonZero", ["x"], ["y"]),
    "Unique": helper.make_node("Unique", ["x"], ["y"]),
    "SequenceConstruct": helper.make_node("SequenceConstruct", ["x"], ["y"]),
    "SplitToSequence": helper.make_node("SplitToSequence", ["x"], ["y"]),
}
"""One node per name in the table of operators that are refused altogether."""


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_WHOLE])
def test_what_the_docs_call_refused_is_refused(name: str) -> None:
    import partitioner as pt

    node = (REFUSED | REFUSED_WHOLE)[name]
    node.name = "the_node"
    given, fixed = ({key: a for key, a in arrays.items() if key in node.input} for arrays in (INPUTS, CONSTANTS))
    nodes, kind, opset = [node], TensorProto.FLOAT, 21 if node.op_type == "QuantizeLinear" else 18
    if name in REFUSED_WHOLE:
        nodes.append(helper.make_node("SequenceLength" if "Sequence" in name else "Size", ["y"], ["n"]))
        kind = TensorProto.INT64
    model = one_graph(nodes, given, fixed, {nodes[-1].output[0]: (kind, ())}, opset, node.domain)
    says = r"the_node(/\w+)? \(\w+\): " if len(nodes) > 1 else rf"the_node \([a-z.]*{node.op_type}\): "
    with pytest.raises(pt.PartitionError, match=says) as caught:
        pt.partition(model)
    assert "correct the file" not in str(caught.value)


def test_every_line_of_what_is_refused_is_tried() -> None:
    for nodes, head in ((REFUSED, "operator | refused"), (REFUSED_WHOLE, "operator | because")):
        told = {name for row in cells("operators.md", head) for name in code_of(row[0])}
        assert told == {name.partition(",")[0] for name in nodes}
