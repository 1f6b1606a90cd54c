"""What is put around a network by the command: for plan, compile, run and verify alike; folders of cases."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import onnx
import pytest
from onnx import helper

from runtime.volumes import open_source
from tests.command import (
    SHAPE,
    Array,
    check_message,
    model,
    refused,
    run_apart,
    run_here,
    value,
    volume,
    works,
)
from tests.test_compose import STEPS, flipped_mean, network, whole

OPEN = (1, 2, "d", "h", "w")
AFFINE = np.array([[-0.7, 0.1, 0, 33], [0, 0.8, -0.2, -21], [0.05, 0, 2.5, 7], [0, 0, 0, 1]])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a network with open axes, and a volume as one file and as a file for each channel."""
    onnx.save(network(18, OPEN), tmp_path / "m.onnx")
    onnx.save(network(18, OPEN, seed=1), tmp_path / "other.onnx")
    monkeypatch.chdir(tmp_path)
    x = volume(SHAPE)
    np.save("x.npy", x)
    for channel in range(2):
        np.save(f"c{channel}.npy", x[:, channel : channel + 1])
        nibabel.Nifti1Image(x[0, channel], AFFINE if not channel else np.eye(4)).to_filename(f"c{channel}.nii.gz")
    return tmp_path


def labels(x: Array) -> Array:
    return whole(network(18, OPEN), {"x": x})["y"].argmax(1)[:, None].astype(np.uint8)


# --- words -------------------------------------------------------------------------------------------


AROUND = ["--preprocess", "zscore", "--tta", "flips=depth", "--ensemble", "other.onnx", "--output-op", "softmax",
          "--output-op", "argmax"]


def test_all_at_once_in_every_command(folder: Path) -> None:
    x = STEPS["zscore",](np.load("x.npy").astype(np.float64)).astype(np.float32)
    wanted = np.mean([flipped_mean(network(seed=seed), x, (2,)) for seed in (0, 1)], 0).argmax(1)[:, None]
    given = ["m.onnx", "--mesh", "depth=2,height=2", *AROUND]
    works("run", *given, "--input", "x.npy", "--output", "y.npy")
    found = np.load("y.npy")
    assert found.dtype == np.uint8 and np.array_equal(found, wanted)
    shape = ["--shape", "1x2x7x11x5"]
    plan = json.loads(works("plan", *given, *shape, "--json"))
    assert plan["gathered"] == [] and plan["outputs"][0]["layout"] == "[1, 1, depth(0|4|7), height(0|6|11), 5]"
    works("compile", *given, *shape, "-o", "p.onnx")
    works("run", "p.onnx", "--input", "x.npy", "--output", "z.npy")
    assert np.array_equal(np.load("z.npy"), wanted)
    for verified in (["p.onnx"], [*given, *shape], [*given, "--input", "x.npy"]):
        assert "y: no label differs" in works("verify", *verified)


def test_a_plan_takes_nothing_around_it(folder: Path) -> None:
    works("compile", "m.onnx", "--shape", "1x2x7x11x5", "-o", "p.onnx")
    for words in (["--tta", "flips"], ["--output-op", "argmax"], ["--preprocess", "zscore"], ["--ensemble", "m.onnx"]):
        says = refused("plan", "p.onnx", *words)
        assert says == (f"partition: p.onnx: is a plan, into which {words[0]} cannot be put any more; give {words[0]} "
                        "when the model is compiled\n")


@pytest.mark.parametrize(("words", "says"), [
    (["--output-op", "argmix"], "--output-op argmix: 'argmix' is unknown; use softmax, sigmoid, argmax, threshold"),
    (["--output-op", "z=argmax"], "--output-op z=argmax: output 'z' is unknown; the model has y"),
    (["--preprocess", "window"], "--preprocess window: is not understood; write window=LOW:HIGH, as window=-160:240"),
    (["--tta", "turns"], "--tta turns: 'turns' is unknown; use flips, or flips=depth,height"),
    (["--ensemble", "none.onnx"], "none.onnx: no such file; give the path of an .onnx file"),
    (["--channels", "two"], "--channels two: is not understood; write the number of files, as --channels 4"),
    (["--channels", "3"], "input 'x' has 2 channels, which 3 files cannot share evenly; give a divisor, as 2"),
    (["--channels", "v=2"], "input 'v' is unknown or has no channels; the model has x"),
])
def test_words_that_are_not_understood(folder: Path, words: list[str], says: str) -> None:
    assert refused("plan", "m.onnx", "--shape", "1x2x7x11x5", *words) == f"partition: {says}\n"


