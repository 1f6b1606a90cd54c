"""The page of `partition report`: its data, its size, and that nothing from a model takes effect in it."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import partitioner as pt
from partitioner.compiler import DepthFirst, compile_plan
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.page import page_data, page_text
from tests.command import refused, works

HOSTILE = "</script><img src=x onerror=alert(1)>&<!--"


def network(depth: int = 2, shape: tuple[int, ...] = (1, 1, 20, 18, 16), prefix: str = "") -> onnx.ModelProto:
    """Convolutions of width 3 in a row."""
    spatial = len(shape) - 2
    weight = np.ones((1, 1, *(3,) * spatial), np.float32) / 27
    names = [f"{prefix}v{i}" for i in range(depth + 1)]
    nodes = [helper.make_node("Conv", [a, "w"], [b], name=f"{prefix}conv{i}", pads=[1] * (2 * spatial))
             for i, (a, b) in enumerate(itertools.pairwise(names))]
    graph = helper.make_graph(
        nodes, f"{prefix}net", [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape)], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def data_of(page: str) -> dict[str, Any]:
    """What the script of the page will read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def written(plan: pt.Plan, tmp_path: Path, **more: Any) -> tuple[str, dict[str, Any]]:
    plan.report_html(tmp_path / "page.html", **more)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    return page, data_of(page)


def test_figures_are_those_of_the_plan(tmp_path: Path) -> None:
    plan = pt.partition(network(), mesh="depth=2,height=2")
    _, data = written(plan, tmp_path, name="net")
    assert data["name"] == "net" and data["ranks"] == 4 and data["mesh"] == [["depth", 2], ["height", 2]]
    assert data["totals"] == plan.to_dict()["totals"]
    assert sum(item.get("sent", 0) for item in data["items"]) == plan.cost.sent.sum()
    assert data["per_rank"]["peak"] == plan.cost.peak.reshape(-1).tolist()
    assert [max(column) for column in zip(*data["memory"]["live"], strict=True)] == data["memory"]["most"]
    assert max(data["memory"]["most"]) == plan.cost.peak.max()


def test_halos_and_layouts_are_numbers_of_tables() -> None:
    plan = pt.partition(network(), mesh="depth=2,height=2", cuts={"depth": (0, 7, 20)})
    data = page_data(plan.model, plan.cost)
    halo = next(item for item in data["items"] if item["kind"] == "halo")
    owned, needed = data["layouts"][halo["owned"]], data["layouts"][halo["layout"]]
    assert owned["drawn"] == [2, 3, 4] and owned["names"] == ["depth", "height", "width"]
    assert data["axes"][owned["axes"][2]] == {"mesh": "depth", "cuts": [0, 7, 20]}
    assert data["axes"][needed["axes"][2]]["parts"] == [[0, 8], [6, 20]]
    assert halo["halo"] == {"2": [1, 1], "3": [1, 1]}
    reads = {item["name"]: item.get("reads", []) for item in data["items"]}
    assert reads["conv0"] == [data["items"].index(halo)] and reads[halo["name"]] == [0]


@pytest.mark.parametrize(("shape", "mesh", "drawn"), [
    ((2, 1, 20), "batch=2,width=2", [2]), ((1, 1, 20, 18), "height=2", [2, 3]), ((1, 1, 9, 8, 7), None, [2, 3, 4]),
])
def test_fewer_axes_are_drawn_flat(shape: tuple[int, ...], mesh: str | None, drawn: list[int]) -> None:
    plan = pt.partition(network(shape=shape), mesh=mesh)
    data = page_data(plan.model, plan.cost)
    assert data["layouts"][data["items"][0]["layout"]]["drawn"] == drawn


def test_what_is_gathered_or_replicated_is_named_with_its_cost() -> None:
    weights = {"w": np.ones((1, 12, 5), np.float32), "r": np.ones((1, 12, 4), np.float32)}
    nodes = [helper.make_node("GRU", ["x", "w", "r"], ["h"], "gru", hidden_size=4),
             helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [7, 3, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7, 1, 3, 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()])
    plan = pt.partition(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8),
                        mesh="batch=2")
    remarks = page_data(plan.model, plan.cost)["remarks"]
    figures = plan.to_dict()
    gathered = [remark for remark in remarks if remark["kind"] == "gather"]
    assert [remark["name"] for remark in gathered] == figures["gathered"] and len(gathered) == 1
    assert gathered[0]["users"] == ["gru"] and gathered[0]["sent"] == figures["totals"]["sent_bytes"] > 0
    assert [remark["name"] for remark in remarks if remark["kind"] == "fallback"] == figures["without_rule"] == ["gru"]
    for remark in (remark for remark in remarks if remark["kind"] == "replicated"):
        assert remark["copies"] == 2 and remark["axes"] == ["batch"]


