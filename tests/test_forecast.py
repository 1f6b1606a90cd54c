"""Forecasts for many devices: rows that are the planner's, ratios that hold, cubes that just fit, files, refusals."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import partitioner as pt
from partitioner.forecasting import numbers
from partitioner.planner.scaling import Row, _compared
from tests.command import kernel, model, refused, value, works

OPEN = (1, 2, "depth", "height", "width")


def network(shape: tuple[Any, ...] = OPEN) -> onnx.ModelProto:
    """A stride of 2 and back."""
    up = {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}
    weight = kernel(2) / 8
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "a", pads=[1] * 6, strides=[2, 2, 2]),
             helper.make_node("Conv", ["a", "w"], ["b"], "b", pads=[1] * 6),
             helper.make_node("ConvTranspose", ["b", "u"], ["y"], "y", **up)]
    return model(nodes, [value("x", shape)], [value("y", None)], {"w": weight, "u": weight[..., :2, :2, :2].copy()})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forecast") / "net.onnx"
    onnx.save(network(), path)
    return path


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held but activations and weights."""
    monkeypatch.setattr("partitioner.outlook.held_on", lambda profile: 0)


# --- rows --------------------------------------------------------------------------------------------


def test_rows_are_the_plans_that_the_planner_chooses() -> None:
    found = pt.forecast(network(), devices=[1, 4], sizes=[64, "128x64x32"], profile="default", backend="gloo")
    assert [(row.devices, row.size) for row in found.rows] == [
        (1, (64, 64, 64)), (4, (64, 64, 64)), (1, (128, 64, 32)), (4, (128, 64, 32))]
    for row in found.rows:
        plan = pt.partition(network(), mesh=row.mesh if "=" in row.mesh else None, shapes={"x": (1, 2, *row.size)})
        assert row.seconds == pytest.approx(plan.time("default", "gloo").seconds)
        assert (row.sent_bytes, row.messages) == (plan.cost.sent.max(), plan.cost.messages.max())
        assert row.fits is None and row.memory_bytes > plan.cost.peak.max()
    assert found.largest == () and found.memory is None


def test_more_devices_are_never_slower() -> None:
    found = pt.forecast(network(), devices=[1, 2, 3, 8, 64], sizes=[16, 64], profile="h100")
    for size in {row.size for row in found.rows}:
        seconds = [row.seconds for row in found.rows if row.size == size and row.devices <= 8]
        assert seconds == sorted(seconds, reverse=True)


def row(devices: int, size: int, seconds: float, fits: bool | None = None) -> Row:
    return Row(devices, (size,) * 3, "", seconds, 0, fits, 0, 0, "gloo")


def test_strong_and_weak_scaling() -> None:
    rows = _compared([row(1, 8, 8.0), row(4, 8, 4.0), row(8, 16, 10.0), row(32, 16, 8.0), row(3, 16, 30.0)])
    assert [r.speedup for r in rows] == [1, 2, 3, 3.75, 1]
    assert [r.efficiency for r in rows] == pytest.approx([1, 0.5, 3 * 3 / 8, 3.75 * 3 / 32, 1])
    assert [r.weak_efficiency for r in rows] == [1, 1, 0.8, 0.5, None]


def test_the_base_is_the_fewest_devices_that_hold_it() -> None:
    rows = _compared([row(1, 8, 8.0, False), row(2, 8, 5.0, True), row(4, 8, 2.5, True)])
    assert [r.speedup for r in rows] == [0.625, 1, 2] and rows[2].efficiency == 1


def test_memory_tells_what_fits(no_process: None) -> None:
    asked = {"devices": [1], "sizes": [16], "profile": "h100"}
    plain = pt.forecast(network(), **asked)
    least = min(row.memory_bytes for row in plain.rows)
    assert not any(row.fits for row in pt.forecast(network(), memory=1000, **asked).rows)
    assert all(row.fits and row.memory_bytes <= least for row in pt.forecast(network(), memory=least, **asked).rows)


# --- the largest cube --------------------------------------------------------------------------------


def test_the_largest_cube_fits_and_the_next_one_does_not(no_process: None) -> None:
    memory = 3 * 2**20
    found = pt.forecast(network(), devices=[1, 2, 8], sizes=[32], memory=memory, profile="h100")
    extents = [cube.size[0] for cube in found.largest if cube.size is not None]
    assert len(extents) == 3 and extents == sorted(extents) and extents[0] < extents[-1]
    for cube in found.largest:
        assert cube.size is not None and len(set(cube.size)) == 1 and cube.size[0] % 2 == 0
        plan = pt.partition(network(), mesh=cube.mesh if "=" in cube.mesh else None, shapes={"x": (1, 2, *cube.size)})
        assert plan.cost.peak.max() + plan.cost.weight_bytes == cube.memory_bytes <= memory
    alone = found.largest[0].size
    assert alone is not None
    beyond = pt.partition(network(), shapes={"x": (1, 2, *(n + 2 for n in alone))})
    assert beyond.cost.peak.max() + beyond.cost.weight_bytes > memory


def test_no_cube_fits_in_nothing(no_process: None) -> None:
    (cube,) = pt.forecast(network(), devices=[1], sizes=[8], memory=10, profile="h100").largest
    assert cube.size is None


# --- what is given -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "found"), [
    ("1", [1]), ("1,2,4,...,64", [1, 2, 4, 8, 16, 32, 64]), ("1,...,8", [1, 2, 4, 8]), ("3, 6,...,24", [3, 6, 12, 24]),
    ("64,96,128,...,224", [64, 96, 128, 160, 192, 224]), ("10,15,...,30,100", [10, 15, 20, 25, 30, 100]),
    ("1,2,...,8,16,24,...,40", [1, 2, 4, 8, 16, 24, 32, 40]), ("4,...,8", [4, 8]),
])
def test_lists_go_on_as_they_began(text: str, found: list[int]) -> None:
    assert numbers(text, "--devices") == found


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,,2", "...", "...,4", "1,...", "1,...,...,4", "1,2,4,...,100",
                                  "8,...,4", "1.5", "1,2;4"])
