"""Reading ONNX models: from a file, an `onnx.ModelProto`, an `onnx_ir.Model` or a torch module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from partitioner.errors import PartitionError, refuse_all

MINIMUM_OPSET = 7


def load_model(source: Any) -> ir.Model:
    """A private copy of a model, its weights still on disk where they were.

    Raises:
        PartitionError: when the source is no ONNX model, is damaged, or lacks its weights.
    """
    if isinstance(source, str | os.PathLike):
        return load_file(Path(source))
    if isinstance(source, ir.Model):
        return source.clone()
    if type(source).__name__ == "ModelProto":
        model = ir.from_proto(source)
        _check_model(model, "the model given")
        return model
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

    if not path.exists():
        raise PartitionError(f"{path}: no such file; give the path of an .onnx file")
    if path.is_dir():
        raise PartitionError(f"{path}: is a folder; give the path of an .onnx file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise PartitionError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (DecodeError, ValueError, UnicodeDecodeError):
        raise PartitionError(f"{path}: is not an ONNX file, or it is cut off; export or copy it again") from None
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise PartitionError(f"{path}: is not an ONNX model, or it is cut off; export or copy it again")
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise PartitionError(f"{path}: is damaged ({_first_line(error)}); export or copy it again") from None
    _check_external(model, path)
    ir.external_data.set_base_dir(model.graph, path.parent)
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, path.parent)
    _check_model(model, str(path))
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check_model(model: ir.Model, where: str) -> None:
    problems: list[str] = []
    if not model.graph.outputs:
        problems.append(f"{where}: the graph has no outputs; export the model again")
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    if opset is None:
        problems.append(f"{where}: names no opset of the standard operators; export the model again")
    elif opset < MINIMUM_OPSET:
        problems.append(f"{where}: is in opset {opset}; export with opset {MINIMUM_OPSET} or newer")
    defined = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        defined |= {v.name for v in node.outputs}
    problems += [f"{where}: '{name}' is read but never defined; the file is damaged"
                 for name in sorted(_undefined(model, defined))]
    refuse_all(problems)


def _undefined(model: ir.Model, defined: set[str | None]) -> Iterator[str]:
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name and value.name not in defined:
                yield value.name
    for value in model.graph.outputs:
        if value.name not in defined:
            yield str(value.name)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.value


def _check_external(model: ir.Model, path: Path) -> None:
    """Every external weight lies inside the model's folder and is complete."""
    problems: list[str] = []
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = (folder / tensor.location).resolve()
        if Path(tensor.location).is_absolute() or not file.is_relative_to(folder):
            problems.append(f"{path}: weight '{tensor.name}' points outside the model's folder "
                            f"({tensor.location}); put the file beside the model")
        elif not file.is_file():
            problems.append(f"{path}: weight '{tensor.name}' lies in {tensor.location}, which is missing; "
                            "copy it beside the model")
        elif (tensor.offset or 0) + (tensor.length or tensor.nbytes) > file.stat().st_size:
            problems.append(f"{path}: weight '{tensor.name}' reaches beyond the end of {tensor.location}; "
                            "the file is cut off, copy it again")
    refuse_all(problems)


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model beside and rename; weights of more than 1.5 GB in total go into one `.data` file.

    Raises:
        PartitionError: when the path cannot be written.
    """
    large = sum(t.nbytes for t in _tensors(model)) > 1_500_000_000
    data = path.name + ".data" if large else None
    folder = path.parent
    if not folder.is_dir():
        raise PartitionError(f"{path}: the folder {folder} does not exist; make it first")
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        if data is not None:
            ir.save(model, temporary, external_data=data)
        else:
            _inline(model)
            ir.save(model, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise PartitionError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file beside and rename.

    Raises:
        PartitionError: when the path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PartitionError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None


def _inline(model: ir.Model) -> None:
    """Bring mapped weights into memory, so that the file stands alone."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