def test_a_depth_first_plan_shows_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partitioner.budget.anonymous_memory", lambda: 0)  # else what ran before decides on the plan
    model = network(4, (1, 1, 300, 120, 120))
    with pytest.raises(pt.PartitionError) as told:
        pt.partition(model, memory="1MiB")
    least = re.search(r"needs at least ([\d.]+) MiB", str(told.value))
    assert least is not None
    plan = pt.partition(model, memory=f"{int(float(least.group(1))) + 4}MiB")
    data = page_data(plan.model, plan.cost)
    assert data["schedule"] == plan.to_dict()["schedule"] and data["schedule"]["axis"] == "depth"
    assert data["memory"] is None and data["per_rank"]["peak"] == [int(plan.cost.peak.max())]
    assert not any("live" in item for item in data["items"])


def test_strips_are_shown_with_what_they_cost() -> None:
    order = DepthFirst("depth", (("height", 2), ("width", 3)))
    plan = pt.Plan(compile_plan(load_model(network()), Mesh(()), {}, {}, order=order))
    data = page_data(plan.model, plan.cost)
    assert data["schedule"]["strips"] == ["height", "width"] and len(data["per_rank"]["peak"]) == 6
    assert data["totals"]["flops_twice"] > 0


def test_names_from_a_model_are_inert(tmp_path: Path) -> None:
    plan = pt.partition(network(prefix=HOSTILE), mesh="depth=2")
    page, data = written(plan, tmp_path, name=HOSTILE, explain=HOSTILE,
                         alternatives=[{"mesh": HOSTILE, "note": HOSTILE}])
    assert "<img" not in page and "<!--" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert data["name"] == data["explain"] == data["alternatives"][0]["note"] == HOSTILE
    assert any(item["name"] == f"{HOSTILE}conv0" for item in data["items"])


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page, _ = written(pt.partition(network(), mesh="depth=2"), tmp_path)
    frame = page.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest", frame)
    assert re.findall(r"<link[^>]*>", frame) == ['<link rel="icon" href="data:,">']
    assert "default-src 'none'; script-src 'sha256-" in page and "unsafe" not in page


def test_many_nodes_on_many_ranks_stay_small() -> None:
    plan = pt.partition(network(334, (1, 1, 64, 64, 64)), mesh="depth=16,height=16,width=16")
    cost = plan.cost
    began = time.process_time()
    page = page_text(page_data(plan.model, cost))
    assert len(plan.model.graph) > 650
    assert len(page) < 5e6
    assert time.process_time() - began < 10


def test_alternatives_are_checked() -> None:
    plan = pt.partition(network(), mesh="depth=2")
    for wrong, message in (({"seconds": 1.0}, "has no mesh"), ({"mesh": "depth=2", "time": 1}, "does not know time"),
                           ({"mesh": "depth=2", "seconds": "1 s"}, "is no number")):
        with pytest.raises(pt.PartitionError, match=message):
            page_data(plan.model, plan.cost, alternatives=[wrong])  # pyright: ignore


def test_the_command(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    page = tmp_path / "page.html"
    assert works("report", tmp_path / "net.onnx", "--mesh", "depth=2", "-o", page) == f"wrote {page}\n"
    assert data_of(page.read_text())["name"] == "net.onnx"
    works("compile", tmp_path / "net.onnx", "--mesh", "2x2x1", "-o", tmp_path / "net.plan.onnx")
    works("report", tmp_path / "net.plan.onnx", "-o", page)  # replaces the older one
    assert data_of(page.read_text())["ranks"] == 4
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.plan.onnx", "page.html"]


def test_a_page_that_cannot_be_written_is_a_line(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    (tmp_path / "folder").mkdir()
    model = tmp_path / "net.onnx"
    assert "is a folder" in refused("report", model, "-o", tmp_path / "folder")
    assert "does not exist" in refused("report", model, "-o", tmp_path / "missing" / "page.html")
    (tmp_path / "file").write_text("")
    assert refused("report", model, "-o", tmp_path / "file" / "page.html")
    assert "-o" in refused("report", model)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
