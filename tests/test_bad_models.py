"""Files that hold no model, or one that cannot be: one clear line each, the right exit code, no traceback."""

from __future__ import annotations

import os
import random
import re
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import partitioner as pt
from partitioner.loader import load_file
from tests.command import (
    SHAPE,
    check_message,
    convolution,
    kernel,
    model,
    refused,
    run_apart,
    value,
    volume,
    works,
)
from tests.models import NETWORKS

Node = helper.make_node


# --- what is no model --------------------------------------------------------------------------------


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.onnx", "a.json", "a.textproto", "a.onnxtxt", "a"])
@pytest.mark.parametrize("content", [b"", b"hello world\n", b'{"graph": 1}', b"<a b c>", png(), b"\x93NUMPY\x01\x00",
                                     random.Random(0).randbytes(5000), bytes(range(256)) * 8])
def test_files_that_are_no_models(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{name}: is not an ONNX" in refused("plan", tmp_path / name, "--mesh", "depth=2")


def test_paths_that_are_no_files(tmp_path: Path, conv: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "is a folder" in refused("plan", tmp_path)
    assert "is a folder" in refused("plan", "")
    assert "no regular file" in refused("plan", tmp_path / "pipe.onnx")
    assert "no regular file" in refused("plan", "/dev/zero")
    for missing in (tmp_path / "none.onnx", conv / "below.onnx"):
        assert "no such file" in refused("plan", missing)
    assert "cannot be read (File name too long)" in refused("plan", tmp_path / ("a" * 300))


def test_a_model_cut_off_anywhere(tmp_path: Path, conv: Path) -> None:
    whole = conv.read_bytes()
    path = tmp_path / "cut.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(pt.PartitionError, match=r"\A[^\n]*cut\.onnx: [^\n]*\Z"):
            load_file(path)


def test_a_plan_cut_off_anywhere(tmp_path: Path, conv: Path) -> None:
    """What follows the graph and its metadata (functions, annotations) decides nothing, and is made again."""
    plan = pt.partition(conv, mesh="depth=2")
    plan.save(tmp_path / "plan.onnx")
    whole = (tmp_path / "plan.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    read = 0
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = pt.load(path)
        except pt.PartitionError as error:
            assert re.fullmatch(r"[^\n]*cut\.onnx: [^\n]*", str(error))
            continue
        read += 1
        assert np.array_equal(found.run({"x": volume()})["y"], plan.run({"x": volume()})["y"])
        onnx.checker.check_model(ir.to_proto(found.model), full_check=True)
    assert read < 5


def damaged(whole: bytes, source: random.Random) -> bytes:
    """Flipped bits, a piece that is missing, or one too many."""
    content = bytearray(whole)
    where = source.randrange(len(content))
    kind = source.random()
    if kind < 0.7:
        for _ in range(source.choice((1, 1, 3))):
            content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    elif kind < 0.85:
        del content[where : where + source.randrange(1, 99)]
    else:
        content[where:where] = source.randbytes(source.randrange(1, 20))
    return bytes(content)


def check_damaged_models(path: Path, rounds: int, seed: int) -> None:
    """A damaged model is refused, or its damage is in what does not matter."""
    whole, source = path.read_bytes(), random.Random(seed)
    bad = path.with_name("bad.onnx")
    count = 0
    for _ in range(rounds):
        bad.write_bytes(damaged(whole, source))
        try:
            pt.partition(bad, mesh="depth=2").to_dict()
        except pt.PartitionError as error:
            check_message("\n".join(f"partition: {line}" for line in str(error).splitlines()))
            count += 1
    assert count > rounds / 10


def test_damaged_models(conv: Path) -> None:
    check_damaged_models(conv, 250, 0)


@pytest.mark.slow
def test_many_damaged_models(conv: Path, tmp_path: Path) -> None:
    check_damaged_models(conv, 3000, 1)
    network = NETWORKS["unet3d-stride-instance"]
    check_damaged_models(network.export(tmp_path / "unet.onnx"), 1500, 2)


def test_the_libraries_keep_silent(tmp_path: Path) -> None:
    """What they have to say of a damaged file is ours to say."""
    bad = model([Node("Relu", ["nowhere"], ["y"], name="r")], [value("x", SHAPE)], [value("y", SHAPE)])
    onnx.save(bad, tmp_path / "bad.onnx")
    done = run_apart("plan", tmp_path / "bad.onnx")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"partition: {tmp_path}/bad.onnx: 'nowhere' is read but never defined; the file is damaged\n"


# --- models that are sound files and yet cannot be ---------------------------------------------------


def relu(name: str = "r") -> onnx.NodeProto:
    return Node("Relu", ["x"], ["y"], name=name)


X, Y = value("x", SHAPE), value("y", SHAPE)

UNSOUND = {
    "no operators": (model([], [X], [X]), "has no operators"),
    "no outputs": (model([relu()], [X], []), "has no outputs"),
    "an old opset": (model([relu()], [X], [Y], opset=5), "opset 5; export with opset 7 or newer"),
    "an opset to come": (model([relu()], [X], [Y], opset=999), "opset 999, the newest known here is"),
    "only another domain": (helper.make_model(helper.make_graph([relu()], "g", [X], [Y]), ir_version=9,
                                              opset_imports=[helper.make_opsetid("com.acme", 1)]), "names no opset"),
    "an axis of no cells": (model([relu()], [value("x", (1, 2, 0, 5))], [value("y", None)]), "axis without cells"),
    "a circle": (model([Node("Add", ["x", "z"], ["y"], name="a"), Node("Relu", ["y"], ["z"], name="b")], [X],
                       [value("z", SHAPE)]), "form a circle"),
    "two of a name": (model([relu("a"), relu("b")], [X], [Y]), "'y' is redeclared"),
    "an unknown input": (model([Node("Add", ["x", "w"], ["y"])], [X], [Y]), "'w' is read but never defined"),
    "no rank": (model([relu()], [value("x", None)], [Y]), "no declared rank"),
    "text": (model([relu()], [value("x", (3,), TensorProto.STRING)], [value("y", (3,), TensorProto.STRING)]),
             "is STRING, which the runtime cannot hold"),
    "complex numbers": (model([relu()], [value("x", (3,), TensorProto.COMPLEX64)],
                              [value("y", (3,), TensorProto.COMPLEX64)]), "is COMPLEX64"),
    "a constant": (model([Node("Identity", ["w"], ["c"])], [], [value("c", (2,))], {"w": np.ones(2, np.float32)}),
                   "the model has no inputs"),
    "an odd convolution": (model([Node("Conv", ["x", "w"], ["y"], name="c", pads=[1] * 4)], [X], [Y], {"w": kernel()}),
                           r"c (Conv): "),
    "too many channels": (model([Node("Conv", ["x", "w"], ["y"], name="c")], [value("x", (1, 3, 8, 8, 8))], [Y],
                                {"w": kernel()}), "3 channels"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_models(tmp_path: Path, name: str) -> None:
    found, says = UNSOUND[name]
    onnx.save(found, tmp_path / "m.onnx")
    assert says in refused("plan", tmp_path / "m.onnx")
    with pytest.raises(pt.PartitionError):
        pt.partition(found)
    if name != "a circle":  # onnx_ir reads it, but cannot copy it
        with pytest.raises(pt.PartitionError):
            pt.partition(ir.from_proto(found)) if name != "two of a name" else pt.partition(found)


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [Node("Relu", ["t"], ["y"], name="b"), Node("Tanh", ["x"], ["t"], name="a")]
    found = pt.partition(model(nodes, [X], [Y]), mesh="depth=2").run({"x": volume()})["y"]
    assert np.allclose(found, np.maximum(np.tanh(volume()), 0), atol=1e-6)


def test_every_unsupported_operator_is_listed_at_once(tmp_path: Path) -> None:
    body = helper.make_graph([Node("Concat", ["i", "i"], ["j"], axis=0)], "b",
                             [value("n", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("i", [1])],
                             [value("c", [], TensorProto.BOOL), value("j", [1])])
    nodes = [
        Node("NonZero", ["x"], ["a"], name="where"), Node("Frobnicate", ["x"], ["f"], name="frob", domain="com.acme"),
        Node("LSTM", ["x", "w", "w"], ["l"], name="rnn", hidden_size=3), Node("Relu", ["f"], ["r"], name="fine"),
        Node("Multinomial", ["r"], ["d"]), Node("Loop", ["", "", "x"], ["o"], name="again", body=body),
        Node("Unique", ["x"], ["z"], name="once"),
    ]
    outputs = [value(n, None) for n in ("a", "l", "d", "o", "z")]
    weights = {"w": np.ones((1, 2, 2), np.float32)}
    onnx.save(model(nodes, [X], outputs, weights, domains=["com.acme"]), tmp_path / "m.onnx")
    lines = refused("plan", tmp_path / "m.onnx", "--mesh", "depth=2").splitlines()
    named = ["where (NonZero)", "frob (com.acme.Frobnicate)", "rnn (LSTM)", "Multinomial_4 (Multinomial)",
             "again (Loop)", "once (Unique)"]
    assert len(lines) == len(named)
    for name, line in zip(named, lines, strict=True):
        assert line.startswith(f"partition: {name}: ") and len(line) > len(name) + 20


# --- weights in files of their own -------------------------------------------------------------------


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model whose weight lies in w.bin beside it."""
    (tmp_path / "m").mkdir()
    onnx.save(convolution(), tmp_path / "m" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    return tmp_path / "m" / "m.onnx"


def relocate(path: Path, **entries: str) -> None:
    """Rewrite where the weight lies."""
    found = onnx.load(path, load_external_data=False)
    (tensor,) = found.graph.initializer
    kept = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, text in kept.items():
        tensor.external_data.add(key=key, value=text)
    onnx.save(found, path)


def test_weights_in_a_file_of_their_own(external: Path) -> None:
    expected = pt.partition(convolution(), mesh="depth=2").run({"x": volume()})["y"]
    for source in (external, onnx.load(external), ir.load(external)):
        assert np.array_equal(pt.partition(source, mesh="depth=2").run({"x": volume()})["y"], expected)
    (external.parent / "sub").mkdir()
    (external.parent / "w.bin").rename(external.parent / "sub" / "w.bin")
    (external.parent / "w.bin").symlink_to("sub/w.bin")
    assert works("plan", external)


def test_weights_that_are_missing_or_cut_off(external: Path) -> None:
    data = external.parent / "w.bin"
    whole = data.read_bytes()
    for length in (0, 1, len(whole) - 1):
        data.write_bytes(whole[:length])
        assert "m.onnx: weight 'w' reaches beyond the end of w.bin; the file is cut off" in refused("plan", external)
    data.unlink()
    assert "m.onnx: weight 'w' lies in w.bin, which is missing" in refused("plan", external)
    data.mkdir()
    assert "missing" in refused("plan", external)
    data.rmdir()
    with pytest.raises(pt.PartitionError, match=r"the model given: weight 'w' lies in w\.bin, which is missing"):
        pt.partition(onnx.load(external, load_external_data=False))


def test_weights_outside_the_folder(external: Path, tmp_path: Path) -> None:
    data = external.parent / "w.bin"
    elsewhere = data.rename(tmp_path / "w.bin")
    for location in ("../w.bin", "../../" * 20 + "etc/passwd", str(elsewhere), "sub/../../w.bin"):
        relocate(external, location=location)
        assert "points outside the model's folder" in refused("plan", external)
    relocate(external, location="w.bin")
    data.symlink_to(elsewhere)
    assert f"points outside the model's folder (w.bin, a link to {elsewhere})" in refused("plan", external)


def test_weights_of_another_size(external: Path) -> None:
    relocate(external, length="4")
    assert "'w' is damaged (4 bytes at 0 of w.bin)" in refused("plan", external)
    relocate(external, length="100000")
    assert "beyond the end" in refused("plan", external)
    relocate(external, length="648", offset="-648")
    assert "damaged" in refused("plan", external) or "beyond" in refused("plan", external)
