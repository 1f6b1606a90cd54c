"""The plan as a file: what is written is what is read, and what was altered is refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import partitioner as pt
from partitioner import dialect, seal
from tests.command import SHAPE, check_message, convolution, kernel, model, refused, value, volume, works
from tests.models import NETWORKS

Alteration = Callable[[onnx.ModelProto], None]
NETWORK = NETWORKS["unet3d-stride-instance"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net with instance norms."""
    return NETWORK.export(tmp_path_factory.mktemp("plan") / "unet.onnx")


@pytest.fixture(scope="module")
def plan_path(source: Path) -> Path:
    """Its plan for four ranks."""
    pt.partition(source, mesh="depth=2,height=2").save(source.with_name("unet.plan.onnx"))
    return source.with_name("unet.plan.onnx")


# --- there and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mesh", "cuts"), [
    ("depth=2,height=2", {}), ("width=3", {"width": (0, 2, 2, 11)}), ("depth=5,height=1,width=2", {}), (None, {}),
])
def test_a_plan_survives_the_file(source: Path, tmp_path: Path, mesh: str, cuts: dict[str, tuple[int, ...]]) -> None:
    plan = pt.partition(source, mesh=mesh, cuts=cuts)
    plan.save(tmp_path / "p.onnx")
    again = pt.load(tmp_path / "p.onnx")
    x = {"volume": volume(NETWORK.shape)}
    assert np.array_equal(again.run(x)["logits"], plan.run(x)["logits"])
    assert again.to_dict() == plan.to_dict()
    assert again.report() == plan.report()
    assert again.to_text() == plan.to_text()
    assert str(again.mesh) == str(plan.mesh) and again.input_shapes == plan.input_shapes
    again.save(tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "p.onnx").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["p.onnx", "q.onnx"]


def test_saving_leaves_the_plan_as_it_is(source: Path, tmp_path: Path) -> None:
    plan = pt.partition(source, mesh="depth=2")
    before = plan.to_text()
    plan.save(tmp_path / "p.onnx")
    assert plan.to_text() == before and dialect.get_digest(plan.model) is None


@pytest.mark.parametrize("mesh", [None, "depth=2,height=2", "4x1x3"])
def test_the_file_is_onnx_for_everybody(source: Path, tmp_path: Path, mesh: str) -> None:
    pt.partition(source, mesh=mesh).save(tmp_path / "p.onnx")
    onnx.checker.check_model(str(tmp_path / "p.onnx"), full_check=True)
    x = {"volume": volume(NETWORK.shape)}
    found, expected = (onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(None, x)[0]
                       for p in (tmp_path / "p.onnx", source))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_same_model_gives_the_same_file(source: Path, tmp_path: Path) -> None:
    for name in "pq":
        pt.partition(source, mesh="depth=2,width=2").save(tmp_path / name)
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()


def test_any_suffix_will_do(source: Path, tmp_path: Path) -> None:
    """onnx guesses another format from .json and the like; a plan is always binary."""
    plan = pt.partition(source, mesh="depth=2")
    for name in ("p.json", "p.textproto", "p.txt", "p"):
        plan.save(tmp_path / name)
        assert pt.load(tmp_path / name).mesh.size == 2


def test_other_tools_may_add_to_a_plan(plan_path: Path, tmp_path: Path) -> None:
    """Annotations, documentation and functions are not part of what is sealed."""
    found = onnx.load(plan_path)
    found.doc_string = "seen by a tool"
    found.graph.doc_string = "and again"
    found.graph.node[3].doc_string = "a node"
    found.graph.node[3].metadata_props.add(key="tool.note", value="7")
    found.metadata_props.add(key="tool.name", value="viewer")
    del found.functions[:]
    onnx.save(found, tmp_path / "p.onnx")
    again = pt.load(tmp_path / "p.onnx")
    x = {"volume": volume(NETWORK.shape)}
    assert np.array_equal(again.run(x)["logits"], pt.load(plan_path).run(x)["logits"])
    onnx.checker.check_model(ir.to_proto(again.model), full_check=True)


