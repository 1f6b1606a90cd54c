"""Writes the tables of docs/operators.md from the registered operator classes: `python docs/generate_operators.py`.

Every cell is read off the operators' own examples, so the page says what the code does; a test fails when it is stale.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.conformance_cases import load_cases, operator_under_test
from partitioner import dialect
from partitioner.loader import MINIMUM_OPSET
from partitioner.maps import (
    Flat,
    Identity,
    Prefix,
    Rows,
    Shift,
    Suffix,
    Taps,
    TransposedWindow,
    Whole,
    WholeAligned,
    Window,
)
from partitioner.ops import Need, NodeView, Operator, TensorType, registered
from tests.examples import Case, examples
from tests.test_conformance import WEIGHTED, layouts

PAGE = Path(__file__).with_name("operators.md")
README = PAGE.parent.parent / "README.md"
BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"
COUNT = re.compile(r"\d+ operators(?= \(\[list\])")
NEWEST_OPSET = 24
"""The newest opset of the oldest onnx package that is supported; a newer package gives the same page."""

KINDS = {Identity: "same cell", Shift: "shift", Window: "window", TransposedWindow: "transposed window",
         Flat: "flat", Rows: "rows", Taps: "taps", Prefix: "all before", Suffix: "all after", Whole: "whole",
         WholeAligned: "statistics"}
SAME = KINDS[Identity]
WHOLE = {KINDS[Whole], KINDS[WholeAligned]}
NOTHING = "nothing to send"
PLACES = frozenset({"indices", "grid", "sequence_lens", "I"})
"""Inputs of ONNX operators whose data say which cells are read or written."""
INERT = frozenset({"ratio", "seed"})
"""Attributes of Dropout that mean nothing at inference."""


class Attributes(Mapping[str, Any]):
    """The attributes of a node; remembers which were asked for."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.read: dict[str, None] = {}
        self.kept = False

    def __getitem__(self, name: str) -> Any:
        self.read[name] = None
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        self.kept = True  # all of them, for the kernel to read
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


@dataclass(frozen=True)
class Watched(NodeView):
    """A view that remembers which inputs had to be constants."""

    asked: dict[int, None]

    def constant(self, index: int, what: str) -> Any:
        """As of a view."""
        self.asked[index] = None
        return super().constant(index, what)


@dataclass(frozen=True)
class Row:
    """What the page says of one operator; per role of an axis the kinds of dependence seen in its examples."""

    domain: str
    name: str
    versions: tuple[int, ...]
    parameters: str
    roles: tuple[tuple[str, ...], ...]
    communication: str
    in_place: bool
    cases: int
    node_tests: int

    @property
    def is_cell_by_cell(self) -> bool:
        """Whether every output cell depends on the same cell of the input alone."""
        return self.communication == NOTHING and {kind for role in self.roles for kind in role} <= {SAME}

    @property
    def head(self) -> tuple[str, ...]:
        """Name, versions and parameters."""
        return self.name, ", ".join(map(str, self.versions)) or "-", self.parameters

    @property
    def tail(self) -> tuple[str, ...]:
        """Whether the kernel writes into given memory, and how much is tested."""
        return "yes" if self.in_place else "", str(self.cases), str(self.node_tests or "-")


def read(case: Case) -> tuple[Operator, dict[str, None], dict[int, None]]:
    """The operator of an example, its inputs known by extents alone; which attributes and constants it asked for."""
    example = case.example
    given = [None if x is None else x if isinstance(x, tuple) else ir.tensor(x) for x in example.inputs]
    types = tuple(TensorType(x, example.dtype) if isinstance(x, tuple) else
                  None if x is None else TensorType(tuple(x.shape.numpy()), x.dtype) for x in given)
    constants = tuple(None if isinstance(x, tuple) else x for x in given)
    used = tuple(index < example.checked for index in range(example.outputs))
    attributes, asked = Attributes(example.attributes), dict[int, None]()
    view = Watched(example.op_type, 1 if case.domain else example.opset, types, constants, attributes, used, asked)
    found = {(domain, name): cls for domain, name, cls in registered()}[case.domain, example.op_type].read(view)
    if attributes.kept:
        known = [s for s in schemas().get((case.domain, example.op_type), []) if s.since_version <= view.version]
        attributes.read.update(dict.fromkeys(a for s in known[-1:] for a in s.attributes if a not in INERT))
    return found, attributes.read, asked


def kinds_by_role(operators: Sequence[Operator]) -> tuple[tuple[str, ...], ...]:
    """The kinds of dependence of the batch, channel and spatial axes of the input with most axes.

    Axes of one cell that are needed whole are left out: they have nothing to be split.
    """
    found: tuple[dict[str, None], ...] = ({}, {}, {})
    for operator in operators:
        for output in range(len(operator.outputs)):
            needs = max((n for n in operator.needs(output) if n is not None), key=len)
            for axis, need in enumerate(needs):
                if need.map.n_in > 1 or kind_of(need) != KINDS[Whole]:
                    found[min(axis, 2)][kind_of(need)] = None
    return tuple(tuple(kind for kind in KINDS.values() if kind in role) for role in found)


