"""Small edits of the graph that several passes make."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def all_names(graph: ir.Graph) -> set[str]:
    """Names of all values and nodes."""
    found = {str(v.name) for v in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        found.add(str(node.name))
        found |= {str(v.name) for v in node.outputs}
    return found


class Namer:
    """Gives names that no value or node of the graph has yet."""

    def __init__(self, graph: ir.Graph) -> None:
        self._taken = all_names(graph)

    def __call__(self, wish: str) -> str:
        """The wish itself, or with a number after it."""
        name, count = wish, 1
        while name in self._taken:
            name, count = f"{wish}_{count}", count + 1
        self._taken.add(name)
        return name


def name_nodes(graph: ir.Graph) -> None:
    """Every node a name of its own: messages and the plan speak of nodes by name."""
    taken: set[str] = set()
    for index, node in enumerate(graph):
        wish = node.name or f"{node.op_type}_{index}"
        name, count = wish, 1
        while name in taken:
            name, count = f"{wish}_{count}", count + 1
        taken.add(name)
        node.name = name


def name_results(graph: ir.Graph) -> None:
    """A name for every result before the last one that has one: a file cannot tell of values without a name."""
    namer = Namer(graph)
    for node in graph:
        named = [index for index, value in enumerate(node.outputs) if value.name]
        for index, value in enumerate(node.outputs[: max(named, default=0)]):
            if not value.name:
                value.name = namer(f"{node.name}.{index}")


def replace_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Let a node read another value."""
    node.replace_input_with(index, value)


def snapshot(graph: ir.Graph) -> list[ir.Node]:
    """The nodes now, for loops that insert or remove some."""
    return list(graph)


def consumers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Every (node, input index) that reads a value."""
    yield from [(use.node, use.idx) for use in value.uses()]
