"""Index notation of Einsum, with its ellipsis spelled out."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Equation:
    """Letters per input, letters of the result, and the extent of every letter.

    `...i,ij->...j` on extents (2, 3, 5) and (5, 4) is `ABi,ij->ABj`.
    """

    inputs: tuple[str, ...]
    output: str
    extents: Mapping[str, int]

    @classmethod
    def parse(cls, text: str, shapes: Sequence[Sequence[int]]) -> Self:
        """Read an equation for inputs of given extents.

        Raises:
            ValueError: when it does not fit them, or axes under an ellipsis broadcast.
        """
        left, arrow, right = text.replace(" ", "").partition("->")
        terms = left.split(",")
        if len(terms) != len(shapes):
            raise ValueError(f"{len(terms)} terms for {len(shapes)} inputs")
        free = [c for c in string.ascii_letters[::-1] if c not in text]
        hidden = max((len(s) - len(t.replace("...", "")) for t, s in zip(terms, shapes, strict=True) if "..." in t),
                     default=0)
        if hidden > len(free) or hidden < 0:
            raise ValueError("the ellipsis does not fit the inputs")
        ellipsis = "".join(free[:hidden])
        inputs = tuple(_spell(t, len(s), ellipsis) for t, s in zip(terms, shapes, strict=True))
        extents = _extents(inputs, shapes)
        output = right.replace("...", ellipsis) if arrow else _implied(inputs, ellipsis)
        if len(set(output)) != len(output) or any(c not in extents for c in output):
            raise ValueError("the result names a letter twice, or one that no input has")
        return cls(inputs, output, extents)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of the result."""
        return tuple(self.extents[letter] for letter in self.output)

    def __str__(self) -> str:
        return f"{','.join(self.inputs)}->{self.output}"

    def __hash__(self) -> int:
        return hash((str(self), self.shape))


def _spell(term: str, rank: int, ellipsis: str) -> str:
    if "..." in term:
        count = rank - len(term.replace("...", ""))
        term = term.replace("...", ellipsis[len(ellipsis) - count:])
    if len(term) != rank or (not term.isalpha() and term):
        raise ValueError(f"term '{term}' on {rank} axes")
    return term


def _extents(inputs: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for term, shape in zip(inputs, shapes, strict=True):
        for letter, n in zip(term, shape, strict=True):
            if found.setdefault(letter, n) != n:
                raise ValueError(f"'{letter}' is {found[letter]} in one input and {n} in another")
    return found


def _implied(inputs: Sequence[str], ellipsis: str) -> str:
    """Without an arrow: the ellipsis, then the letters that stand once, in alphabetical order."""
    letters = "".join(inputs)
    return ellipsis + "".join(sorted(c for c in set(letters) - set(ellipsis) if letters.count(c) == 1))