def test_files_in_another_order_keep_their_place_in_the_world(folder: Path) -> None:
    """A network that takes z, y, x, on NIfTI files, which hold x, y, z."""
    one = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 6)
    weights = {"w": volume((3, 1, 3, 3, 3))}
    onnx.save(model([one], [value("x", (1, 1, "d", "h", "w"))], [value("y", (1, 3, "d", "h", "w"))], weights), "z.onnx")
    works("run", "z.onnx", "--mesh", "depth=2,width=2", "--preprocess", "axes=zyx", "--output-op", "argmax", "--input",
          "c0.nii.gz", "--output", "y.nii.gz")
    found, source = nibabel.load("y.nii.gz"), nibabel.load("c0.nii.gz")
    x = np.asarray(source.dataobj, np.float32).transpose(2, 1, 0)[None, None]
    wanted = whole(onnx.load("z.onnx"), {"x": x})["y"].argmax(1)[0].transpose(2, 1, 0)
    assert np.array_equal(np.asarray(found.dataobj), wanted) and found.get_data_dtype() == np.uint8
    assert np.allclose(found.affine, source.affine, atol=1e-6)


# --- channels from several files ---------------------------------------------------------------------


@pytest.mark.parametrize("files", ["c0.npy,c1.npy", "x=c0.npy,c1.npy", "c0.nii.gz,c1.nii.gz", "c0.npy,c1.nii.gz"])
def test_channels_from_several_files(folder: Path, files: str) -> None:
    works("run", "m.onnx", "--mesh", "depth=3,width=2", "--input", files, "--output", "y.npy")
    wanted = whole(network(), {"x": np.load("x.npy")})["y"]
    assert np.abs(np.load("y.npy") - wanted).max() < 1e-5
    assert "ok" in works("verify", "m.onnx", "--mesh", "height=2", "--input", files)


def test_the_place_in_the_world_is_that_of_the_first_file(folder: Path) -> None:
    works("run", "m.onnx", "--input", "c0.nii.gz,c1.nii.gz", "--output", "y.nii.gz", "--output-op", "argmax")
    assert np.allclose(nibabel.load("y.nii.gz").affine, AFFINE, atol=1e-6)


def test_a_plan_for_several_files(folder: Path) -> None:
    works("compile", "m.onnx", "--mesh", "depth=2", "--channels", "2", "--shape", "x=1x2x7x11x5", "-o", "p.onnx",
          "--preprocess", "x/1=window=0:1")
    x = np.load("x.npy")
    x[:, 1] = x[:, 1].clip(0, 1)
    for given in (["--input", "c0.npy,c1.npy"], ["--input", "x/0=c0.npy", "--input", "x/1=c1.npy"]):
        works("run", "p.onnx", *given, "--output", "y.npy", "--overwrite")
        assert np.abs(np.load("y.npy") - whole(network(), {"x": x})["y"]).max() < 1e-5
    says = refused("run", "p.onnx", "--input", "c0.npy,c1.npy,c1.npy", "--output", "z.npy")
    assert says == ("partition: p.onnx: is a plan that does not take 3 files for input 'x'; compile the model with "
                    "--channels x=3\n")


def test_several_files_that_do_not_fit(folder: Path) -> None:
    np.save("small.npy", volume((1, 1, 7, 11, 4)))
    cases = {
        "c0.npy,small.npy": "small.npy: has extents 1x1x7x11x4, c0.npy has 1x1x7x11x5; all files of input 'x' must have"
                            " the same",
        "c0.npy,c1.npy,c0.npy": "input 'x' takes 2 channels, 3 files hold 3; give files for all channels",
        "c0.npy,": "input 'x': names no file in c0.npy,; write A,B,...",
        "v=c0.npy,c1.npy": "input 'v' is unknown; the model has x", "c0.npy,none.npy": "none.npy: no such file",
    }
    for given, says in cases.items():
        assert says in refused("run", "m.onnx", "--input", given, "--output", "y.npy")


def test_a_comma_in_a_path(folder: Path) -> None:
    os.rename("x.npy", "x,y.npy")
    works("run", "m.onnx", "--input", "x,y.npy", "--output", "y.npy")


# --- folders of cases --------------------------------------------------------------------------------


