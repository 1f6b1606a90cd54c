"""Mistakes of the user: one clear line each, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

import partitioner as pt
from partitioner import loader
from partitioner.loader import save_model
from partitioner.options import file_run
from tests.command import (
    SHAPE,
    check_message,
    convolution,
    environment,
    finish,
    kernel,
    model,
    refused,
    run_apart,
    run_here,
    start,
    value,
    volume,
    works,
)
from tests.models import UNetConfig, export

Node = helper.make_node
OPEN = ("batch", 2, "depth", "height", "width")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net of open extents."""
    folder = tmp_path_factory.mktemp("unet")
    config = UNetConfig(dims=3, levels=2, base=2)
    return export(config.build(), (1, 1, 8, 8, 8), folder / "unet.onnx", dynamic=True, exporter="torchscript")


# --- meshes, shapes, cuts ----------------------------------------------------------------------------

MESHES = {
    "depth=8": "only 7 cells; use at most depth=7", "1x12x6": "axis 3 of input 'x' has only 11 cells",
    "deth=2": "'deth' is unknown; use batch, depth, height, width", "channel=2": "unknown", "=2": "unknown",
    "depth=0": "from 1", "depth=-1": "from 1", "0x2": "from 1", "2x-1": "from 1",
    "depth=1.5": "not understood", "depth=": "not understood", "depth": "not understood", "2,2": "not understood",
    "axbxc": "not understood", "2x": "not understood", "depth==2": "not understood", "depth=2,": "not understood",
    "depth=2;height=2": "not understood", "depth=2,depth=3": "names an axis twice",
    "2x2x2x2": "has 4 axes but the volume has 3 spatial", "batch=2": "axis 0 of input 'x' has only 1 cells",
}


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_that_cannot_be(conv: Path, mesh: str) -> None:
    assert MESHES[mesh] in refused("plan", conv, "--mesh", mesh)


def test_every_axis_that_is_too_short_is_named(conv: Path) -> None:
    lines = refused("plan", conv, "--mesh", "depth=8,height=2,width=6").splitlines()
    assert len(lines) == 2 and "depth=7" in lines[0] and "width=5" in lines[1]


def test_an_axis_that_the_image_lacks(tmp_path: Path) -> None:
    onnx.save(convolution((1, 2, 9, 8)), tmp_path / "m.onnx")
    assert "depth=2: no input has such an axis" in refused("plan", tmp_path / "m.onnx", "--mesh", "depth=2")
    assert "has 3 axes but the volume has 2 spatial" in refused("plan", tmp_path / "m.onnx", "--mesh", "2x2x2")


@pytest.mark.parametrize(("shape", "says"), [
    ("1x1x9x8", "has 5 axes (batchx1xdepthxheightxwidth), the shape given has 4 (1x1x9x8)"),
    ("volume=1x1x9x8x7x6", "has 5 axes"), ("1x1x0x8x7", "extent 0 of axis 2"), ("1x1x-9x8x7", "extent -9 of axis 2"),
    ("1x2x9x8x7", "not 1x2x9x8x7"), ("1x1x9x8xq", "integers joined by x"), ("volume=", "integers joined by x"),
    ("scan=1x1x9x8x7", "input 'scan' is unknown; the model has volume"), ("1x1x9.5x8x7", "integers joined by x"),
])
def test_shapes_that_cannot_be(unet: Path, shape: str, says: str) -> None:
    assert says in refused("plan", unet, "--mesh", "depth=2", "--shape", shape)


def test_open_axes_ask_for_a_shape(unet: Path) -> None:
    says = refused("plan", unet, "--mesh", "depth=2")
    assert "input 'volume' has open axes (batchx1xdepthxheightxwidth); give all extents: --shape volume=" in says


def test_fixed_axes_stay(conv: Path) -> None:
    assert "exported with the fixed extents" in refused("plan", conv, "--shape", "1x2x9x11x5")


