"""Indices that are computed from the data, beside data of another type; what is refused; element types."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from partitioner import dialect
from partitioner.errors import PartitionError
from tests.examples import one_graph
from tests.oracle import compile_plan, run_lockstep, run_ort
from tests.test_expand import expanded

Array = np.ndarray
RANDOM = np.random.default_rng(5)


def data(*shape: int, kind: type = np.float32) -> Array:
    return RANDOM.uniform(-2, 2, shape).astype(kind)


def index(high: int, *shape: int) -> Array:
    return RANDOM.integers(-high, high, shape).astype(np.int64)


INDEXED = [
    ("Gather", [data(2, 3, 7, 5), index(7, 4)], {"axis": 2}, (2, 3, 4, 5)),
    ("Gather", [data(2, 3, 7), index(3, 2, 5)], {"axis": 1}, (2, 2, 5, 7)),
    ("Gather", [data(2, 3, 7, kind=np.float16), index(7, 3)], {"axis": -1}, (2, 3, 3)),
    ("GatherElements", [data(2, 3, 7), index(7, 2, 3, 5)], {"axis": 2}, (2, 3, 5)),
    ("GatherND", [data(2, 3, 7, 5), index(3, 2, 4, 2)], {"batch_dims": 1}, (2, 4, 5)),
    ("ScatterElements", [data(2, 3, 7), RANDOM.permutation(7)[None, None, :4].repeat(2, 0).astype(np.int64),
                         data(2, 1, 4)], {"axis": 2}, (2, 3, 7)),
    ("ScatterElements", [data(2, 3, 7), index(7, 2, 3, 9), data(2, 3, 9)], {"axis": 2, "reduction": "max"}, (2, 3, 7)),
    ("ScatterND", [data(2, 3, 7), np.array([[1, 2], [0, 1]]), data(2, 7)], {}, (2, 3, 7)),
    ("Concat", [data(2, 3, 7).astype(np.int32), data(2, 3, 4).astype(np.int32)], {"axis": 2}, (2, 3, 11)),
    ("Tile", [data(1, 2, 5, kind=np.float16), np.array([1, 1, 3])], {}, (1, 2, 15)),
]


@pytest.mark.parametrize("mesh", ["batch=2", "width=2", "width=3", "batch=2,width=2"])
@pytest.mark.parametrize("case", INDEXED, ids=lambda case: f"{case[0]}-{len(case[3])}-{case[1][0].dtype}")
def test_shards_equal_onnxruntime(case: tuple[str, list[Array], dict, tuple[int, ...]], mesh: str) -> None:
    """These operators only choose cells, so every bit is the same."""
    op_type, arrays, attributes, shape = case
    if "batch" in mesh and arrays[0].shape[0] < 2:
        pytest.skip("one sample")
    fed = {f"x{i}": a for i, a in enumerate(arrays) if op_type != "Tile" or i == 0}
    constants = {f"x{i}": a for i, a in enumerate(arrays) if f"x{i}" not in fed}
    node = helper.make_node(op_type, [f"x{i}" for i in range(len(arrays))], ["y"], "node", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
    model = one_graph([node], fed, constants, {"y": (kind, shape)}, 18)
    expected, plan = run_ort(model, fed)["y"], compile_plan(model, mesh)
    assert np.array_equal(run_lockstep(plan, fed).outputs["y"], expected)
    assert np.array_equal(run_ort(expanded(compile_plan(model, mesh)), fed)["y"], expected)


def test_constant_vectors_need_the_cells_that_they_name() -> None:
    """Linear interpolation as torch's exporter writes it for sequences: rows of a grid, nothing is gathered."""
    x, rows = data(2, 3, 7, 6), np.stack(np.meshgrid([0, 0, 1, 2, 3, 3, 4, 6, -1], [5, 3, 1], indexing="ij"), -1)
    nodes = [helper.make_node("Transpose", ["x"], ["t"], "there", perm=[2, 3, 0, 1]),
             helper.make_node("GatherND", ["t", "rows"], ["g"], "gather"),
             helper.make_node("Transpose", ["g"], ["y"], "back", perm=[2, 3, 0, 1])]
    model = one_graph(nodes, {"x": x}, {"rows": rows}, {"y": (TensorProto.FLOAT, (2, 3, 9, 3))}, 18)
    for mesh in ("height=2", "height=3,width=2", "batch=2,width=2"):
        plan = compile_plan(model, mesh)
        assert not any(node.op_type == dialect.RESHARD for node in plan.graph), f"{mesh}: gathered"
        assert np.array_equal(run_lockstep(plan, {"x": x}).outputs["y"], run_ort(model, {"x": x})["y"])
        assert np.array_equal(run_ort(expanded(plan), {"x": x})["y"], run_ort(model, {"x": x})["y"])


ROWS = np.array([8, 0, 0, 3, -2, 4, 5, 6, 7, 8, 1])


@pytest.mark.parametrize(("rows", "local"), [
    (ROWS, True), (np.arange(8, -1, -1), True), (np.arange(9) - 9, True),
    (np.stack([ROWS, np.roll(ROWS, 1)], 1), False)])
