"""Profiles: figures that survive a file, broken files refused in a line, shipped ones, what is taken by default."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import partitioner as pt
from partitioner.curves import Curve, Grid
from partitioner.profile import Kernels, Link, Profile, default_path, shipped_names

ROOT = Path(__file__).parent.parent
AXES = [("channels in", (1.0, 16.0)), ("channels out", (16.0, 64.0)), ("window", (1.0, 27.0)),
        ("cells", (64.0, 4096.0))]


def grid() -> Grid:
    rates = {(i, o, w, c): 1e9 * i**0.5 * w**0.3 * c**0.1 for i in (1, 16) for o in (16, 64) for w in (1, 27)
             for c in (64, 4096)}
    return Grid.of(AXES, rates)


def profile() -> Profile:
    kernels = tuple(
        Kernels(n, 1e-5, 2e-6, {"float32": 1e11 * n, "float64": 5e10}, 5e9, 16,
                {"pointwise": Curve.of({1e4: 1e-5, 1e6: 1e-4, 1e8: 3e-2})}, {"conv": grid()}) for n in (1, 2))
    links = {"lockstep": Link(1e-6, 1e10), "gloo": Link(2e-4, 1e9, Curve.of({64.0: 2e-4, 1e6: 1e-3}))}
    return Profile("mine", "made up", "cpu", True, {"torch": "2"}, kernels, links, 1e9, 5e8)


def test_a_profile_survives_a_file(tmp_path) -> None:
    path = tmp_path / "folder" / "profile.json"
    profile().save(path)
    assert pt.Profile.load(path) == profile()
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(pt.PartitionError, match=r"cannot be written \(No space left"):
        replace(profile(), name="other").save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def broken(change) -> str:
    data = profile().to_dict()
    change(data)
    return json.dumps(data)


BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "another file": '{"format": "recipe"}',
    "another version": broken(lambda d: d.update(version=99)),
    "without kernels": broken(lambda d: d.update(kernels=[])),
    "kernels missing": broken(lambda d: d.pop("kernels")),
    "links of a wrong kind": broken(lambda d: d.update(links=[1])),
    "a negative rate": broken(lambda d: d["files"].update(read=-1)),
    "text for a number": broken(lambda d: d["kernels"][0].update(launch="fast")),
    "true for a number": broken(lambda d: d["kernels"][0].update(launch=True)),
    "half a thread": broken(lambda d: d["kernels"][0].update(threads=0.5)),
    "no float32": broken(lambda d: d["kernels"][0].update(flops={"float64": 1})),
    "descending times": broken(lambda d: d["kernels"][0]["curves"]["pointwise"].update(seconds=[3, 2, 1])),
    "rates missing": broken(lambda d: d["kernels"][0]["grids"]["conv"]["rates"].pop()),
    "axes that descend": broken(lambda d: d["kernels"][0]["grids"]["conv"]["axes"].update(window=[27, 1])),
    "a number that is none": broken(lambda d: d["links"]["gloo"].update(latency=None)),
    "infinite": broken(lambda d: d["files"].update(write=1)).replace('"write": 1', '"write": Infinity'),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused_in_a_line(what: str, tmp_path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(BROKEN[what])
    with pytest.raises(pt.PartitionError, match="partition calibrate") as refusal:
        pt.Profile.load(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_unreadable_files_are_refused(tmp_path) -> None:
    with pytest.raises(pt.PartitionError, match="cannot be read"):
        pt.Profile.load(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(pt.PartitionError, match="not text"):
        pt.Profile.load(tmp_path / "bytes")


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_profiles_tell_where_they_are_from(name: str) -> None:
    found = pt.Profile.find(name)
    assert found.name == name
    assert len(found.source) > 20
    assert not found.measured
    assert {"lockstep", "gloo"} <= set(found.links)
    if name != "default":
        assert {"nccl", "network"} <= set(found.links)
        assert "data sheet" in found.source


def test_all_that_is_shipped() -> None:
    assert shipped_names() == ("a100", "default", "h100", "h200")


def test_what_is_taken_by_default(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PARTITIONER_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pt.Profile.find().name == "default"
    profile().save(default_path())
    assert default_path() == tmp_path / "partitioner" / "profile.json"
    assert pt.Profile.find().name == "mine"
    monkeypatch.setenv("PARTITIONER_PROFILE", str(tmp_path / "other.json"))
    with pytest.raises(pt.PartitionError, match=r"other\.json: cannot be read"):
        pt.Profile.find()
    replace(profile(), name="other").save(tmp_path / "other.json")
    assert pt.Profile.find().name == "other"
    with pytest.raises(pt.PartitionError, match="'unheard of' is unknown"):
        Profile.shipped("unheard of")


def test_points_are_met_and_more_work_never_takes_less_time() -> None:
    curve = Curve.of({1e3: 1e-5, 1e4: 9e-6, 1e6: 1e-3})
    assert curve.at(1e6) == pytest.approx(1e-3)
    assert curve.at(10.0) == pytest.approx(1e-5)
    assert curve.at(1e8) == pytest.approx(1e-1)
    assert curve.at(0.0) == 0
    assert (np.diff(curve.at(np.geomspace(1, 1e9, 500))) >= 0).all()


def test_a_grid_meets_its_points_and_levels_noise() -> None:
    found = grid()
    operations = 2.0 * 16 * 16 * 27 * 4096
    rate = 1e9 * 16**0.5 * 27**0.3 * 4096**0.1
    assert found.seconds(operations, (16, 16, 27), 4096.0) == pytest.approx(operations / rate, rel=1e-3)
    noisy = Grid.of(AXES[-1:], {(64.0,): 1e8, (4096.0,): 1e12})
    cells = np.geomspace(1, 1e7, 500)
    for some in (noisy, found):
        times = some.seconds(54.0 * cells, (16, 16, 27) if some is found else (), cells)
        assert (np.diff(times) >= -1e-12 * times[1:]).all()  # but for the last digit


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("kind", ["pointwise", "moments", "resize", "matmul"])
def test_kernels_of_more_bytes_are_never_faster(name: str, kind: str) -> None:
    sizes = np.geomspace(1, 1e10, 200)
    times = pt.Profile.find(name).kernel_seconds(kind, sizes, sizes, sizes / 2)
    assert (np.diff(times) >= 0).all()
    assert (times > 0).all()


def test_the_roofline_takes_the_longer_side() -> None:
    kernels = replace(profile().kernels[0], curves={}, grids={})
    assert kernels.seconds("convolution", 1e11, 1.0) == pytest.approx(1.0, rel=1e-3)
    assert kernels.seconds("convolution", 1.0, 5e9) == pytest.approx(1.0, rel=1e-3)
    assert kernels.seconds("convolution", 1.0, 1.0) == pytest.approx(1e-5, rel=1e-3)
    assert kernels.convolution_seconds("conv", 1e11, (16, 16, 27), 10.0, 1.0) == pytest.approx(1.0, rel=1e-3)


def test_output_channels_are_filled_up_to_whole_vectors() -> None:
    kernels = profile().kernels[0]

    def seconds(channels: int) -> float:
        flops = 2.0 * 16 * channels * 27 * 4096
        return float(kernels.convolution_seconds("conv", flops, (16, channels, 27), 4096.0, 1.0))

    assert seconds(20) == pytest.approx(seconds(32))
    assert seconds(32) > seconds(16)


def test_threads_nearest_to_those_asked_for() -> None:
    found = profile()
    assert [found.for_threads(n).threads for n in (None, 1, 2, 64)] == [2, 1, 2, 2]


def test_messages_pay_latency_each() -> None:
    found = profile()
    assert found.message_seconds(1e10, 5, "lockstep") == pytest.approx(1 + 5e-6)
    assert found.message_seconds(2e6, 2, "gloo") == pytest.approx(2e-3)
    assert found.message_seconds(0.0, 0, "gloo") == 0
    with pytest.raises(pt.PartitionError, match="knows nothing of transport 'nccl'; it has lockstep, gloo"):
        found.message_seconds(1.0, 1, "nccl")


def test_profiles_load_neither_torch_nor_onnx() -> None:
    code = ("import sys, partitioner as pt; pt.Profile.shipped('h100').kernel_seconds('pointwise', 1, 1, 1)\n"
            "assert not {'torch', 'onnx', 'onnx_ir'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
