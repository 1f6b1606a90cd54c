"""The seal of a saved plan: a digest of all that decides what it computes, so that no damage goes unseen.

    graph, attributes, layouts, schedule, weights  --BLAKE2b-->  metadata `partitioner.digest`

What other tools add (annotations, documentation, functions) is not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from partitioner import dialect


def seal(model: ir.Model) -> None:
    """Write the digest of a plan into its metadata."""
    dialect.set_digest(model, digest(model))


def is_intact(model: ir.Model) -> bool:
    """Whether a plan is the one that was sealed; the time is that of reading all weights once."""
    return dialect.get_digest(model) == digest(model)


def digest(model: ir.Model) -> str:
    """Two plans with the same digest compute the same in the same steps."""
    found = hashlib.blake2b(digest_size=16)
    for item in _content(model):
        found.update(len(item).to_bytes(8, "little"))
        found.update(item)
    return found.hexdigest()


def _content(model: ir.Model) -> Iterator[bytes]:
    graph = model.graph
    imports = sorted(graph.opset_imports.items())
    yield _line("plan", dialect.get_mesh(model), dialect.get_storage(model), dialect.get_passes(model), imports)
    if (schedule := dialect.get_schedule(model)) is not None:
        filed = sorted(str(v.name) for v in (*graph.inputs, *(o for n in graph for o in n.outputs))
                       if dialect.rests_in_file(v))
        yield _line("schedule", str(schedule), filed)
    yield _line("inputs", *map(_value, graph.inputs))
    for node in graph:
        names = [None if v is None else v.name for v in node.inputs]
        yield _line(node.domain, node.op_type, node.name or "", names, dialect.get_partial(node))
        if dialect.is_overlapped(node):
            yield _line("overlapped")
        yield _line(*map(_value, node.outputs))
        yield from _attributes(node.attributes.values())
    yield _line("outputs", *(v.name for v in graph.outputs))
    for name, value in sorted(graph.initializers.items()):
        yield _line(name)
        if value.const_value is not None:
            yield from _tensor(value.const_value)


def _line(*items: object) -> bytes:
    return repr(items).encode()


def _value(value: ir.Value) -> tuple[object, ...]:
    layout = str(dialect.get_layout(value)) if dialect.has_layout(value) else None
    return (value.name or "", str(value.dtype), str(value.shape), layout)


def _attributes(attributes: Iterable[ir.Attr]) -> Iterator[bytes]:
    for attribute in sorted(attributes, key=lambda a: a.name):
        if attribute.type == ir.AttributeType.TENSOR:
            yield _line(attribute.name)
            yield from _tensor(attribute.value)
        else:  # as it is stored: numbers in the precision of the file
            yield ir.to_proto(attribute).SerializeToString(deterministic=True)


def _tensor(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    yield _line(tensor.dtype.name, tuple(tensor.shape.numpy()))
    yield tensor.tobytes()