# --- what a plan is, and is not ----------------------------------------------------------------------


def test_a_model_is_no_plan_and_a_plan_no_model(source: Path, plan_path: Path) -> None:
    with pytest.raises(pt.PartitionError, match=r"unet\.onnx: is no plan; make one with `partition compile`"):
        pt.load(source)
    for given in (plan_path, onnx.load(plan_path), ir.load(plan_path), pt.load(plan_path).model):
        with pytest.raises(pt.PartitionError, match=r"is a plan already; load it with pt\.load"):
            pt.partition(given, mesh="depth=2")
    with pytest.raises(pt.PartitionError, match="no such file"):
        pt.load(plan_path.with_name("none.onnx"))


def test_a_plan_keeps_its_mesh_and_extents(plan_path: Path) -> None:
    for mesh in ("depth=2,height=2", "2x2", "2x2x1", "height=2,depth=2,width=1"):
        assert works("plan", plan_path, "--mesh", mesh)
    for mesh in ("depth=2", "4x1x1", "2x2x2"):
        assert f"is a plan for the mesh depth=2,height=2, not {mesh}" in refused("plan", plan_path, "--mesh", mesh)
    assert works("plan", plan_path, "--shape", "1x1x13x17x11")
    assert "is for inputs volume=1x1x13x17x11, not volume=1x1x15x17x11" in refused(
        "plan", plan_path, "--shape", "1x1x15x17x11")
    assert "cuts of its own" in refused("plan", plan_path, "--cuts", "depth=4")
    assert "been through all passes" in refused("compile", plan_path, "-o", plan_path, "--dump-dir", "dump")


def test_the_short_mesh_of_an_image(tmp_path: Path) -> None:
    onnx.save(convolution((1, 2, 9, 8)), tmp_path / "m.onnx")
    works("compile", tmp_path / "m.onnx", "--mesh", "2x2", "-o", tmp_path / "p.onnx")
    for mesh in ("2x2", "height=2,width=2"):
        assert works("plan", tmp_path / "p.onnx", "--mesh", mesh)


def test_a_loaded_plan_refuses_another_shape(plan_path: Path) -> None:
    with pytest.raises(pt.PartitionError, match="is for inputs volume=1x1x13x17x11, not volume=1x1x9x9x9; partition"):
        pt.load(plan_path).run({"volume": volume((1, 1, 9, 9, 9))})


def test_a_dump_after_the_last_pass_is_a_plan(source: Path, tmp_path: Path) -> None:
    plan = pt.partition(source, mesh="depth=2", dump_dir=tmp_path)
    names = sorted(os.listdir(tmp_path))
    assert [n.split("-", 1)[1].removesuffix(".onnx") for n in names] == plan.to_dict()["passes"]
    assert pt.load(tmp_path / names[-1]).to_text() == plan.to_text()
    with pytest.raises(pt.PartitionError, match="damaged"):
        pt.load(tmp_path / next(n for n in names if "insert-reshards" in n))


# --- what was altered --------------------------------------------------------------------------------


def metadata(key: str, text: str | None) -> Alteration:
    def alter(found: onnx.ModelProto) -> None:
        (entry,) = [p for p in found.metadata_props if p.key == f"partitioner.{key}"]
        if text is None:
            found.metadata_props.remove(entry)
        else:
            entry.value = text

    return alter


def layouts(old: str, new: str) -> Alteration:
    """Another layout, of the first value that has this one."""
    def alter(found: onnx.ModelProto) -> None:
        for v in (*found.graph.input, *found.graph.value_info, *found.graph.output):
            for entry in v.metadata_props:
                if entry.key == "partitioner.layout" and old in entry.value:
                    entry.value = entry.value.replace(old, new)
                    return
        raise AssertionError(old)

    return alter