@pytest.fixture
def cases(folder: Path) -> dict[str, Array]:
    """Volumes in a folder, two of the same extents, beside what is no volume."""
    os.makedirs("in/nested")
    Path("in/notes.txt").write_text("nothing")
    Path("in/.hidden.npy").write_bytes(b"nothing")
    found = {f"{name}.npy": volume((1, 2, *extents), seed) for seed, (name, extents) in enumerate(
        {"a": (7, 11, 5), "b": (6, 9, 8), "c": (7, 11, 5), "d": (9, 5, 7)}.items())}
    for name, x in found.items():
        np.save(f"in/{name}", x)
    return found


RUN = ["run", "m.onnx", "--mesh", "depth=2", "--input", "in", "--output", "out", "--output-op", "argmax"]


@pytest.mark.parametrize("backend", ["lockstep", pytest.param("gloo", marks=pytest.mark.slow)])
def test_every_volume_in_a_folder(cases: dict[str, Array], backend: str) -> None:
    out = works(*RUN, "--backend", backend).splitlines()
    for index, (name, line) in enumerate(zip(cases, out, strict=True), 1):
        assert re.match(rf"case {index} of 4: wrote out/{name} in [\d.]+ s; ", line)
    assert sorted(os.listdir("out")) == list(cases)
    for name, x in cases.items():
        assert np.array_equal(np.load(f"out/{name}"), labels(x))


def test_a_broken_case_lets_the_others_go_on(cases: dict[str, Array]) -> None:
    Path("in/b.npy").write_bytes(b"no array")
    np.save("in/c.npy", np.zeros((1, 3, 7, 11, 5), np.float32))
    found = run_here(*RUN)
    assert found.code == 2 and [line.split(":")[0] for line in found.out.splitlines()] == ["case 1 of 4", "case 4 of 4"]
    check_message(found.err)
    first, second, last = found.err.splitlines()
    assert first.startswith("partition: case 2 of 4 (b.npy): in/b.npy: ") and "case 3 of 4 (c.npy): " in second
    assert last == "partition: 2 of 4 cases failed: b.npy, c.npy"
    assert sorted(os.listdir("out")) == ["a.npy", "d.npy"]


def test_cases_that_are_done_are_kept(cases: dict[str, Array]) -> None:
    os.mkdir("out")
    Path("out/a.npy").write_bytes(b"old")
    found = run_here(*RUN)
    assert found.code == 0 and Path("out/a.npy").read_bytes() == b"old"
    assert found.err == ("partition: note: 1 of 4 cases have their outputs and are kept; --overwrite runs them again\n")
    assert len(found.out.splitlines()) == 3
    works(*RUN, "--overwrite")
    assert np.array_equal(np.load("out/a.npy"), labels(cases["a.npy"]))


def test_cases_in_json(cases: dict[str, Array]) -> None:
    Path("in/b.npy").write_bytes(b"no array")
    found = run_here(*RUN, "--json")
    report = json.loads(found.out)
    assert found.code == 2 and report["failed"] == ["b.npy"] and report["kept"] == []
    assert [case["outputs"] for case in report["cases"]] == [{"y": f"out/{n}.npy"} for n in "acd"]