def test_other_lists_are_refused(text: str) -> None:
    with pytest.raises(pt.PartitionError, match="--devices "):
        numbers(text, "--devices")


def test_open_inputs_of_the_same_axes_have_the_size_too() -> None:
    nodes = [helper.make_node("Add", ["x", "z"], ["y"], "y")]
    other = model(nodes, [value("x", ("n", 2, "a", "b", "c")), value("z", (1, 2, "d", "e", "f"))], [value("y", None)])
    found = pt.forecast(other, devices=[1], sizes=[16], profile="h100")
    assert found.rows[0].memory_bytes >= 3 * 2 * 16**3 * 4


def test_an_open_channel_has_to_be_given() -> None:
    proto = network((1, "channels", "depth", "height", "width"))
    with pytest.raises(pt.PartitionError, match=r"input 'x' has an open axis 1"):
        pt.forecast(proto, devices=[1], sizes=[16])
    assert pt.forecast(proto, devices=[1], sizes=[16], shapes={"x": (1, 2, 1, 1, 1)}).rows


@pytest.mark.parametrize(("asked", "said"), [
    ({"devices": [0]}, "give a whole number from 1"), ({"devices": []}, "give a list of at least one"),
    ({"devices": "1"}, "give a list"), ({"sizes": [0]}, "size 0"), ({"sizes": ["8x8"]}, "has 2 axes, the volume has 3"),
    ({"sizes": ["axb"]}, "size axb"), ({"sizes": [True]}, "size True"), ({"sizes": [1]}, "give at least 2"),
    ({"sizes": [10**9]}, "from 1 to 65536"), ({"memory": "much"}, "no amount of memory"),
    ({"backend": "pigeons"}, "knows nothing of transport"), ({"profile": "nowhere"}, "nowhere: cannot be read"),
])
def test_what_is_not_understood_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(pt.PartitionError, match=said):
        pt.forecast(network(), **{"devices": [1], "sizes": [16], **asked})


def test_models_without_open_or_spatial_axes_are_refused() -> None:
    with pytest.raises(pt.PartitionError, match=r"is exported with the fixed extents 1x2x8x8x8, not 1x2x16x16x16"):
        pt.forecast(network((1, 2, 8, 8, 8)), devices=[1], sizes=[16])
    flat = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", ("n", 4))], [value("y", None)])
    with pytest.raises(pt.PartitionError, match="no input with spatial axes"):
        pt.forecast(flat, devices=[1], sizes=[16])


# --- the command -------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(file: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("f.csv", "f.json")]
    words = [word for path in paths for word in ("-o", path)]
    told = works("forecast", file, "--devices", "1,2,...,4", "--sizes", "32,64", "--profile", "h100", "--memory",
                 "2GiB", *words)
    assert "largest cube in whole-shard steps within 2.0 GiB" in told
    assert told.splitlines()[-2:] == [f"wrote {path}" for path in paths]
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert [(r["devices"], r["size"]) for r in rows] == [
        (d, s) for s in ("32x32x32", "64x64x64") for d in ("1", "2", "4")]
    data = json.loads(paths[1].read_text())
    assert [r["seconds"] for r in data["rows"]] == [float(r["seconds"]) for r in rows]
    assert data["memory_bytes"] == 2 * 2**30 and [c["devices"] for c in data["largest"]] == [1, 2, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.csv", "f.json"]
    assert json.loads(works("forecast", file, "--devices", "1", "--sizes", "32", "--json"))["largest"] == []


@pytest.mark.parametrize("memory", [None, "2GiB"])
def test_curves(memory: str | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = pt.forecast(network(), devices=[1, 8], sizes=[16, 32], memory=memory, profile="h100")
    found.save(tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("words", "said"), [
    (("--devices", "0", "--sizes", "16"), "--devices 0: '0' is not understood"),
    (("--devices", "1", "--sizes", "1"), "size 1x1x1: the network has one cell for 2 at its coarsest"),
    (("--devices", "1", "--sizes", "16,...,33"), "does not lead to 33"),
    (("--devices", "1", "--sizes", "16", "-o", "f.pdf"), "f.pdf: the ending is unknown; use .csv, .json, .png"),
    (("--devices", "1", "--sizes", "16", "-o", "nowhere/f.csv"), "does not exist; create it first"),
    (("--devices", "1", "--sizes", "16", "-o", "f.csv", "-o", "f.csv"), "f.csv: is named twice"),
    (("--sizes", "16"), "--devices"),
    (("--devices", "1", "--sizes", "16", "--backend", "pigeons"), "knows nothing of transport 'pigeons'"),
])
def test_mistakes_are_told_in_a_line(words: tuple[str, ...], said: str, file: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = refused("forecast", file, *words)
    assert said in told and len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_picture_without_matplotlib_is_refused_before_anything(file: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else found(
        name, *more))
    told = refused("forecast", file, "--devices", "1", "--sizes", "16", "-o", tmp_path / "f.png")
    assert "pictures need matplotlib; install it with pip install 'partitioner[plot]'" in told


def test_a_plan_is_no_model(file: Path, tmp_path: Path) -> None:
    works("compile", file, "--mesh", "depth=2", "--shape", "1x2x16x16x16", "-o", tmp_path / "plan.onnx")
    told = refused("forecast", tmp_path / "plan.onnx", "--devices", "1", "--sizes", "16")
    assert "is a plan, for one mesh and size; give the model" in told