def without(op_type: str) -> Alteration:
    """The first node of a type left out, its readers reading what it read."""
    def alter(found: onnx.ModelProto) -> None:
        gone = next(n for n in found.graph.node if n.op_type == op_type)
        instead = dict(zip(gone.output, gone.input, strict=True))
        for node in found.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = instead.get(name, name)
        found.graph.node.remove(gone)

    return alter


def attribute(op_type: str, name: str, change: Callable[[onnx.AttributeProto], None]) -> Alteration:
    def alter(found: onnx.ModelProto) -> None:
        node = next(n for n in found.graph.node if n.op_type == op_type)
        change(next(a for a in node.attribute if a.name == name))

    return alter


def version(number: int) -> Alteration:
    def alter(found: onnx.ModelProto) -> None:
        next(o for o in found.opset_import if o.domain == dialect.DOMAIN).version = number

    return alter


def no_domain(found: onnx.ModelProto) -> None:
    found.opset_import.remove(next(o for o in found.opset_import if o.domain == dialect.DOMAIN))


def no_layout(found: onnx.ModelProto) -> None:
    del found.graph.input[0].metadata_props[:]


def no_partial(found: onnx.ModelProto) -> None:
    del next(n for n in found.graph.node if n.op_type == "Moments").metadata_props[:]


def another_extent(found: onnx.ModelProto) -> None:
    found.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 15


def an_open_extent(found: onnx.ModelProto) -> None:
    found.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "D"


def an_unknown_message(found: onnx.ModelProto) -> None:
    next(n for n in found.graph.node if n.op_type == "HaloExchange").op_type = "Teleport"


def a_weight(found: onnx.ModelProto) -> None:
    data = bytearray(found.graph.initializer[0].raw_data)
    data[1] ^= 16
    found.graph.initializer[0].raw_data = bytes(data)


def swapped_inputs(found: onnx.ModelProto) -> None:
    node = next(n for n in found.graph.node if n.op_type == "Concat")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def set_ints(*numbers: int) -> Callable[[onnx.AttributeProto], None]:
    def change(found: onnx.AttributeProto) -> None:
        found.ints[:] = numbers

    return change


def set_float(number: float) -> Callable[[onnx.AttributeProto], None]:
    def change(found: onnx.AttributeProto) -> None:
        found.f = number

    return change


def set_text(text: str) -> Callable[[onnx.AttributeProto], None]:
    def change(found: onnx.AttributeProto) -> None:
        found.s = text.encode()

    return change


def no_strings(found: onnx.AttributeProto) -> None:
    del found.strings[:]


