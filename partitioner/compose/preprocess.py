"""What exporters leave out: intensity windows, z-scores, the files' element type and axis order.

    before                         after  --preprocess dtype=int16 --preprocess window=-160:240
    volume float32                 volume int16
    ... = Conv(volume)             a = Cast(volume)  float32
                                   b = Clip(a, -160, 240)
                                   c = Div(Sub(b, -160), 400)
                                   ... = Conv(c)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from partitioner.axes import named_axes
from partitioner.compose.graph import (
    Writer,
    copied,
    find_input,
    input_names,
    new_input,
    set_output,
    take_input,
)
from partitioner.compose.steps import KNOWN_STEPS, AxisOrder, FileType, Place, Step, parse_step
from partitioner.compose.words import split_name
from partitioner.errors import PartitionError, refuse_all

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def with_preprocess(model: ir.Model, steps: Sequence[str],
                    parts: Mapping[str, Sequence[str]] | None = None) -> ir.Model:
    """A model that takes its inputs as files hold them.

    Steps are done in order, in float32 (float64 for a model in float64).  `dtype` and `axes` say how the file lies
    and come first wherever they stand; outputs go back to the file's order of axes.

    Args:
        steps: `[NAME=]` and `window=-160:240`, `clip=LOW:HIGH`, `normalize=MEAN:DEVIATION`, `zscore`,
            `zscore=nonzero`, `dtype=int16` or `axes=zyx`; the name where there are several inputs.
        parts: names that stand for several inputs.

    Raises:
        PartitionError: for an unknown step or input, or a step that cannot be done there.
    """
    found = copied(model)
    chains = _chains(found, steps, parts or {})
    places = {name: _place(found, name) for name in chains}
    refuse_all([f"--preprocess {text} on input '{name}': {problem}" for name, chain in chains.items()
                for text, step in chain.items() if (problem := _problem(found, step, places[name])) is not None])
    orders = {name: step for name, chain in chains.items() for step in chain.values() if isinstance(step, AxisOrder)}
    refuse_all(_order_problems(orders))
    for name, chain in chains.items():
        _lead_in(found, places[name], list(chain.values()))
    if orders:
        name, order = next(iter(orders.items()))
        _lead_out(found, order.permutation(places[name]))
    return found


def _chains(model: ir.Model, steps: Sequence[str], parts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Step]]:
    """Per input its steps, by what the user wrote."""
    inside = {part for group in parts.values() for part in group}
    heads = [*parts, *(name for name in input_names(model) if name not in inside)]
    found: dict[str, dict[str, Step]] = {}
    problems: list[str] = []
    for text in steps:
        try:
            name, word = split_name(text, heads + [p for p in inside if str(text).startswith(f"{p}=")], KNOWN_STEPS,
                                    "--preprocess", "input")
            step = parse_step(text, word)
        except PartitionError as error:
            problems.append(str(error))
            continue
        for part in parts.get(name, [name]):
            chain = found.setdefault(part, {})
            if any(type(step) is type(other) for other in chain.values()) and isinstance(step, FileType | AxisOrder):
                problems.append(f"--preprocess {text}: {word.partition('=')[0]} of input '{part}' is given twice; "
                                "give one")
            chain[text] = step
    refuse_all(problems)
    return found


def _place(model: ir.Model, name: str) -> Place:
    value = find_input(model, name)
    if value.shape is None or value.dtype is None or len(value.shape) < 2:
        raise PartitionError(f"--preprocess: input '{name}' has no declared type and channels; leave it out")
    rank = len(value.shape)
    taken = named_axes(model)[name]
    channels = next(a for a in range(rank) if a not in taken.values()) if len(taken) == rank - 1 else 1
    return Place(name, ir.DataType.FLOAT if value.dtype in _HALVES else value.dtype, value.shape, channels)


def _problem(model: ir.Model, step: Step, place: Place) -> str | None:
    target = find_input(model, place.input).dtype
    assert target is not None
    if isinstance(step, FileType):
        loses = step.dtype.is_floating_point() and not target.is_floating_point()
        return f"the model takes {target.name}, which would lose the fractions; convert the file" if loses else None
    if not isinstance(step, AxisOrder) and not target.is_floating_point():
        return f"the model takes {target.name}, which holds no fractions; prepare the file, or export for float32"
    return step.problem(place)


def _order_problems(orders: Mapping[str, AxisOrder]) -> list[str]:
    if len(set(orders.values())) < 2:
        return []
    return [f"--preprocess axes: the inputs {', '.join(orders)} have different orders, so that the outputs have none; "
            "give the files in one order"]


def _lead_in(model: ir.Model, place: Place, chain: Sequence[Step]) -> None:
    """Put an input of the file's type and order, and the steps, before an input's readers."""
    old = find_input(model, place.input)
    target = old.dtype
    order = next((s.permutation(place) for s in chain if isinstance(s, AxisOrder)), None)
    computes = any(not isinstance(s, FileType | AxisOrder) for s in chain)
    type_given = next((s.dtype for s in chain if isinstance(s, FileType)), None)
    inner = place.dtype if computes else target
    kind = type_given or inner
    value = new_input(place.input, kind, _file_shape(place.shape, order))
    take_input(model, old, [value])
    writer = Writer(model, place.input, in_front=True)
    x = value if order is None else writer.op("Transpose", value, perm=order)
    x = x if kind == inner or inner is None else writer.cast(x, inner)
    for step in chain:
        x = step.write(writer, x, place)
    x = x if inner == target or target is None else writer.cast(x, target)
    old.replace_all_uses_with(x)


def _file_shape(shape: ir.Shape, order: Sequence[int] | None) -> ir.Shape:
    """Extents as the file has them: those that the Transpose brings into the network's order."""
    return shape.copy() if order is None else ir.Shape([shape[order.index(axis)] for axis in range(len(shape))])


def _lead_out(model: ir.Model, order: Sequence[int]) -> None:
    """Bring the outputs that have the volume's axes back into the file's order."""
    back = [list(order).index(axis) for axis in range(len(order))]
    for index, value in enumerate(list(model.graph.outputs)):
        if value.shape is None or len(value.shape) != len(order):
            continue
        made = Writer(model, str(value.name)).op("Transpose", value, perm=back)
        set_output(model, index, made, value.dtype, ir.Shape([value.shape[axis] for axis in back]))


