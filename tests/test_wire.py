"""What really goes over the wire, counted at torch.distributed itself, and the bits that arrive.

A `sitecustomize` on the path of the ranks wraps `isend` and `irecv` and writes down every call: the plan's
forecast is held against these, not against our own books.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import partitioner as pt
from partitioner import dialect
from partitioner.files import make_sinks, open_inputs, streamed
from partitioner.geometry import hull
from runtime.feeds import to_numpy
from runtime.rank import FileRef, RunFiles
from runtime.session import PoolRunner
from runtime.transports import Parcel
from runtime.transports.base import as_bytes
from runtime.unfinished import prepared
from tests.command import SHAPE, Array, convolution, model, value, volume
from tests.models import NETWORKS

HOOK = '''
import atexit, importlib.abc, json, os, sys

class Finder(importlib.abc.MetaPathFinder):
    """Wraps torch.distributed's messages as soon as the transport is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "runtime.transports.distributed":
            sys.meta_path.remove(self)
            import torch.distributed as dist
            for call in ("isend", "irecv"):
                setattr(dist, call, counted(call, getattr(dist, call)))
        return None

def counted(call, real):
    def wrapper(tensor, peer, *rest, **more):
        with open(os.path.join(os.environ["WIRE_LOG"], str(os.getpid())), "a") as log:
            log.write(json.dumps([call, dist_rank(), peer, tensor.nbytes]) + "\\n")
        return real(tensor, peer, *rest, **more)
    return wrapper

def dist_rank():
    import torch.distributed as dist
    return dist.get_rank()