DEPTH = "depth(0|7|13)"
ALTERED: dict[str, tuple[Alteration, str]] = {
    "another version": (version(2), "is a plan of format 2, this program reads format 1; compile the model again"),
    "an older version": (version(0), "is a plan of format 0"),
    "no version": (no_domain, "its format is not named"),
    "no mesh": (metadata("mesh", None), "a plan that has lost its metadata"),
    "no axes": (metadata("mesh", ""), "volume has 2 shards along depth=1"),
    "an unknown mesh": (metadata("mesh", "x"), "mesh 'x' is not understood"),
    "a larger mesh": (metadata("mesh", "depth=2,height=3"), "volume has 2 shards along height=3"),
    "one more axis": (metadata("mesh", "depth=2,height=2,width=2"), "not as it was written"),
    "no such axis": (metadata("mesh", "deep=2"), "'deep' is unknown"),
    "no ranks": (metadata("mesh", "depth=0,height=2"), "from 1"),
    "another storage": (metadata("storage", "channels_first"), "not as it was written"),
    "other passes": (metadata("passes", "none"), "not as it was written"),
    "no digest": (metadata("digest", None), "not as it was written"),
    "another digest": (metadata("digest", "0" * 32), "not as it was written"),
    "a layout of nothing": (layouts("[", "x"), "layout"),
    "an empty layout": (layouts(f"[1, 1, {DEPTH}, height(0|9|17), 11]", ""), "layout"),
    "half a layout": (layouts("11]", "11"), "layout"),
    "shards that overlap": (layouts(DEPTH, "depth(0:8 7:13)"), "overlap or leave cells out"),
    "shards with a gap": (layouts(DEPTH, "depth(0:6 7:13)"), "overlap or leave cells out"),
    "shards that are too long": (layouts(DEPTH, "depth(0|7|14)"), ""),
    "a cut that moved": (layouts(DEPTH, "depth(0|6|13)"), ""),
    "a shard too many": (layouts(DEPTH, "depth(0|7|9|13)"), "3 shards along depth=2"),
    "a negative cut": (layouts(DEPTH, "depth(-7|7|13)"), "cuts must ascend from 0"),
    "another mesh axis": (layouts("depth", "width"), ""),
    "another rank": (layouts("[1, ", "[1, 1, "), ""),
    "no layout": (no_layout, "volume has no layout"),
    "no halo exchange": (without("HaloExchange"), "needs volume as"),
    "no all-reduce": (without("AllReduceMoments"), "is partial, but not only all-reduces use it"),
    "an all-reduce over nothing": (attribute("AllReduceMoments", "mesh_axes", no_strings), "not as it was written"),
    "an all-reduce of another kind": (attribute("AllReduceMoments", "op", set_text("sum")), "not as it was written"),
    "a message in other words": (attribute("HaloExchange", "target", set_text("[x]")), "not as it was written"),
    "an unknown message": (an_unknown_message, "is unknown"),
    "no partial results": (no_partial, "reduces over sharded axes in one node"),
    "other extents": (another_extent, "overlap or leave cells out"),
    "open extents": (an_open_extent, ""),
    "other pads": (attribute("Conv", "pads", set_ints(0, 0, 0, 0, 0, 0)), "by its map"),
    "another slope": (attribute("LeakyRelu", "alpha", set_float(0.5)), "not as it was written"),
    "another weight": (a_weight, "not as it was written"),
    "swapped inputs": (swapped_inputs, "not as it was written"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_plan_is_refused(plan_path: Path, tmp_path: Path, name: str) -> None:
    alter, says = ALTERED[name]
    found = onnx.load(plan_path)
    alter(found)
    onnx.save(found, tmp_path / "p.onnx")
    with pytest.raises(pt.PartitionError, match=r"\A[^\n]*p\.onnx: [^\n]*\Z") as caught:
        pt.load(tmp_path / "p.onnx")
    assert says in str(caught.value)
    if name not in ("no mesh", "another version", "an older version"):
        assert "the plan is damaged (" in str(caught.value)


@pytest.mark.parametrize("name", ["no halo exchange", "another version", "no mesh", "another weight"])
def test_every_command_refuses_it(plan_path: Path, tmp_path: Path, name: str) -> None:
    found = onnx.load(plan_path)
    ALTERED[name][0](found)
    onnx.save(found, tmp_path / "p.onnx")
    np.save(tmp_path / "x.npy", volume(NETWORK.shape))
    for command in (["plan"], ["compile", "-o", tmp_path / "q.onnx"], ["verify"],
                    ["run", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"]):
        assert "p.onnx: " in refused(*command, tmp_path / "p.onnx")
    assert sorted(os.listdir(tmp_path)) == ["p.onnx", "x.npy"]


def check_flips(path: Path, rounds: int, seed: int) -> None:
    """Whatever bits are flipped: refused in one line, or the plan is still the same."""
    whole, source = path.read_bytes(), random.Random(seed)
    digest = dialect.get_digest(pt.load(path).model)
    bad = path.with_name("flipped.onnx")
    refusals = 0
    for _ in range(rounds):
        content = bytearray(whole)
        for _ in range(source.choice((1, 1, 1, 4))):
            content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        bad.write_bytes(content)
        try:
            found = pt.load(bad)
            assert seal.digest(found.model) == digest
        except pt.PartitionError as error:
            check_message("\n".join(f"partition: {line}" for line in str(error).splitlines()))
            refusals += 1
    assert refusals > 0.8 * rounds


def test_flipped_bits(tmp_path: Path) -> None:
    pt.partition(convolution(), mesh="depth=2").save(tmp_path / "p.onnx")
    check_flips(tmp_path / "p.onnx", 200, 0)


@pytest.mark.slow
def test_many_flipped_bits(plan_path: Path) -> None:
    check_flips(plan_path, 1500, 1)


# --- what the plan tells -----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["depth=2,height=2", "width=3", None])
def test_the_dict_is_json_and_adds_up(source: Path, mesh: str) -> None:
    plan = pt.partition(source, mesh=mesh)
    found = plan.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    ranks, nodes, totals = found["per_rank"], found["nodes"], found["totals"]
    assert found["ranks"] == len(ranks) == plan.mesh.size
    assert sum(r["sent_bytes"] for r in ranks) == totals["sent_bytes"] == sum(n["sent_bytes"] for n in nodes)
    assert sum(r["received_bytes"] for r in ranks) == totals["sent_bytes"]
    assert sum(r["messages"] for r in ranks) == totals["messages"] == sum(n["messages"] for n in nodes)
    assert max(r["peak_bytes"] for r in ranks) == totals["peak_bytes_max"]
    assert totals["peak_bytes_max"] == max(n["live_bytes_max"] for n in nodes)
    assert [n["name"] for n in nodes] == [n.name for n in plan.model.graph]
    with plan.session() as session:
        session.run({"volume": volume(NETWORK.shape)})
        assert session.last_run is not None
        assert [r.sent_bytes for r in session.last_run.ranks] == [r["sent_bytes"] for r in ranks]
        assert [r.messages for r in session.last_run.ranks] == [r["messages"] for r in ranks]


def test_the_dict_tells_owned_needed_and_halo() -> None:
    found = pt.partition(convolution(), mesh="depth=2").to_dict()
    exchange, conv = found["nodes"]
    assert (exchange["op"], conv["op"]) == ("HaloExchange", "Conv")
    assert exchange["owned"] == "[1, 2, depth(0|4|7), 11, 5]"
    assert exchange["needed"] == "[1, 2, depth(0:5 3:7), 11, 5]"
    assert exchange["halo"] == {"2": [1, 1]}
    assert exchange["sent_bytes"] == 2 * 2 * 11 * 5 * 4 and exchange["messages"] == 2
    assert exchange["splits"] == [{"axis": 2, "mesh_axis": "depth", "cuts": None, "parts": [[[0, 5]], [[3, 7]]]}]
    assert conv["layout"] == "[1, 3, depth(0|4|7), 11, 5]"


def test_the_report_shows_what_is_gathered_or_replicated() -> None:
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 6),
             onnx.helper.make_node("Flatten", ["c"], ["f"], name="flat"),
             onnx.helper.make_node("Gemm", ["f", "g"], ["y"], name="head")]
    weights = {"w": kernel(), "g": np.ones((3 * 7 * 11 * 5, 4), np.float32)}
    outputs = [value("y", (1, 4)), value("f", (1, 3 * 7 * 11 * 5))]  # who wants the flat volume gets it gathered
    plan = pt.partition(model(nodes, [value("x", SHAPE)], outputs, weights), mesh="depth=2")
    found = plan.to_dict()
    assert len(found["gathered"]) == 1 and "head" in found["replicated"]
    report = plan.report()
    assert "GATHERED: c for flat" in report and "REPLICATED over depth" in report
    moved = sum(n["sent_bytes"] for n in found["nodes"] if n["name"] in found["gathered"])
    assert moved == 3 * 7 * 11 * 5 * 4


def test_the_report_has_the_width_that_was_asked_for(source: Path) -> None:
    plan = pt.partition(source, mesh="depth=2,height=2")
    for width in (80, 120, 200):
        assert max(map(len, plan.report(width).splitlines())) <= width
    assert "plan for 4 ranks (depth=2,height=2)" in plan.report()
