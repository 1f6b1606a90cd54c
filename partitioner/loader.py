"""Reading and writing ONNX models: a file, an `onnx.ModelProto`, an `onnx_ir.Model`."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect, seal
from partitioner.errors import PartitionError, refuse_all

MINIMUM_OPSET = 7

LARGEST_FILE = 1_500_000_000
"""Bytes of weights that go into the ONNX file itself, whose format ends at 2 GiB."""


def load_model(source: Any) -> ir.Model:
    """A private copy of a model, its weights still on disk where they were.

    Raises:
        PartitionError: when the source is no ONNX model, is damaged, or lacks its weights.
    """
    if isinstance(source, str | os.PathLike):
        return load_file(Path(source))
    if isinstance(source, ir.Model):
        return _checked(_clone(source), "the model given", None)
    if type(source).__name__ == "ModelProto":
        return _checked(_from_proto(source, "the model given"), "the model given", None)
    raise PartitionError(
        f"cannot read a model from {type(source).__name__}; give a path, an onnx.ModelProto, an onnx_ir.Model "
        "or a torch.nn.Module with an example input"
    )


def load_file(path: Path) -> ir.Model:
    """A model from an ONNX file; weights in external files are mapped, not read.

    Raises:
        PartitionError: when there is no such file, it is no ONNX model, it is cut off, or weights are missing.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if path.is_dir():
            raise PartitionError(f"{path}: is a folder; give the path of an .onnx file")
        if path.exists() and not path.is_file():
            raise PartitionError(f"{path}: is no regular file; give the path of an .onnx file")
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (FileNotFoundError, NotADirectoryError):
        raise PartitionError(f"{path}: no such file; give the path of an .onnx file") from None
    except OSError as error:
        raise PartitionError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (DecodeError, ValueError, UnicodeDecodeError):
        raise PartitionError(f"{path}: is not an ONNX file, or it is cut off; export or copy it again") from None
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise PartitionError(f"{path}: is not an ONNX model, or it is cut off; export or copy it again")
    return _checked(_from_proto(proto, str(path)), str(path), path.parent)


def _from_proto(proto: Any, where: str) -> ir.Model:
    try:
        _make_dense(proto.graph)
        with _hushed("onnx_ir"):
            return ir.from_proto(proto)
    except Exception as error:
        raise PartitionError(f"{where}: is damaged ({_first_line(error)}); export or copy it again") from None


def _make_dense(graph: Any) -> None:
    """Sparse constants and initialisers as dense ones, which all else reads."""
    for sparse in graph.sparse_initializer:
        dense = _dense(sparse)
        dense.name = sparse.values.name
        graph.initializer.append(dense)
    graph.ClearField("sparse_initializer")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                dense = _dense(attribute.sparse_tensor)
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", 4  # TENSOR
                attribute.t.CopyFrom(dense)
            if attribute.HasField("g"):
                _make_dense(attribute.g)


def _dense(sparse: Any) -> Any:
    from onnx import numpy_helper

    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    found = np.zeros(tuple(sparse.dims), values.dtype)
    if places.ndim == 1:
        found.reshape(-1)[places] = values
    else:
        found[tuple(places.T)] = values
    return numpy_helper.from_array(found)


@contextlib.contextmanager
def _hushed(name: str) -> Generator[None]:
    """Without the remarks of a library, which we repeat in words of our own."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _clone(model: ir.Model) -> ir.Model:
    try:
        return model.clone()
    except RuntimeError:
        raise PartitionError("the model given: its nodes are not in order; sort its graph") from None


def _checked(model: ir.Model, where: str, folder: Path | None) -> ir.Model:
    """The model when it is sound, its weights looked for in a folder (None: where it says itself)."""
    _check_weights(model, where, folder)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
        for function in model.functions.values():
            ir.external_data.set_base_dir(function.graph, folder)
    _check_model(model, where)
    return model


def _first_line(error: BaseException) -> str:
    """What the innermost error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check_model(model: ir.Model, where: str) -> None:
    problems = [*_wrong_opsets(model, where)]
    if not model.graph.outputs:
        problems.append(f"{where}: the graph has no outputs; export the model again")
    elif not len(model.graph):
        problems.append(f"{where}: the graph has no operators; export the model again")
    for value in model.graph.inputs:
        if value.shape is not None and any(isinstance(n, int) and n < 1 for n in value.shape):
            problems.append(f"{where}: input '{value.name}' has an axis without cells ({value.shape}); "
                            "export it with dynamic axes or other extents")
    defined = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        defined |= {v.name for v in node.outputs}
    problems += [f"{where}: '{name}' is read but never defined; the file is damaged"
                 for name in sorted(set(_undefined(model, defined)))]
    refuse_all(problems)
    if _is_unsorted(model):
        _sort(model, where)


def _wrong_opsets(model: ir.Model, where: str) -> Iterator[str]:
    import onnx

    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        yield f"{where}: names no opset of the standard operators; export the model again"
    elif opset < MINIMUM_OPSET:
        yield f"{where}: is in opset {opset}; export with opset {MINIMUM_OPSET} or newer"
    elif opset > newest:
        yield f"{where}: is in opset {opset}, the newest known here is {newest}; export with that or an older one"
    if dialect.DOMAIN in model.graph.opset_imports and not dialect.is_plan(model) and _has_exchanges(model):
        yield f"{where}: is a plan that has lost its metadata; compile the model again"