sys.meta_path.insert(0, Finder())
'''


@dataclass(frozen=True)
class Message:
    """One call of isend or irecv."""

    call: str
    rank: int
    peer: int
    nbytes: int


class Pool:
    """Processes that serve one plan after the other, and whose messages are written down."""

    def __init__(self, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = folder / "log"
        self.log.mkdir()
        (folder / "sitecustomize.py").write_text(HOOK)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("WIRE_LOG", str(self.log))
        self.size = size
        self.runner = PoolRunner(pt.partition(convolution(), mesh=f"depth={size}").model, "gloo")

    def messages(self) -> list[Message]:
        """What has been sent and received since the last time."""
        lines = [json.loads(line) for path in self.log.iterdir() for line in path.read_text().splitlines()]
        for path in self.log.iterdir():
            path.write_text("")
        return [Message(*line) for line in lines]

    def run(self, plan: pt.Plan, inputs: dict[str, Array]) -> tuple[dict[str, Array], list[Message]]:
        """Results and messages of one run, held against lock-step, the forecast and our own books."""
        assert plan.mesh.size == self.size
        self.runner.switch(plan.model)
        assert self.messages() == []
        found = {name: to_numpy(t) for name, t in self.runner.run_arrays(inputs).items()}
        messages = self.messages()
        expected = plan.run(inputs)
        assert found.keys() == expected.keys()
        assert all(found[n].tobytes() == expected[n].tobytes() for n in expected)
        self.check_books(plan, messages)
        return found, messages

    def check_books(self, plan: pt.Plan, messages: Sequence[Message]) -> None:
        """The forecast, our own books and the calls agree; what is sent is received."""
        calls = {call: [[m.nbytes for m in messages if m.call == call and m.rank == r] for r in plan.mesh]
                 for call in ("isend", "irecv")}
        nbytes, count = [sum(n) for n in calls["isend"]], [len(n) for n in calls["isend"]]
        assert nbytes == plan.cost.sent.ravel().tolist() and count == plan.cost.messages.ravel().tolist()
        assert [sum(n) for n in calls["irecv"]] == plan.cost.received.ravel().tolist()
        report = self.runner.report
        assert report is not None
        assert [(r.sent_bytes, r.messages) for r in report.ranks] == list(zip(nbytes, count, strict=True))
        there = sorted((m.rank, m.peer, m.nbytes) for m in messages if m.call == "isend")
        assert there == sorted((m.peer, m.rank, m.nbytes) for m in messages if m.call == "irecv")


def pool_of(size: int, factory: pytest.TempPathFactory) -> Generator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        found = Pool(factory.mktemp("wire"), size, patch)
    yield found
    found.runner.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pool]:
    yield from pool_of(2, tmp_path_factory)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pool]:
    yield from pool_of(3, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pool]:
    yield from pool_of(4, tmp_path_factory)


# --- the forecast, the books and the calls -----------------------------------------------------------

THREE: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "unet3d-stride-instance": ("depth=3", {}),
    "unet3d-maxpool-batch-trilinear": ("height=3", {"height": (0, 5, 5, 17)}),
    "unet2d-maxpool-instance-bilinear": ("width=3", {"width": (0, 2, 20, 23)}),
    "resnet3d": ("width=3", {}),
    "unet1d-maxpool-none": ("width=3", {"width": (0, 1, 2, 47)}),
}


def test_the_plan_foretells_the_wire(three: Pool, tmp_path: Path) -> None:
    """Halos, all-reduces, gathers, empty and narrow shards: every rank's bytes and messages, and lock-step's bits."""
    kinds: set[str] = set()
    for name, (mesh, cuts) in THREE.items():
        network = NETWORKS[name]
        plan = pt.partition(network.export(tmp_path / f"{name}.onnx"), mesh=mesh, cuts=cuts)
        kinds |= {n.op_type for n in plan.model.graph if dialect.is_communication(n)}
        for seed in (1, 2):
            _, messages = three.run(plan, {"volume": volume(network.shape, seed)})
            assert messages
    assert kinds >= {"HaloExchange", "AllReduceMoments", "AllReduce"}


def test_a_gather_is_counted(three: Pool) -> None:
    """Who wants the flat volume itself gets it whole: every rank sends its part to the two others."""
    nodes = [onnx.helper.make_node("Flatten", ["x"], ["f"]), onnx.helper.make_node("Gemm", ["f", "g"], ["y"])]
    weights = {"g": volume((2 * 7 * 11 * 5, 3))}
    outputs = [value("y", (1, 3)), value("f", (1, 2 * 7 * 11 * 5))]
    plan = pt.partition(model(nodes, [value("x", SHAPE)], outputs, weights), mesh="depth=3")
    assert plan.to_dict()["gathered"]
    _, messages = three.run(plan, {"x": volume()})
    plane = 2 * 11 * 5 * 4
    assert sorted(m.nbytes for m in messages if m.call == "isend") == [2 * plane] * 4 + [3 * plane] * 2


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["depth=4", "depth=2,height=2", "2x1x2", "batch=2,width=2"])
def test_four_ranks(four: Pool, tmp_path: Path, mesh: str) -> None:
    for name in ("unet3d-maxpool-batch-trilinear", "unet3d-stride-instance"):
        network = NETWORKS[name]
        source = network.export(tmp_path / "m.onnx", dynamic=True)
        shape = (2, *network.shape[1:])
        plan = pt.partition(source, mesh=mesh, shapes={"volume": shape})
        four.run(plan, {"volume": volume(shape)})


# --- two ranks: one plane per face, and nothing for axes that are not split --------------------------


def test_a_convolution_moves_one_plane_per_face(two: Pool) -> None:
    """3x3x3 on depth=2: 2 channels x 11 x 5 cells each way, once, and no corners, sides or zeros."""
    plan = pt.partition(convolution(), mesh="depth=2")
    _, messages = two.run(plan, {"x": volume()})
    plane = 2 * 11 * 5 * 4
    assert sorted((m.rank, m.peer, m.nbytes) for m in messages if m.call == "isend") == [(0, 1, plane), (1, 0, plane)]
    (node,) = [n for n in plan.model.graph if dialect.is_exchange(n)]
    layout = dialect.get_layout(node.outputs[0])
    assert [s is not None for s in layout.axes] == [False, False, True, False, False]


FACES = {
    "the whole kernel": ({"pads": [1] * 6}, 3, 1, 1),
    "dilated": ({"pads": [2] * 6, "dilations": [2] * 3}, 3, 2, 2),
    "strided": ({"pads": [1] * 6, "strides": [2] * 3}, 3, 1, 0),
    "flat along the split": ({"pads": [0, 1, 1] * 2}, (1, 3, 3), 0, 0),
    "one cell": ({}, 1, 0, 0),
}


@pytest.mark.parametrize("name", FACES)
def test_only_what_the_kernel_needs_is_moved(two: Pool, name: str) -> None:
    """Planes from the lower to the upper rank and back, for kernels of all kinds."""
    attributes, extent, down, up = FACES[name]
    shape = (1, 2, 12, 7, 5)
    size = (extent,) * 3 if isinstance(extent, int) else extent
    weights = {"w": np.random.default_rng(0).standard_normal((3, 2, *size)).astype(np.float32)}
    conv = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="conv", **attributes)
    plan = pt.partition(model([conv], [value("x", shape)], [value("y", None)], weights), mesh="depth=2")
    _, messages = two.run(plan, {"x": volume(shape)})
    plane = 2 * 7 * 5 * 4
    moved = {(m.rank, m.peer): m.nbytes / plane for m in messages if m.call == "isend"}
    assert moved == {k: n for k, n in {(0, 1): down, (1, 0): up}.items() if n}


@pytest.mark.slow
def test_two_split_axes_move_faces_and_edges(four: Pool) -> None:
    """3x3x3 on depth=2,height=2: every rank sends two faces and one edge."""
    shape = (1, 2, 8, 6, 5)
    _, messages = four.run(pt.partition(convolution(shape), mesh="depth=2,height=2"), {"x": volume(shape)})
    cell = 2 * 5 * 4
    for rank in range(4):
        sizes = sorted(m.nbytes for m in messages if m.call == "isend" and m.rank == rank)
        assert sizes == [cell, 3 * cell, 4 * cell]


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["x.npy", "x.npz", "x.nii", "x.nii.gz"])
def test_files_add_nothing_to_the_wire(two: Pool, tmp_path: Path, source: str) -> None:
    """Every rank reads its own part; a packed file has one reader, whose hand-outs are not the plan's messages."""
    shape = (1, 1, 13, 6, 5)
    array = volume(shape)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    for name in ("x.nii", "x.nii.gz"):
        nibabel.Nifti1Image(array[0, 0], np.eye(4)).to_filename(tmp_path / name)
    plan = pt.partition(convolution(shape), mesh="depth=2")
    two.runner.switch(plan.model)
    path, target = str(tmp_path / source), str(tmp_path / "y.npy")
    sources = open_inputs({"x": path}, {"x": ir.DataType.FLOAT})
    sinks, places = make_sinks(plan, {"y": target}, None)
    two.messages()
    with prepared(sinks.values()):
        two.runner.run_files(RunFiles({"x": FileRef(path)}, streamed(sources), places))
    for opened in sources.values():
        opened.close()
    assert np.array_equal(np.load(target), plan.run({"x": array})["y"])
    two.check_books(plan, two.messages())


def test_a_rank_holds_only_its_part() -> None:
    """The boxes that the ranks load are those of the layout: disjoint, and together the whole."""
    plan = pt.partition(convolution(), mesh="depth=2,width=3")
    layout = dialect.get_layout(plan.model.graph.inputs[0])
    cells = np.zeros(layout.shape, int)
    for rank in plan.mesh:
        box = layout.box(plan.mesh.coordinates(rank))
        cells[tuple(slice(hull(axis).start, hull(axis).stop) for axis in box)] += 1
    assert (cells == 1).all()


@pytest.mark.parametrize("strides", [(1, 1, 1), (7, 5, 3)])
def test_a_message_of_one_cell_is_dense_whatever_its_strides(strides: tuple[int, ...]) -> None:
    """The corner of a 2x2x2 mesh: torch calls it contiguous, but it cannot be flattened by a view."""
    cell = torch.arange(200, dtype=torch.float32).as_strided((1, 1, 1), strides, 42)
    flat = as_bytes(Parcel(0, (cell,)))
    assert flat is not None and flat.view(torch.float32).tolist() == [42.0]