def test_elements_by_constant_rows(rows: Array, local: bool) -> None:
    """Rows that are the same for every channel and column need no gather; others do."""
    x = data(2, 3, 9, 4)
    index = np.ascontiguousarray(np.broadcast_to(np.resize(rows.T, (4, len(rows))).T, (2, 2, len(rows), 4)))
    node = helper.make_node("GatherElements", ["x", "rows"], ["y"], "rows", axis=2)
    model = one_graph([node], {"x": x}, {"rows": index}, {"y": (TensorProto.FLOAT, index.shape)}, 13)
    expected = run_ort(model, {"x": x})["y"]
    for mesh, cuts in (("height=2", {}), ("height=3,width=2", {"height": (0, 1, 1, 9)}), ("batch=2,width=2", {})):
        plan = compile_plan(model, mesh, cuts)
        gathered = any(node.op_type == dialect.RESHARD for node in plan.graph)
        assert gathered == (not local and "height" in mesh), mesh
        assert np.array_equal(run_lockstep(plan, {"x": x}).outputs["y"], expected)
        assert np.array_equal(run_ort(expanded(plan), {"x": x})["y"], expected)


def test_patches_by_tables_of_rows_and_columns() -> None:
    """Unfolding as torch's exporters write it: tables of (tap, place) for each axis; the places stay in shards."""
    x, rows = data(1, 2, 9, 8), np.arange(7) + np.arange(3)[:, None]
    columns = np.arange(4) * 2 + np.arange(2)[:, None]
    nodes = [helper.make_node("Gather", ["x", "rows"], ["r"], "rows", axis=2),
             helper.make_node("Gather", ["r", "columns"], ["c"], "columns", axis=4),
             helper.make_node("Transpose", ["c"], ["t"], "turn", perm=[0, 1, 2, 4, 3, 5]),
             helper.make_node("Reshape", ["t", "shape"], ["y"], "flat")]
    constants = {"rows": rows, "columns": columns, "shape": np.array([1, 12, -1])}
    model = one_graph(nodes, {"x": x}, constants, {"y": (TensorProto.FLOAT, (1, 12, 28))}, 18)
    for mesh in ("height=2", "height=3"):
        plan = compile_plan(model, mesh)
        assert not any(node.op_type == dialect.RESHARD for node in plan.graph), f"{mesh}: gathered"
        assert np.array_equal(run_lockstep(plan, {"x": x}).outputs["y"], run_ort(model, {"x": x})["y"])


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize("cell", [0, 4, -1])
def test_one_slice_of_a_volume_is_sent_alone(cell: int, opset: int) -> None:
    x = data(1, 2, 9, 4, 5)
    nodes = [helper.make_node("Gather", ["x", "cell"], ["s"], "slice", axis=2),
             helper.make_node("MaxPool", ["s"], ["y"], "pool", kernel_shape=[2, 2])]
    model = one_graph(nodes, {"x": x}, {"cell": np.array(cell)}, {"y": (TensorProto.FLOAT, (1, 2, 3, 4))}, opset)
    for mesh in ("depth=3", "depth=2,width=2", "depth=2,height=2"):
        plan, found = compile_plan(model, mesh), run_lockstep(compile_plan(model, mesh), {"x": x})
        assert np.array_equal(found.outputs["y"], run_ort(model, {"x": x})["y"])
        assert np.array_equal(run_ort(expanded(plan), {"x": x})["y"], found.outputs["y"])
        ranks = dialect.get_mesh(plan).count("depth")
        assert sum(found.sent) < ranks * x[:, :, 0].nbytes, f"{mesh}: more than a slice for each"


def test_vectors_that_share_an_axis_of_the_result() -> None:
    """The places of single voxels: both indexed axes depend on the one axis of the list."""
    x, places = data(2, 3, 7, 6), np.array([[0, 5], [6, 0], [3, 3], [3, -2], [-7, 1]])
    nodes = [helper.make_node("Transpose", ["x"], ["t"], "there", perm=[2, 3, 0, 1]),
             helper.make_node("GatherND", ["t", "places"], ["y"], "gather")]
    model = one_graph(nodes, {"x": x}, {"places": places}, {"y": (TensorProto.FLOAT, (5, 2, 3))}, 18)
    for mesh in ("height=2", "width=3", "height=2,width=2"):
        found = run_lockstep(compile_plan(model, mesh), {"x": x}).outputs["y"]
        assert np.array_equal(found, run_ort(model, {"x": x})["y"])


REFUSED = [
    ("Gather", [(1, 2, 5)], [np.array([5])], {"axis": 2}, "outside an axis of 5"),
    ("GatherND", [(1, 2, 5)], [np.array([[0, 2]])], {}, "outside an axis of 2"),
    ("Compress", [(1, 2, 5)], [np.zeros(5, bool)], {"axis": 2}, "leaves nothing"),
    ("DepthToSpace", [(1, 6, 5, 3)], [], {"blocksize": 2}, "no multiple of 4"),
    ("SpaceToDepth", [(1, 1, 5, 4)], [], {"blocksize": 2}, "use multiples of 2"),
    ("Expand", [(1, 2, 5)], [np.array([3, 4])], {}, "do not expand"),
    ("Tile", [(1, 2, 5)], [np.array([1, 2])], {}, "repeats do not fit"),
    ("Slice", [(1, 2, 5)], [np.array([0]), np.array([4]), np.array([3])], {}, "axis 3"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_refusals_say_why(case: tuple[str, list[tuple[int, ...]], list[Array], dict, str]) -> None:
    op_type, shapes, rest, attributes, reason = case
    fed = {f"x{i}": data(*shape) for i, shape in enumerate(shapes)}
    constants = {f"c{i}": array for i, array in enumerate(rest)}
    node = helper.make_node(op_type, [*fed, *constants], ["y"], "node", **attributes)
    model = one_graph([node], fed, constants, {"y": (TensorProto.FLOAT, (1,))}, 18)
    with pytest.raises(PartitionError, match=reason):
        compile_plan(model, None)
