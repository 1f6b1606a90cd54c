"""At the borders of the command and of the API: faults that a hard review found."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import partitioner as pt
from tests.command import convolution, environment, finish, model, refused, run_apart, start, value, volume, works


@pytest.fixture
def here(tmp_path: Path) -> Path:
    onnx.save(convolution(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", volume())
    return tmp_path


def two_by_two(folder: Path) -> Path:
    """Inputs a and b, outputs y and z."""
    shape = (1, 2, 7)
    nodes = [helper.make_node("Add", ["a", "b"], ["y"]), helper.make_node("Sub", ["a", "b"], ["z"])]
    onnx.save(model(nodes, [value(n, shape) for n in "ab"], [value(n, shape) for n in "yz"]), folder / "two.onnx")
    for seed, name in enumerate("ab"):
        np.save(folder / f"{name}.npy", volume(shape, seed))
    return folder / "two.onnx"


# --- ranks that have not joined ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_for_others_can_be_ended(here: Path, number: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = start("run", "m.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output", "y.npy", cwd=here, RANK="0",
                    LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(number)
    begin = time.monotonic()
    found = finish(process, 20)
    assert time.monotonic() - begin < 10 and found.code == 128 + number
    assert "no output was written" in found.err and not (here / "y.npy").exists()


def test_a_rank_in_the_environment_does_not_silence_a_command(here: Path) -> None:
    found = run_apart("plan", "none.onnx", cwd=here, RANK="1")
    assert found.code == 2 and found.err.startswith("partition: none.onnx: no such file")


def test_a_rank_that_is_no_number(here: Path) -> None:
    found = run_apart("run", "m.onnx", "--input", "x.npy", "--output", "y.npy", cwd=here, RANK="x", WORLD_SIZE="2",
                      MASTER_ADDR="localhost")
    assert found.code == 2 and found.err.startswith("partition: the environment names no place among the ranks")


def test_a_full_standard_output_is_said_so(here: Path) -> None:
    for command in (["plan", "m.onnx"], ["plan", "m.onnx", "--json"], ["compile", "m.onnx", "--emit", "text"]):
        with open("/dev/full", "w") as full:
            found = subprocess.run([sys.executable, "-m", "partitioner.cli", *command], cwd=here, env=environment(),
                                   stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert found.returncode == 1
        assert found.stderr.startswith("partition: the standard output cannot be written (No space left on device)")
        assert len(found.stderr.splitlines()) == 1


# --- files ---------------------------------------------------------------------------------------------


def test_one_file_under_two_spellings_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_by_two(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = ["run", path, "--input", "a=a.npy", "--input", "b=b.npy"]
    assert "o.npy" in refused(*given, "--output", "y=o.npy", "--output", "z=./o.npy")
    works(*given, "--output", "y=o.npz", "--output", "z=./o.npz")
    found = np.load("o.npz")
    assert sorted(found) == ["y", "z"] and np.array_equal(found["y"], np.load("a.npy") + np.load("b.npy"))


def test_a_lone_array_is_not_two_inputs(tmp_path: Path) -> None:
    path = two_by_two(tmp_path)
    np.savez(tmp_path / "one.npz", x=volume((1, 2, 7)))
    said = refused("run", path, "--input", tmp_path / "one.npz", "--output", tmp_path / "o.npz")
    assert "has no array 'a', and is given for b too" in said


def test_paths_with_equals_signs(here: Path) -> None:
    folder = here / "depth=2 run"
    folder.mkdir()
    (folder / "x=1.npy").write_bytes((here / "x.npy").read_bytes())
    works("run", here / "m.onnx", "--input", folder / "x=1.npy", "--output", f"y={folder}/y=1.npy")
    assert (folder / "y=1.npy").exists()


def test_a_damaged_stored_member_is_refused(here: Path) -> None:
    np.savez(here / "f.npz", x=volume())
    content = bytearray((here / "f.npz").read_bytes())
    content[700] ^= 4
    (here / "f.npz").write_bytes(content)
    said = refused("run", here / "m.onnx", "--input", here / "f.npz", "--output", here / "y.npy")
    assert "damaged or cut short (Bad CRC-32" in said


# --- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "says"), [
    (["--mesh", "99999999999999999999x1x1"], "the mesh has more than 1048576 ranks"),
    (["--shape", "1x2x7x11x5", "--shape", "x=1x2x7x11x5"], "the shape of input 'x' is given twice"),
    (["--mesh", "depth=2", "--cuts", "depth=2", "--cuts", "depth=3"], "the cuts of depth are given twice"),
])
def test_options_that_contradict(here: Path, options: list[str], says: str) -> None:
    assert says in refused("plan", here / "m.onnx", *options)


@pytest.mark.parametrize("text", ["nan", "inf", "-1"])
def test_tolerances_that_are_none(here: Path, text: str) -> None:
    assert "invalid tolerance value" in refused("verify", here / "m.onnx", f"--tolerance={text}")


def test_same_padding_of_windows_shorter_than_their_stride_is_refused() -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], "pool", kernel_shape=[1, 3], strides=[3, 2],
                            auto_pad="SAME_UPPER")
    source = model([node], [value("x", (2, 4, 3, 10))], [value("y", None)], opset=19)
    with pytest.raises(pt.PartitionError, match=r"pool \(AveragePool\): auto_pad with a window of 1 cells at stride 3"):
        pt.partition(source, mesh="width=2")


def test_the_sign_of_what_is_no_number() -> None:
    node = helper.make_node("Sign", ["x"], ["y"], "sign")
    x = np.array([[[np.nan, np.inf, -np.inf, -0.0, 3.0]]], np.float32)
    source = model([node], [value("x", x.shape)], [value("y", x.shape)])
    found = pt.partition(source, mesh="width=2").run({"x": x})["y"]
    assert np.array_equal(found, np.sign(x), equal_nan=True)


# --- the API -------------------------------------------------------------------------------------------


def test_arguments_of_the_wrong_kind() -> None:
    plan = pt.partition(convolution(("n", 2, "d", "h", "w_")), mesh="depth=2", shapes={"x": (1, 2, 7, 11, 5)})
    wrong: list[Any] = [
        lambda: plan.with_shapes({"x": (1, 2, 7.0, 11, 5)}), lambda: plan.with_shapes({"x": (1, 2, 7)}),
        lambda: plan.with_shapes(None), lambda: plan.session(threads=1.5), lambda: plan.session(threads="2"),
        lambda: plan.save(None), lambda: pt.load(None), lambda: plan.session(device=None),
        lambda: plan.run({"x": np.ma.masked_less(volume(), 0)}),
    ]
    for call in wrong:
        with pytest.raises(pt.PartitionError, match=r"\A[^\n]+\Z"):
            call()
    with plan.session(device=torch.device("cpu")) as session:
        assert session.run({"x": volume()})["y"].shape == (1, 3, 7, 11, 5)


@pytest.mark.parametrize("backend", ["lockstep", "gloo"])
def test_one_session_in_several_threads(backend: Any) -> None:
    plan = pt.partition(convolution(), mesh="depth=2")
    inputs = [volume(seed=seed) for seed in range(8)]
    expected = [plan.run({"x": x})["y"] for x in inputs]
    found: dict[int, np.ndarray] = {}
    with plan.session(backend) as session:
        threads = [threading.Thread(target=lambda i=i: found.update({i: session.run({"x": inputs[i]})["y"]}))
                   for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(np.array_equal(found[i], y) for i, y in enumerate(expected))


def test_an_export_that_fails_says_why() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such layer")

    with pytest.raises(pt.PartitionError, match=r"\Atorch.onnx cannot export Odd: [^\n\x1b]*no such layer[^\n]*\Z"):
        pt.partition(Odd(), torch.zeros(1, 1, 4, 4))
