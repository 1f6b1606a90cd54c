"""Writes the table of docs/operators.md from the registered operator classes: `python docs/generate_operators.py`.

Every cell is read off the operators' own examples, so the page says what the code does; a test fails when it is stale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from partitioner.loader import MINIMUM_OPSET
from partitioner.maps import Identity, Prefix, Shift, Suffix, Taps, TransposedWindow, Whole, WholeAligned, Window
from partitioner.ops import Need, NodeView, Operator, TensorType, registered
from partitioner.ops.base import Example

PAGE = Path(__file__).with_name("operators.md")
BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"
NEWEST_OPSET = 24
"""The newest opset of the oldest onnx package that is supported; a newer package gives the same page."""

KINDS = {Identity: "same cell", Shift: "shift", Window: "window", TransposedWindow: "transposed window",
         Taps: "taps", Prefix: "all before", Suffix: "all after", Whole: "whole", WholeAligned: "statistics"}
SAME = KINDS[Identity]
NOTHING = "nothing to send"


@dataclass(frozen=True)
class Row:
    """What the page says of one operator; per role of an axis the kinds of dependence seen in its examples."""

    name: str
    versions: tuple[int, ...]
    roles: tuple[tuple[str, ...], ...]
    communication: str
    in_place: bool

    @property
    def is_cell_by_cell(self) -> bool:
        """Whether every output cell depends on the same cell of the input alone."""
        return self.communication == NOTHING and {kind for role in self.roles for kind in role} <= {SAME}

    @property
    def head(self) -> tuple[str, str]:
        """Name and versions."""
        return self.name, ", ".join(map(str, self.versions))

    @property
    def mark(self) -> str:
        """Whether the kernel writes into given memory."""
        return "yes" if self.in_place else ""


def read(example: Example) -> Operator:
    """The operator of an example, its inputs known by extents alone."""
    given = [None if x is None else x if isinstance(x, tuple) else ir.tensor(x) for x in example.inputs]
    types = tuple(TensorType(x, example.dtype) if isinstance(x, tuple) else
                  None if x is None else TensorType(tuple(x.shape.numpy()), x.dtype) for x in given)
    constants = tuple(None if isinstance(x, tuple) else x for x in given)
    used = (True, *[False] * (example.outputs - 1))
    view = NodeView(example.op_type, example.opset, types, constants, example.attributes, used)
    return next(cls for domain, name, cls in registered() if (domain, name) == ("", example.op_type)).read(view)


def kinds_by_role(operators: Sequence[Operator]) -> tuple[tuple[str, ...], ...]:
    """The kinds of dependence of the batch, channel and spatial axes of the input with most axes.

    Axes of one cell that the result lacks are left out: they have nothing to be split.
    """
    found: tuple[dict[str, None], ...] = ({}, {}, {})
    for operator in operators:
        needs = max((n for n in operator.needs() if n is not None), key=len)
        for axis, need in enumerate(needs):
            if need.axis is not None or need.map.n_in > 1:
                found[min(axis, 2)][kind_of(need)] = None
    return tuple(tuple(kind for kind in KINDS.values() if kind in role) for role in found)


def kind_of(need: Need) -> str:
    """How an input axis depends on the output, in a word or two."""
    if need.axis is None:
        return KINDS[Whole]
    return SAME if need.map.is_identity else KINDS[type(need.map)]


def communication(operators: Sequence[Operator], roles: Sequence[Sequence[str]]) -> str:
    """What happens along an axis that the mesh splits (batch or spatial)."""
    kinds = {kind for role in (roles[0], roles[2]) for kind in role}
    if any(operator.reduction is not None for operator in operators):
        return "partial results, all-reduce"
    words = ["halo exchange"] if kinds - {SAME, KINDS[Whole]} else []
    words += ["gathered where needed whole"] if KINDS[Whole] in kinds else []
    return ", ".join(words) or NOTHING


def versions_of(name: str) -> tuple[int, ...]:
    """The operator's versions in force in the opsets that are read."""
    known = sorted({s.since_version for s in onnx.defs.get_all_schemas_with_history()
                    if s.name == name and s.domain == "" and not s.deprecated})
    first = max((v for v in known if v <= MINIMUM_OPSET), default=0)
    return tuple(v for v in known if first <= v <= NEWEST_OPSET)


def rows() -> Iterator[Row]:
    """One row per ONNX operator, by name."""
    for domain, name, cls in registered():
        if domain != "":
            continue
        operators = [read(example) for example in cls.examples if example.op_type == name]
        roles = kinds_by_role(operators)
        in_place = any(operator.writes_into for operator in operators)
        yield Row(name, versions_of(name), roles, communication(operators, roles), in_place)


def render(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def tables() -> str:
    """Operators that look around, then those that work cell by cell."""
    found = list(rows())
    wide = [(*row.head, *(", ".join(kinds) or "-" for kinds in row.roles), row.communication, row.mark)
            for row in found if not row.is_cell_by_cell]
    flat = [(*row.head, row.mark) for row in found if row.is_cell_by_cell]
    return "\n\n".join((
        f"{len(found)} operators: {len(wide)} that depend on more than the same cell, {len(flat)} that do not.",
        render(("operator", "ONNX versions", "batch", "channel", "spatial", "along a split axis", "in place"), wide),
        "Cell by cell, without any message:",
        render(("operator", "ONNX versions", "in place"), flat),
    ))


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