def kind_of(need: Need) -> str:
    """How an input axis depends on the output, in a word or two."""
    if need.axis is None:
        return KINDS[Whole]
    return SAME if need.map.is_identity else KINDS[type(need.map)]


def communication(operators: Sequence[Operator], roles: Sequence[Sequence[str]], has_places: bool) -> str:
    """What happens along an axis that the mesh splits (batch or spatial)."""
    kinds = {kind for role in (roles[0], roles[2]) for kind in role}
    before = {KINDS[Prefix], KINDS[Suffix]}
    words = ["halo exchange"] if kinds - {SAME, *WHOLE, *before} else []
    words += ["all cells before or after are sent"] if kinds & before else []
    if any(operator.reduction is not None for operator in operators):
        words.append("partial results, all-reduce")
    elif kinds & WHOLE:
        words.append("gathered where data say which cells" if has_places else "gathered where needed whole")
    return ", ".join(words) or NOTHING


@functools.cache
def schemas() -> Mapping[tuple[str, str], list[Any]]:
    """All versions of every operator in ONNX's own list, the oldest first."""
    found: dict[tuple[str, str], list[Any]] = {}
    for schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda s: s.since_version):
        if not schema.deprecated:
            found.setdefault((schema.domain, schema.name), []).append(schema)
    return found


def versions_of(versions: Sequence[Any]) -> tuple[int, ...]:
    """The operator's versions in force in the opsets that are read."""
    known = sorted({s.since_version for s in versions})
    first = max((v for v in known if v <= MINIMUM_OPSET), default=0)
    return tuple(v for v in known if first <= v <= NEWEST_OPSET) or tuple(known)


def parameters(versions: Sequence[Any], attributes: Mapping[str, None], constants: Mapping[int, None]) -> str:
    """Attributes that are read, and inputs that must be constants."""
    names = {i: f"input {i}" for i in constants}
    for schema in versions:
        names |= {i: f"`{schema.inputs[i].name}`" for i in constants if i < len(schema.inputs)}  # the newest name
    told = {a for schema in versions for a in schema.attributes}
    words = [f"`{name}`" for name in sorted(attributes) if name in told or not versions]
    fixed = sorted({names[i] for i in constants} - set(words))
    return "; ".join(filter(None, (", ".join(words), fixed and f"constant {', '.join(fixed)}"))) or "-"


def cases_of(case: Case) -> int:
    """On how many meshes and cuts an example is run."""
    example = case.example
    fed = [x for i, x in enumerate(example.inputs)
           if isinstance(x, tuple) and (i == 0 or example.op_type not in WEIGHTED)]
    return sum(1 for _ in layouts(case, fed[0]))


def rows() -> Iterator[Row]:
    """One row per operator, by name."""
    tests = Counter(operator_under_test(name) for name in load_cases())
    every = list(examples())
    for domain, name, _ in registered():
        if domain == dialect.DOMAIN:
            continue
        cases = [case for case in every if (case.domain, case.example.op_type) == (domain, name)]
        found = [read(case) for case in cases]
        operators = [operator for operator, _, _ in found]
        known = schemas().get((domain, name), [])
        attributes = {key: None for _, keys, _ in found for key in keys}
        constants = {index: None for _, _, asked in found for index in asked}
        has_places = any(i.name in PLACES for s in known for i in s.inputs)
        roles = kinds_by_role(operators)
        yield Row(domain, name, versions_of(known), parameters(known, attributes, constants), roles,
                  communication(operators, roles, has_places), any(operator.writes_into for operator in operators),
                  sum(map(cases_of, cases)), 0 if domain else tests[name])


def render(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


LAST = ("in place", "cases", "node tests")


def wide(rows: Sequence[Row]) -> str:
    """Operators with what their axes depend on."""
    head = ("operator", "versions", "reads", "batch", "channel", "spatial", "along a split axis", *LAST)
    return render(head, [(*row.head, *(", ".join(kinds) or "-" for kinds in row.roles), row.communication, *row.tail)
                         for row in rows])


def tables() -> str:
    """Operators that look around, those that work cell by cell, and those of onnxruntime."""
    found = list(rows())
    standard = [row for row in found if not row.domain]
    around = [row for row in standard if not row.is_cell_by_cell]
    flat = [row for row in standard if row.is_cell_by_cell]
    total = sum(row.cases for row in found)
    return "\n\n".join((
        f"{len(standard)} operators of ONNX: {len(around)} that depend on more than the same cell, {len(flat)} that do "
        f"not; {len(found) - len(standard)} of onnxruntime. {total} cases in all.",
        wide(around),
        "Cell by cell, without any message:",
        render(("operator", "versions", "reads", *LAST), [(*row.head, *row.tail) for row in flat]),
        "Of the domain `com.microsoft`:",
        wide([row for row in found if row.domain]),
    ))


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def readme(text: str) -> str:
    """The README with the number of operators counted anew."""
    return COUNT.sub(f"{sum(1 for domain, _, _ in registered() if domain == '')} operators", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    README.write_text(readme(README.read_text()))