def without_crops(levels: int, axes: int) -> onnx.ModelProto:
    """A U-Net whose halves fit only multiples of 2^levels: pools down, transposed up, joined as they are."""
    nodes, weights = [], {"up": np.ones((2, 2, *[2] * axes), np.float32)}
    for level in range(levels):
        nodes.append(Node("MaxPool", ["x" if level == 0 else f"d{level}"], [f"d{level + 1}"], name=f"pool{level}",
                          kernel_shape=[2] * axes, strides=[2] * axes))
    for level in reversed(range(levels)):
        below = f"s{level + 1}" if level + 1 < levels else f"d{levels}"
        nodes.append(Node("ConvTranspose", [below, "up"], [f"u{level}"], strides=[2] * axes))
        nodes.append(Node("Add", [f"u{level}", "x" if level == 0 else f"d{level}"], [f"s{level}"], name=f"join{level}"))
    shape = ["n", 2, *[f"a{i}" for i in range(axes)]]
    return model(nodes, [value("x", shape)], [value("s0", shape)], weights)


@pytest.mark.parametrize(("levels", "given", "nearest"), [
    (2, "1x2x13x12x17", "x=1x2x12x12x16 or x=1x2x16x12x20"), (3, "1x2x121x160", "x=1x2x120x160 or x=1x2x128x160"),
    (4, "3x2x121", "x=3x2x112 or x=3x2x128"), (2, "1x2x3x3x3", "x=1x2x4x4x4"),
])
def test_the_nearest_extents_are_named(tmp_path: Path, levels: int, given: str, nearest: str) -> None:
    onnx.save(without_crops(levels, given.count("x") - 1), tmp_path / "m.onnx")
    lines = refused("plan", tmp_path / "m.onnx", "--shape", given).splitlines()
    assert lines[-1] == f"partition: nearest extents that work: {nearest}"
    for text in nearest.replace("x=", "").split(" or "):
        assert works("plan", tmp_path / "m.onnx", "--shape", text)


def test_a_head_of_one_size_names_the_size(tmp_path: Path) -> None:
    nodes = [Node("Conv", ["x", "w"], ["c"], pads=[1] * 4), Node("Flatten", ["c"], ["f"]),
             Node("Gemm", ["f", "g"], ["y"], name="head")]
    weights = {"w": kernel(3, 2, 2), "g": np.ones((3 * 12 * 12, 4), np.float32)}
    onnx.save(model(nodes, [value("x", ["n", 2, "h", "w_"])], [value("y", ["n", 4])], weights), tmp_path / "m.onnx")
    assert works("plan", tmp_path / "m.onnx", "--shape", "1x2x12x12")
    for given in ("1x2x16x18", "1x2x12x13", "2x2x9x9"):
        lines = refused("plan", tmp_path / "m.onnx", "--shape", given).splitlines()
        assert "head (Gemm)" in lines[0]
        assert lines[1].startswith("partition: nearest extents that work: x=")
        assert works("plan", tmp_path / "m.onnx", "--shape", lines[1].split("x=")[1].split(" or ")[0])


def test_two_volumes_that_must_agree_change_together(tmp_path: Path) -> None:
    twice = without_crops(2, 3)
    twice.graph.input.append(value("z", ["n2", 2, "b0", "b1", "b2"]))
    twice.graph.node.append(Node("Add", ["s0", "z"], ["y"], name="both"))
    del twice.graph.output[:]
    twice.graph.output.append(value("y", None))
    onnx.save(twice, tmp_path / "m.onnx")
    shapes = [f"--shape={name}=1x2x13x12x16" for name in "xz"]
    says = refused("plan", tmp_path / "m.onnx", *shapes)
    assert "nearest extents that work: x=1x2x12x12x16 or x=1x2x16x12x16" in says


@pytest.mark.parametrize(("cuts", "says"), [
    ("depth=2,5", "2 shards of axis 2"), ("depth=9", "between 0 and 7"), ("depth=-1", "between 0 and 7"),
    ("depth=", "2 shards"), ("depth", "2 shards"), ("height=3", "the mesh does not split that axis"),
    ("depth=a", "integers joined by commas"), ("dept=4", "no axis 'dept'; use batch, depth, height, width"),
])
def test_cuts_that_cannot_be(conv: Path, cuts: str, says: str) -> None:
    assert says in refused("plan", conv, "--mesh", "depth=2", "--cuts", cuts)


# --- inputs ------------------------------------------------------------------------------------------


