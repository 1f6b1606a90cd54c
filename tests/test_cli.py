"""The command: plan, compile, run, verify, and what they read, write and print."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import onnxruntime
import psutil
import pytest

import partitioner as pt
from tests.command import (
    ROOT,
    SHAPE,
    Array,
    convolution,
    environment,
    model,
    refused,
    run_apart,
    run_here,
    value,
    volume,
)
from tests.command import works as succeeds
from tests.models import UNetConfig, export

VOLUME = (1, 1, 13, 17, 11)
AFFINE = np.array([[-0.7, 0.1, 0, 33], [0, 0.8, -0.2, -21], [0.05, 0, 2.5, 7], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net with open axes."""
    config = UNetConfig(dims=3, levels=2, base=3, classes=2)
    return export(config.build(), VOLUME, tmp_path_factory.mktemp("cli") / "unet.onnx", dynamic=True,
                  exporter="torchscript")


@pytest.fixture
def folder(tmp_path: Path, unet: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the model and volumes in every format."""
    (tmp_path / "unet.onnx").symlink_to(unet)
    array = volume(VOLUME)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", volume=array)
    np.savez_compressed(tmp_path / "small.npz", volume=array)
    for name in ("x.nii", "x.nii.gz"):
        image = nibabel.Nifti1Image(array[0, 0], AFFINE)
        image.header["descrip"] = b"a phantom"
        image.header.set_xyzt_units("mm", "sec")
        image.to_filename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(array: Array, path: str = "unet.onnx", name: str = "volume") -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: array})[0]


def close(found: Array, reference: Array) -> bool:
    return found.shape == reference.shape and bool(np.abs(found - reference).max() < 1e-5 * np.abs(reference).max())


# --- plan --------------------------------------------------------------------------------------------


def test_plan_prints_layouts_halos_bytes_and_memory(folder: Path) -> None:
    onnx.save(convolution(), "conv.onnx")
    out = succeeds("plan", "conv.onnx", "--mesh", "2x2x1")
    exchange = next(line for line in out.splitlines() if "HaloExchange" in line)
    assert "axis 2: 1+1, axis 3: 1+1" in exchange
    assert "depth(0|4|7) -> depth(0:5 3:7)" in exchange  # owned and needed
    sent = pt.partition("conv.onnx", mesh="2x2x1").to_dict()
    assert f"{sent['totals']['sent_bytes'] / 1024:.1f} KiB" in exchange
    for rank in range(4):
        row = next(line for line in out.splitlines() if re.match(rf"│{rank} ", line))
        figures = sent["per_rank"][rank]
        assert f"{figures['peak_bytes'] / 1024:.1f} KiB" in row and re.search(rf" {figures['messages']} *│", row)
    assert "plan for 4 ranks (depth=2,height=2,width=1)" in out
    assert "\x1b" not in out  # no colours where nobody sees them


def test_plan_in_json_is_the_dict_of_the_api(folder: Path) -> None:
    out = succeeds("plan", "unet.onnx", "--mesh", "depth=2,width=2", "--shape", "volume=1x1x13x17x11", "--json")
    plan = pt.partition("unet.onnx", mesh="depth=2,width=2", shapes={"volume": VOLUME})
    assert json.loads(out) == plan.to_dict()


@pytest.mark.parametrize("word", ["deepen", "overlap"])
def test_exchanges_are_deepened_and_overlapped(folder: Path, word: str) -> None:
    plain = pt.partition("unet.onnx", mesh="depth=2", shapes={"volume": (1, 1, 41, 17, 11)})
    given = ("plan", "unet.onnx", "--mesh", "depth=2", "--shape", "volume=1x1x41x17x11", f"--{word}")
    every = json.loads(succeeds(*given, "all", "--json"))
    wanted: dict[str, Any] = {word: True}
    assert every == pt.partition("unet.onnx", mesh="depth=2", shapes=plain.input_shapes, **wanted).to_dict()
    assert every != plain.to_dict()
    assert "the network has no" in refused(*given, "nothing")
    plain.save("plan.onnx")
    assert f"is a plan, with which --{word} comes too late" in refused("plan", "plan.onnx", f"--{word}", "all")


def test_many_ranks_are_summed_up(folder: Path) -> None:
    onnx.save(convolution((1, 2, 40, 33, 37)), "conv.onnx")
    out = succeeds("plan", "conv.onnx", "--mesh", "16x16x16")
    assert "plan for 4096 ranks" in out and re.search(r"│median", out) and len(out.splitlines()) < 30


@pytest.mark.parametrize("mesh", ["2x2x1", "2x2", "depth=2,height=2", "height=2,depth=2"])
def test_the_short_form_names_the_spatial_axes_in_order(folder: Path, mesh: str) -> None:
    found = json.loads(succeeds("plan", "unet.onnx", "--mesh", mesh, "--shape", "1x1x13x17x11", "--json"))
    assert {k: n for k, n in found["mesh"].items() if n > 1} == {"depth": 2, "height": 2}


def test_cuts(folder: Path) -> None:
    options = ["--mesh", "depth=3,width=2", "--shape", "1x1x13x17x11", "--cuts", "depth=4,4", "--cuts", "width=1"]
    found = json.loads(succeeds("plan", "unet.onnx", *options, "--json"))
    assert found["inputs"][0]["layout"] == "[1, 1, depth(0|4|4|13), 17, width(0|1|11)]"
    assert succeeds("verify", "unet.onnx", *options)


def test_a_reader_that_closes_the_pipe_early(folder: Path) -> None:
    command = f"{sys.executable} -m partitioner.cli plan unet.onnx --shape 1x1x13x17x11 | head -1"
    done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.stdout.startswith("plan for 1 ranks") and done.stderr == ""


# --- compile -----------------------------------------------------------------------------------------


def test_compile_writes_the_plan_of_the_api(folder: Path) -> None:
    options = ["unet.onnx", "--mesh", "depth=2", "--shape", "1x1x13x17x11"]
    assert succeeds("compile", *options, "-o", "p.onnx") == "wrote p.onnx\n"
    plan = pt.partition("unet.onnx", mesh="depth=2", shapes={"volume": VOLUME})
    plan.save("q.onnx")
    assert Path("p.onnx").read_bytes() == Path("q.onnx").read_bytes()
    assert succeeds("compile", *options, "--emit", "text") == plan.to_text()
    assert succeeds("compile", "p.onnx", "--emit", "text", "-o", "p.txt") == "wrote p.txt\n"
    assert Path("p.txt").read_text() == plan.to_text()


def test_compile_emits_the_devices(folder: Path) -> None:
    succeeds("compile", "unet.onnx", "--mesh", "2x2x1", "--shape", "1x1x13x17x11", "--emit", "devices", "-o", "d.onnx")
    onnx.checker.check_model("d.onnx", full_check=True)
    devices = onnx.load("d.onnx")
    heads = [n for n in devices.graph.node if n.op_type == "Conv" and n.name.startswith("/head/Conv")]
    assert len(heads) == 4
    assert close(expected(np.load("x.npy"), "d.onnx"), expected(np.load("x.npy")))
    onnx.save(convolution((1, 2, 65, 3, 3)), "long.onnx")
    assert "for up to 64" in refused("compile", "long.onnx", "--mesh", "depth=65", "--emit", "devices", "-o", "e.onnx")
    assert not Path("e.onnx").exists()


def test_compile_dumps_every_pass(folder: Path) -> None:
    succeeds("compile", "unet.onnx", "--mesh", "depth=2", "--shape", "1x1x13x17x11", "-o", "p.onnx", "--dump-dir",
             "a/b")
    passes = pt.load("p.onnx").to_dict()["passes"]
    assert sorted(os.listdir("a/b")) == [f"{i:02d}-{name}.onnx" for i, name in enumerate(passes)]
    for name in os.listdir("a/b"):
        onnx.checker.check_model(f"a/b/{name}", full_check=True)
        assert close(expected(np.load("x.npy"), f"a/b/{name}"), expected(np.load("x.npy")))


# --- run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["x.npy", "x.npz", "small.npz", "x.nii", "x.nii.gz"])
@pytest.mark.parametrize("target", ["y.npy", "y.npz"])
def test_arrays_from_every_format(folder: Path, source: str, target: str) -> None:
    before = set(os.listdir())
    out = succeeds("run", "unet.onnx", "--mesh", "2x1x2", "--input", source, "--output", f"logits={target}")
    figures = r"in [\d.]+ s; [\d.]+ KiB in \d+ messages; peak [\d.]+ [KM]?i?B in this process\n"
    assert re.fullmatch(rf"wrote {target} {figures}", out)
    assert set(os.listdir()) - before == {target}
    found = np.load(target)
    assert close(found if target == "y.npy" else found["logits"], expected(np.load("x.npy")))


@pytest.mark.parametrize("source", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("target", ["y.nii", "y.nii.gz"])
def test_a_volume_keeps_its_place_in_the_world(folder: Path, source: str, target: str) -> None:
    succeeds("run", "unet.onnx", "--mesh", "depth=2,height=2", "--input", source, "--output", target)
    image = nibabel.load(target)
    assert np.allclose(image.affine, nibabel.load(source).affine, atol=1e-6)
    assert bytes(image.header["descrip"]).rstrip(b"\0") == b"a phantom"
    assert image.header.get_xyzt_units() == ("mm", "sec")
    found = np.moveaxis(np.asarray(image.dataobj), -1, 0)[None]  # channels last in NIfTI
    assert close(found, expected(np.load("x.npy")))


def test_several_inputs_and_outputs(folder: Path) -> None:
    join = onnx.helper.make_node("Sub", ["a", "b"], ["s"])
    relu = onnx.helper.make_node("Relu", ["s"], ["r"])
    outputs = [value("s", SHAPE), value("r", SHAPE)]
    onnx.save(model([join, relu], [value("a", SHAPE), value("b", SHAPE)], outputs), "m.onnx")
    a, b = volume(seed=1), volume(seed=2)
    np.save("a.npy", a)
    np.save("b.npy", b)
    np.savez("both.npz", a=a, b=b)
    forms = [(["a=a.npy", "b=b.npy"], ["s=s.npy", "r=r.npy"]), (["both.npz"], ["y.npz"]),
             (["b=b.npy", "both.npz"], ["y.npz", "r=r.npy"]), (["a=both.npz", "b=both.npz"], ["s=s.npy", "r=y.npz"])]
    for inputs, outputs in forms:
        succeeds("run", "m.onnx", "--mesh", "height=3", *[f"--input={i}" for i in inputs],
                 *[f"--output={o}" for o in outputs])
        files = dict(o.split("=") for o in outputs if "=" in o)
        for name, array in {"s": a - b, "r": np.maximum(a - b, 0)}.items():
            found = np.load(files.get(name, "y.npz"))
            assert np.array_equal(found if isinstance(found, np.ndarray) else found[name], array)
        for path in {*files.values(), "y.npz"}:
            Path(path).unlink(missing_ok=True)


def test_figures_of_a_run(folder: Path) -> None:
    out = succeeds("run", "unet.onnx", "--mesh", "depth=3", "--input", "x.npy", "--output", "y.npy", "--json")
    found = json.loads(out)
    plan = pt.partition("unet.onnx", mesh="depth=3", shapes={"volume": VOLUME})
    assert found["outputs"] == {"logits": "y.npy"} and found["mesh"] == {"depth": 3} and found["backend"] == "lockstep"
    assert [r["sent_bytes"] for r in found["ranks"]] == found["predicted_sent_bytes"] == plan.cost.sent.tolist()
    assert [r["messages"] for r in found["ranks"]] == plan.cost.messages.tolist()
    assert found["predicted_peak_bytes"] == plan.cost.peak_together and found["seconds"] > 0


def test_a_plan_and_its_model_give_the_same_bits(folder: Path) -> None:
    succeeds("compile", "unet.onnx", "--mesh", "2x2x1", "--shape", "1x1x13x17x11", "-o", "p.onnx")
    succeeds("run", "p.onnx", "--input", "x.npy", "--output", "y.npy")
    succeeds("run", "unet.onnx", "--mesh", "2x2x1", "--input", "x.npy", "--output", "z.npy")
    assert Path("y.npy").read_bytes() == Path("z.npy").read_bytes()


def test_a_run_replaces_an_older_file(folder: Path) -> None:
    Path("y.npy").write_bytes(b"old")
    os.chmod("y.npy", 0o640)
    succeeds("run", "unet.onnx", "--input", "x.npy", "--output", "y.npy", "--overwrite")
    assert close(np.load("y.npy"), expected(np.load("x.npy"))) and os.stat("y.npy").st_mode & 0o777 == 0o640


def test_an_older_file_is_kept(folder: Path) -> None:
    Path("y.npy").write_bytes(b"old")
    Path("link.npy").symlink_to("y.npy")
    for target in ("y.npy", "link.npy"):
        says = refused("run", "unet.onnx", "--input", "x.npy", "--output", target)
        assert says == f"partition: {target}: exists; add --overwrite to replace it, or name another output\n"
    assert Path("y.npy").read_bytes() == b"old"


def test_an_input_is_never_replaced(folder: Path) -> None:
    Path("link.npy").symlink_to("x.npy")
    Path("hard.npy").hardlink_to("x.npy")
    before = Path("x.npy").read_bytes()
    for target in ("x.npy", "link.npy", "hard.npy"):
        says = refused("run", "unet.onnx", "--input", "x.npy", "--output", target, "--overwrite")
        assert says == f"partition: {target}: is the input x.npy as well; name another output\n"
    assert Path("x.npy").read_bytes() == before


# --- verify ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [[], ["--input", "x.npy"], ["--input", "volume=x.nii.gz"]])
def test_verify_prints_the_errors(folder: Path, source: list[str]) -> None:
    shape = [] if source else ["--shape", "1x1x13x17x11"]
    out = succeeds("verify", "unet.onnx", "--mesh", "2x2x1", *shape, *source)
    first, last = out.splitlines()
    assert re.fullmatch(r"logits: largest error \S+, relative \S+ \(tolerance 0\.0001\) ok", first)
    assert last.startswith("reference: onnxruntime ") and last.endswith("; mesh depth=2,height=2,width=1")


def test_verify_fails_above_the_tolerance(folder: Path) -> None:
    options = ["verify", "unet.onnx", "--mesh", "2x2x1", "--shape", "1x1x13x17x11", "--tolerance", "0"]
    found = run_here(*options)
    assert found.code == 1 and "TOO LARGE" in found.out and found.err == ""
    found = run_here(*options, "--json")
    assert found.code == 1
    report = json.loads(found.out)
    assert not report["passed"] and report["outputs"][0]["name"] == "logits"
    assert report["outputs"][0]["absolute"] > 0 and report["outputs"][0]["tolerance"] == 0


def test_verify_in_json(folder: Path) -> None:
    found = json.loads(succeeds("verify", "unet.onnx", "--mesh", "2x1x1", "--shape", "1x1x13x17x11", "--json"))
    assert found["passed"] and found["mesh"] == {"depth": 2, "height": 1, "width": 1}
    (output,) = found["outputs"]
    assert output["passed"] and output["relative"] <= output["tolerance"] == 1e-4


def test_verify_notices_cells_that_are_no_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pt.Session.run

    def spoilt(self: pt.Session, *arguments: object) -> dict[str, Array]:
        found = run(self, *arguments)  # type: ignore[arg-type]
        found["logits"][0, 1, 2, 3, 4] = np.nan
        return found

    monkeypatch.setattr(pt.Session, "run", spoilt)
    found = run_here("verify", "unet.onnx", "--shape", "1x1x13x17x11", "--json")
    assert found.code == 1 and json.loads(found.out)["outputs"][0]["relative"] is None


def test_verify_says_beforehand_that_the_reference_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    says = refused("verify", "unet.onnx", "--mesh", "depth=2", "--shape", "1x1x13x17x11")
    assert re.search(r"unpartitioned reference would need about [\d.]+ [KM]iB, 9\.8 KiB are free here; .*--shape", says)


# --- help, progress, installation --------------------------------------------------------------------


@pytest.mark.parametrize(("command", "names"), [
    ([], ["plan", "compile", "run", "verify", "examples:"]),
    (["plan"], ["--mesh", "--shape", "--cuts", "--json"]),
    (["compile"], ["--output", "--emit", "--dump-dir", "--mesh"]),
    (["run"], ["--input", "--output", "--backend", "--device", "--json", "NAME="]),
    (["verify"], ["--input", "--tolerance", "--backend", "--device", "--json"]),
])
def test_help_names_every_option(command: Sequence[str], names: Sequence[str]) -> None:
    found = run_here(*command, "--help")
    assert found.code == 0 and found.err == ""
    assert all(name in found.out for name in names), found.out


def test_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run_here("--version").out == f"partition {project['version']}\n" == f"partition {pt.__version__}\n"
    assert project["scripts"] == {"partition": "partitioner.cli:main"}


def on_terminal(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output, and what a terminal as standard error shows."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "partitioner.cli", *arguments], cwd=folder, text=True,
                               env=environment(TERM="xterm-256color", COLUMNS="100"), stderr=theirs,
                               stdout=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 60)
        assert ready, "no end"
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown.decode(errors="replace")


@pytest.mark.parametrize("backend", ["lockstep", pytest.param("gloo", marks=pytest.mark.slow)])
def test_progress_on_a_terminal(folder: Path, backend: str) -> None:
    code, out, shown = on_terminal(folder, "run", "unet.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output",
                                   "y.npy", "--backend", backend)
    assert code == 0 and out.startswith("wrote y.npy")
    assert "\x1b[" in shown and "%" in shown
    assert "Traceback" not in shown


def test_no_progress_where_nobody_looks(folder: Path) -> None:
    done = run_apart("run", "unet.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output", "y.npy", cwd=folder)
    assert done.code == 0 and done.err == "" and "\x1b" not in done.out
    code, out, shown = on_terminal(folder, "run", "unet.onnx", "--input", "x.npy", "--output", "z.npy", "--json")
    assert code == 0 and shown == "" and json.loads(out)["mesh"] == {}


def test_an_error_on_a_terminal_is_one_line(folder: Path) -> None:
    code, out, shown = on_terminal(folder, "run", "unet.onnx", "--mesh", "depth=20", "--input", "x.npy", "--output",
                                   "y.npy")
    assert (code, out) == (2, "") and shown.strip().startswith("partition: mesh axis depth=20")
    assert len(shown.strip().splitlines()) == 1