def _has_exchanges(model: ir.Model) -> bool:
    return any(dialect.is_communication(node) for node in model.graph)


def _undefined(model: ir.Model, defined: set[str | None]) -> Iterator[str]:
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name and value.name not in defined:
                yield str(value.name)
    for value in model.graph.outputs:
        if value.name not in defined:
            yield str(value.name)


def fault_of(model: ir.Model) -> str | None:
    """What the ONNX checker has to say against a model; None when nothing, or when it cannot tell."""
    import onnx

    try:
        proto = ir.to_proto(model)
    except Exception as error:
        return _first_line(error)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return _first_line(error)
    except ValueError:  # larger than the checker takes
        return None
    return None


def _is_unsorted(model: ir.Model) -> bool:
    seen: set[ir.Node] = set()
    for node in model.graph:
        producers = {v.producer() for v in node.inputs if v is not None} - {None}
        if not producers <= seen:
            return True
        seen.add(node)
    return False


def _sort(model: ir.Model, where: str) -> None:
    """Put the nodes in an order in which each comes after those that it reads."""
    try:
        model.graph.sort()
    except ValueError:
        raise PartitionError(f"{where}: the nodes form a circle; export the model again") from None


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.value


def _check_weights(model: ir.Model, where: str, folder: Path | None) -> None:
    """Every weight is complete, and lies inside the model's folder."""
    found = [_external_problem(t, folder) if isinstance(t, ir.ExternalTensor) else _inner_problem(t)
             for t in _tensors(model)]
    refuse_all([f"{where}: {problem}" for problem in found if problem is not None])


def _inner_problem(tensor: ir.TensorProtocol) -> str | None:
    problem = f"weight '{tensor.name}' is damaged; export or copy the model again"
    proto: Any = getattr(tensor, "raw", None)
    try:
        if tensor.dtype == ir.DataType.STRING:
            return None
        size = tensor.nbytes
        is_raw = hasattr(proto, "raw_data") and proto.HasField("raw_data")
        return problem if is_raw and len(proto.raw_data) != size else None
    except (TypeError, ValueError):  # a type that does not exist
        return problem


def _external_problem(tensor: ir.ExternalTensor, folder: Path | None) -> str | None:
    location = str(tensor.location)
    home = Path(tensor.base_dir or ".").resolve() if folder is None else folder.resolve()
    file = (home / location).resolve()
    offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if Path(location).is_absolute() or not file.is_relative_to(home):
        link = f", a link to {file}" if os.path.islink(home / location) else ""
        return f"weight '{tensor.name}' points outside the model's folder ({location}{link}); copy the file into it"
    if not file.is_file():
        return f"weight '{tensor.name}' lies in {location}, which is missing; copy it beside the model"
    if offset < 0 or length < tensor.nbytes:
        return f"weight '{tensor.name}' is damaged ({length} bytes at {offset} of {location}); export the model again"
    if offset + length > file.stat().st_size:
        return f"weight '{tensor.name}' reaches beyond the end of {location}; the file is cut off, copy it again"
    return None


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model beside and rename; weights of more than 1.5 GB in total go into one `.data` file.

    A plan is sealed.  The model given is used up.

    Raises:
        PartitionError: when the path cannot be written.
    """
    with _replacing(path) as (temporary, real):
        large = sum(t.nbytes for t in _tensors(model)) > LARGEST_FILE
        if not large:
            _inline(model)
        if dialect.is_plan(model):
            seal.seal(model)
        data = real.name + ".data"
        ir.save(model, temporary, format="protobuf", external_data=data if large else None)
        if large:
            _rename(temporary.with_name(data), real.with_name(data))


def write_text(path: Path, text: str) -> None:
    """Write a text file beside and rename.

    Raises:
        PartitionError: when the path cannot be written.
    """
    with _replacing(path) as (temporary, _):
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside and rename.

    Raises:
        PartitionError: when the path cannot be written.
    """
    with _replacing(path) as (temporary, _):
        temporary.write_bytes(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Generator[tuple[Path, Path]]:
    """A path to write to, which takes the place of a file when the block succeeds, and that file's real path.

    Raises:
        PartitionError: when the path cannot be written; an older file stays as it was then.
    """
    work: str | None = None
    try:
        real = Path(os.path.realpath(path))
        if real.is_dir():
            raise PartitionError(f"{path}: is a folder; name a file in it")
        if real.exists() and not real.is_file():
            raise PartitionError(f"{path}: is no regular file and cannot be replaced; choose another path")
        if not real.parent.is_dir():
            raise PartitionError(f"{path}: the folder {real.parent} does not exist; create it first")
        work = tempfile.mkdtemp(prefix=".partition-", suffix=".tmp", dir=real.parent)
        temporary = Path(work) / real.name
        yield temporary, real
        _rename(temporary, real)
    except OSError as error:
        raise PartitionError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _rename(temporary: Path, real: Path) -> None:
    """Give a finished file its name, with the permissions of the file that it replaces or of any new one."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(real.stat().st_mode & 0o777 if real.exists() else 0o666 & ~mask)
    os.replace(temporary, real)


def _inline(model: ir.Model) -> None:
    """Bring mapped weights into memory, so that the file stands alone."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