@pytest.fixture
def files(conv: Path) -> Path:
    """A folder with a model and volumes that do not fit it."""
    folder = conv.parent
    np.save(folder / "rank.npy", volume(SHAPE[1:]))
    np.save(folder / "longer.npy", volume((1, 2, 8, 11, 5)))
    np.save(folder / "channels.npy", volume((1, 3, 7, 11, 5)))
    np.save(folder / "complex.npy", volume().astype(np.complex64))
    np.save(folder / "scalar.npy", np.float32(3))
    np.save(folder / "none.npy", volume((1, 2, 0, 11, 5)))
    np.savez(folder / "two.npz", a=volume(), b=volume())
    (folder / "cut.npy").write_bytes((folder / "x.npy").read_bytes()[:500])
    (folder / "x.png").write_bytes(b"II*\0")
    (folder / "is.npy").mkdir()
    return folder


@pytest.mark.parametrize(("given", "says"), [
    ("rank.npy", "has 5 axes"), ("longer.npy", "not 1x2x8x11x5"), ("channels.npy", "not 1x3x7x11x5"),
    ("complex.npy", "complex64"), ("scalar.npy", "has 5 axes"), ("none.npy", "1x2x0x11x5"),
    ("two.npz", "holds a, b, none of them 'x'"), ("cut.npy", "cut short"), ("x.png", "no known kind"),
    ("is.npy", "is a folder"), ("gone.npy", "no such file"), ("z=x.npy", "input 'z' is unknown; the model has x"),
    ("x=", "names no file"), ("", "names no file"), ("=", "unknown"), ("x=gone.npy", "no such file"),
])
def test_inputs_that_do_not_fit(files: Path, given: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    before = sorted(os.listdir(files))
    assert says in refused("run", "conv.onnx", "--mesh", "depth=2", "--input", given, "--output", "y.npy")
    assert says in refused("verify", "conv.onnx", "--mesh", "depth=2", "--input", given)
    assert sorted(os.listdir(files)) == before


def test_files_and_names_of_several_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = model([Node("Add", ["a", "b"], ["s"], name="s"), Node("Relu", ["s"], ["r"], name="r")],
                [value("a", SHAPE), value("b", SHAPE)], [value("s", SHAPE), value("r", SHAPE)])
    onnx.save(two, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", volume())
    monkeypatch.chdir(tmp_path)

    def run(inputs: list[str], outputs: list[str]) -> str:
        return refused("run", "m.onnx", *[f"--input={i}" for i in inputs], *[f"--output={o}" for o in outputs])

    assert "input file x.npy: the model has 2 inputs (a, b); write NAME=x.npy" in run(["x.npy"], ["s.npz"])
    assert "input 'b' has no file; add --input b=FILE" in run(["a=x.npy"], ["s.npz"])
    assert "output 'r' has no file" in run(["a=x.npy", "b=x.npy"], ["s=y.npy"])
    assert "output 's' is given twice, as y.npy and z.npy" in run(["a=x.npy", "b=x.npy"], ["s=y.npy", "s=z.npy"])
    assert "holds one array, not 2 (s, r)" in run(["a=x.npy", "b=x.npy"], ["s=y.npy", "r=y.npy"])
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "x.npy"]


def test_one_output_is_not_given_twice(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    says = refused("run", "conv.onnx", "--input", "x.npy", "--output", "y.npy", "--output", "z.npy")
    assert "output 'y' is given twice, as y.npy and z.npy; give one file" in says


# --- outputs -----------------------------------------------------------------------------------------


@pytest.fixture
def places(conv: Path) -> Path:
    (conv.parent / "folder.npy").mkdir()
    os.mkfifo(conv.parent / "pipe.npy")
    return conv.parent


@pytest.mark.parametrize(("target", "says"), [
    ("no/y.npy", "does not exist"), ("x.npy/y.npy", "does not exist"), ("folder.npy", "is a folder"),
    ("pipe.npy", "no regular file"), ("y.png", "no known kind"), ("y", "no known kind"), ("", "names no file"),
    ("/proc/y.npy", ": "), ("/proc/self/y.npy", ": "), ("/dev/full", ": "),
])
def test_outputs_that_cannot_be_written(places: Path, target: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    before = sorted(os.listdir(places))
    assert says in refused("run", "conv.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output", target)
    assert sorted(os.listdir(places)) == before


@pytest.mark.parametrize("emit", ["plan", "devices", "text"])
@pytest.mark.parametrize(("target", "says"), [
    ("no/p.onnx", "does not exist"), ("x.npy/p.onnx", "does not exist"), ("folder.npy", "is a folder"),
    ("pipe.npy", "no regular file"), ("", "is a folder"), (".", "is a folder"), ("/dev/full", "no regular file"),
    ("/proc/self/p.onnx", "cannot be written"), ("p" * 300, "cannot be written (File name too long)"),
])
def test_plans_that_cannot_be_written(places: Path, emit: str, target: str, says: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    before = sorted(os.listdir(places))
    assert says in refused("compile", "conv.onnx", "--mesh", "depth=2", "--emit", emit, "-o", target)
    assert sorted(os.listdir(places)) == before
    assert not os.path.isfile("/dev/full")


def test_dumps_that_cannot_be_written(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    for target in ("x.npy", "x.npy/dump", "/proc/dump"):
        assert "choose another --dump-dir" in refused("compile", "conv.onnx", "-o", "p.onnx", "--dump-dir", target)
    assert not Path("p.onnx").exists()


def test_compile_needs_a_file_to_write(conv: Path) -> None:
    assert "name the file to write with -o FILE" in refused("compile", conv)


def limited(folder: Path, kilobytes: int, *arguments: str) -> tuple[int, str]:
    """A command in a process that may write files of a few kilobytes only, which is how a full disk looks."""
    script = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
              f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, {kilobytes << 10})); "
              "from partitioner.cli import main; sys.exit(main())")
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=folder, env=environment(), text=True,
                          capture_output=True, timeout=120, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [
    ("compile", "conv.onnx", "--mesh", "depth=2", "-o", "old.onnx"),
    ("run", "conv.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output", "old.npy"),
    ("run", "conv.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output", "old.nii.gz"),
])
def test_a_full_disk_leaves_the_old_file(conv: Path, arguments: tuple[str, ...]) -> None:
    target = conv.parent / arguments[-1]
    target.write_bytes(b"old")
    before = sorted(os.listdir(conv.parent))
    code, err = limited(conv.parent, 1, *arguments)
    assert code in (1, 2)
    check_message(err)
    assert arguments[-1] in err
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(conv.parent)) == before