def test_a_failure_at_run_time_is_told_as_such(cases: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    import partitioner.files
    from partitioner.errors import ExecutionError

    make = partitioner.files.make_sinks

    def fail(plan: object, files: dict[str, str], like: object) -> object:
        if files == {"y": "out/b.npy"}:
            raise ExecutionError("out/b.npy: writing failed (No space left on device)")
        return make(plan, files, like)  # type: ignore[arg-type]

    monkeypatch.setattr(partitioner.files, "make_sinks", fail)
    found = run_here(*RUN)
    assert found.code == 1 and len(found.out.splitlines()) == 3
    assert found.err.splitlines()[-1] == "partition: 1 of 4 cases failed: b.npy"


def test_plans_and_weights_are_shared(cases: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    import partitioner.cases
    from partitioner.api import Plan

    counts = {"plans": 0, "runners": 0}
    compiled, made = Plan.compile.__func__, partitioner.cases.make_runner  # type: ignore[attr-defined]

    def count_plans(cls: type[Plan], *given: object) -> Plan:
        counts["plans"] += 1
        return compiled(cls, *given)

    def count_runners(*given: object) -> object:
        counts["runners"] += 1
        return made(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Plan, "compile", classmethod(count_plans))
    monkeypatch.setattr(partitioner.cases, "make_runner", count_runners)
    works(*RUN)
    assert counts == {"plans": 3, "runners": 1}


def test_channels_and_inputs_from_several_folders(cases: dict[str, Array]) -> None:
    """Files of the same name belong together; one that is lacking is that case's own trouble."""
    for channel in range(2):
        os.mkdir(f"t{channel}")
        for name, x in cases.items():
            np.save(f"t{channel}/{name}", x[:, channel : channel + 1])
    os.unlink("t1/c.npy")
    found = run_here("run", "m.onnx", "--input", "x=t0/,t1/", "--output", "out/", "--output-op", "argmax")
    assert found.code == 2 and found.err.splitlines() == [
        "partition: case 3 of 4 (c.npy): t1/c.npy: no such file, while other inputs have it",
        "partition: 1 of 4 cases failed: c.npy"]
    for name in ("a.npy", "b.npy", "d.npy"):
        assert np.array_equal(np.load(f"out/{name}"), labels(cases[name]))


def test_one_file_may_belong_to_all_cases(cases: dict[str, Array]) -> None:
    node = helper.make_node("Mul", ["x", "v"], ["y"])
    onnx.save(model([node], [value("x", OPEN), value("v", (1,))], [value("y", OPEN)]), "two.onnx")
    np.save("v.npy", np.array([3], np.float32))
    works("run", "two.onnx", "--mesh", "height=2", "--input", "x=in", "--input", "v=v.npy", "--output", "y=out")
    assert all(np.array_equal(np.load(f"out/{name}"), 3 * x) for name, x in cases.items())


def test_a_plan_runs_the_cases_of_its_extents(cases: dict[str, Array]) -> None:
    works("compile", "m.onnx", "--mesh", "depth=2", "--shape", "1x2x7x11x5", "--output-op", "argmax", "-o", "p.onnx")
    found = run_here("run", "p.onnx", "--input", "in", "--output", "out")
    assert found.code == 2 and sorted(os.listdir("out")) == ["a.npy", "c.npy"]
    assert "in/b.npy: has extents 1x2x6x9x8, input 'x' of the plan takes 1x2x7x11x5" in found.err


@pytest.mark.parametrize(("given", "says"), [
    (["--input", "in/nested", "--output", "out"], "in/nested: holds no volume file (.dcm, .h5"),
    (["--input", "in", "--output", "y.npy"], "y.npy: is a file, but the input is a folder of cases; name a folder"),
    (["--input", "in", "--output", "m.onnx"], "m.onnx: is a file, but the input is a folder of cases; name a folder"),
    (["--input", "in", "--output", "./in/"], "./in/: is the folder of the inputs in as well; name another folder"),
    (["--input", "in", "--output", "m.onnx/out"], "m.onnx/out: cannot be made (Not a directory); choose another"),
    (["--input", "in", "--output", "out", "--resume"], "--resume: goes on with one run; of a folder of cases those"),
])
def test_folders_that_cannot_be_cases(cases: dict[str, Array], given: list[str], says: str) -> None:
    message = refused("run", "m.onnx", *given)
    assert says in message and len(message.splitlines()) == 1


def test_a_folder_that_is_one_volume_is_no_folder_of_cases(cases: dict[str, Array]) -> None:
    zarr = pytest.importorskip("zarr")
    zarr.save_array("x.zarr", cases["a.npy"])
    works("run", "m.onnx", "--input", "x.zarr", "--output", "y.npy", "--output-op", "argmax")
    os.rename("x.zarr", "in/e.zarr")
    works(*RUN)
    assert np.array_equal(open_source("out/e.zarr").read(), labels(cases["a.npy"]))


@pytest.mark.slow
def test_cases_under_torchrun(cases: dict[str, Array]) -> None:
    Path("in/b.npy").write_bytes(b"no array")
    found = run_apart("--standalone", "--nproc-per-node", "2", "-m", "partitioner.cli", *RUN, cwd=Path.cwd(),
                      module="torch.distributed.run", GLOO_SOCKET_IFNAME="lo")
    ours = [line for line in found.err.splitlines() if line.startswith("partition: ")]
    assert ours[0].startswith("partition: case 2 of 4 (b.npy): in/b.npy: ")
    assert ours[1:] == ["partition: 1 of 4 cases failed: b.npy"]
    assert [line.split(":")[0] for line in found.out.splitlines()] == [f"case {i} of 4" for i in (1, 3, 4)]
    for name in ("a.npy", "c.npy", "d.npy"):
        assert np.array_equal(np.load(f"out/{name}"), labels(cases[name]))