def test_a_full_disk_for_temporary_files(conv: Path) -> None:
    code, err = limited(conv.parent, 1, "run", "conv.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output",
                        "y.npy", "--backend", "gloo")
    check_message(err)
    assert code == 1 and "TMPDIR" in err
    assert not (conv.parent / "y.npy").exists()


def test_large_weights_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit: two files, both with their names and permissions only when they are whole."""
    monkeypatch.setattr(loader, "LARGEST_FILE", 500)
    plan = pt.partition(convolution(), mesh="depth=2")
    plan.save(tmp_path / "p.onnx")
    assert sorted(os.listdir(tmp_path)) == ["p.onnx", "p.onnx.data"]
    modes = {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert len(modes) == 1
    again = pt.load(tmp_path / "p.onnx")
    assert np.array_equal(again.run({"x": volume()})["y"], plan.run({"x": volume()})["y"])
    again.save(tmp_path / "p.onnx")  # onto the weights that it reads
    assert np.array_equal(pt.load(tmp_path / "p.onnx").run({"x": volume()})["y"], plan.run({"x": volume()})["y"])
    data = bytearray((tmp_path / "p.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "p.onnx.data").write_bytes(data)
    with pytest.raises(pt.PartitionError, match=r"the plan is damaged \(it is not as it was written\)"):
        pt.load(tmp_path / "p.onnx")


def test_a_link_keeps_pointing_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to("real/p.onnx")
    pt.partition(convolution(), mesh="depth=2").save(tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink() and pt.load(tmp_path / "real" / "p.onnx").mesh.size == 2


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.onnx").write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_model(ir.from_proto(convolution()), tmp_path / "p.onnx")
    assert os.listdir(tmp_path) == ["p.onnx"] and (tmp_path / "p.onnx").read_bytes() == b"old"


# --- devices, backends, options ----------------------------------------------------------------------


@pytest.mark.parametrize(("options", "says"), [
    (("--device", "cuda"), "GPU"), (("--device", "cuda:0"), "GPU"), (("--device", "cpu,cuda"), "GPU"),
    (("--device", "tpu"), "device 'tpu' is unknown; use cpu, cuda"), (("--device", ""), "unknown"),
    (("--device", "meta"), "cannot be used"), (("--device", "cuda:"), "unknown"),
    (("--backend", "nccl"), "backend nccl: torch finds no GPU here; use --backend gloo"),
    (("--backend", "nccl", "--device", "cuda"), "device 'cuda': torch finds no GPU here"),
    (("--backend", "gloo", "--device", "tpu"), "device 'tpu' is unknown"),
])
@pytest.mark.parametrize("command", ["run", "verify"])
def test_devices_that_are_not_here(conv: Path, command: str, options: tuple[str, ...], says: str,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    output = ["--output", conv.parent / "y.npy"] if command == "run" else []
    assert says in refused(command, conv, "--mesh", "depth=2", "--input", conv.parent / "x.npy", *output, *options)
    assert not (conv.parent / "y.npy").exists()


@pytest.mark.parametrize(("arguments", "says"), [
    ((), "partition: the following arguments are required: COMMAND; see partition --help"),
    (("frob",), "invalid choice: 'frob'"), (("plan",), "plan: the following arguments are required: MODEL"),
    (("run", "m.onnx"), "run: the following arguments are required: --input, --output; see partition run --help"),
    (("run", "m", "--input", "x", "--output", "y", "--backend", "mpi"), "run: argument --backend: invalid choice"),
    (("plan", "m.onnx", "--frob"), "unrecognized arguments: --frob"),
    (("plan", "m", "--mesh"), "expected one argument"),
    (("verify", "m", "--tolerance", "x"), "verify: argument --tolerance: invalid tolerance value"),
])
def test_mistakes_on_the_command_line_take_one_line(arguments: tuple[str, ...], says: str) -> None:
    err = refused(*arguments)
    assert says in err and len(err.splitlines()) == 1


def test_a_real_process_says_one_line_and_exits_with_two(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("hello")
    done = run_apart("plan", "a.onnx", "--mesh", "depth=2", cwd=tmp_path)
    expected = "partition: a.onnx: is not an ONNX file, or it is cut off; export or copy it again\n"
    assert (done.code, done.out, done.err) == (2, "", expected)


def test_our_own_faults_are_one_line_too(conv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[str]:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr("partitioner.options.load_file", fail)
    done = run_here("plan", conv)
    assert done.code == 1 and done.err.startswith("partition: internal error: ZeroDivisionError: division by zero; set")
    assert len(done.err.splitlines()) == 1
    monkeypatch.setenv("PARTITIONER_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run_here("plan", conv)


# --- signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code", "says"), [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM"),
    (signal.SIGHUP, 129, "ended by SIGHUP"),
])
def test_a_signal_ends_in_good_order(conv: Path, number: int, code: int, says: str,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the run, once and again while it cleans up."""
    seen: list[list[str]] = []

    def hit(*_: object) -> None:
        seen.append(sorted(p.name for p in conv.parent.iterdir()))
        os.kill(os.getpid(), number)

    def interrupted(*arguments: object) -> object:
        job = file_run(*arguments)  # type: ignore[arg-type]
        return type("Job", (), {"run": lambda _, progress: job.run(hit)})()

    monkeypatch.setattr("partitioner.options.file_run", interrupted)
    (conv.parent / "y.npy").write_bytes(b"old")
    before = signal.getsignal(number)
    found = run_here("run", conv, "--mesh", "depth=2", "--input", conv.parent / "x.npy", "--output",
                     conv.parent / "y.npy", "--overwrite")
    assert (found.code, found.err) == (code, f"partition: {says}; no output was written\n")
    assert len(seen) == 1 and any(name.endswith(".part") for name in seen[0])
    assert sorted(os.listdir(conv.parent)) == ["conv.onnx", "x.npy", "y.npy"]
    assert (conv.parent / "y.npy").read_bytes() == b"old"
    assert signal.getsignal(number) == before


def test_a_signal_while_the_command_starts(conv: Path) -> None:
    process = start("plan", "/dev/stdin", conv)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code in (-signal.SIGTERM, 143, 2)
