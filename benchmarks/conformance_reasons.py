"""The reasons for which a node test may be refused, each with a line of explanation; any other refusal is a failure."""

from __future__ import annotations

import re
from dataclasses import dataclass

NEEDS_CONSTANTS = re.compile(r"depends? on the data|not known beforehand|constant|without cells|cannot hold")
"""What a refusal says when an input may have to be a constant."""

ABOUT_CONSTANTS = re.compile(r"has no inputs|its constant inputs .* cannot be computed")
"""What is said of a graph that constants alone decide: no reason against the operator."""

_NO_RULE = "this operator has no rule"

DATA = "data outside definition"
"""The one reason that is found only when the model runs."""


@dataclass(frozen=True)
class Reason:
    """A named reason.

    Args:
        pattern: looked for in every line of the refusal; the first reason that has it counts.
    """

    name: str
    explanation: str
    pattern: str


def _no_rule(*operators: str) -> str:
    return rf"\(({'|'.join(operators)})\): {_NO_RULE}"


REASONS = (
    Reason("random", "the result is drawn at random: no two runs agree, sharded or not",
           r"at random|random numbers|" + _no_rule("Bernoulli", "Multinomial", r"Random\w+")),
    Reason("training", "training mode: batch statistics and masks belong to the training of a module, not to a graph",
           r"training|" + _no_rule(r"ai\.onnx\.preview\.training\.\w+")),
    Reason("result's extents", "the data decide the extents of the result, plans need static ones",
           r"\((Compress|NonMaxSuppression|NonZero|Unique)\): (the extents of its result|" + _NO_RULE + ")"),
    Reason("data as parameter", "shapes, axes, counts and the like must be constants, here a computed value is one",
           r"depends? on the data|not known beforehand"),
    Reason("sequence, optional", "a value is a sequence or optional; plans lay out tensors",
           r"no declared rank or type|is an? (sequence|optional)|works on sequences|be computed: .*\bOptional|"
           + _no_rule(r"Sequence\w+", "SplitToSequence", "ConcatFromSequence", r"Optional\w*")),
    Reason("text", "a value holds text; no kernel has cells for it",
           r"is STRING|" + _no_rule(r"String\w+", "RegexFullMatch", "TfIdfVectorizer", r"ai\.onnx\.ml\.LabelEncoder")),
    Reason("control flow", "the node holds a graph of its own, run as often as the data say",
           _no_rule("If", "Loop", "Scan", "SequenceMap")),
    Reason("element type", "the runtime has no such element type, or no arithmetic for it (float8, int4, uint16)",
           r"cannot hold|(element type|arithmetic of) \w+ is not supported|onnxruntime cannot run it on \w+;|"
           r"it quantises to \w+,"),
    Reason("no cells", "an input or the result has an axis of extent 0, which no rank could hold a part of",
           r"axis without cells|leaves nothing of extents"),
    Reason("constant result", "constants alone decide the result: there is nothing to partition", "has no inputs"),
    Reason("other domain", "the node is of another domain than the standard operators'",
           r"names no opset of the standard operators|domain '[\w.]*' is unknown|" + _no_rule(r"\w+(\.\w+)+")),
    Reason(DATA, "the data break the operator's definition: unpooling indices that no pool with these windows yields",
           r"an index is not in its window"),
    Reason("old opset", "the model is older than opset 7, when the operators got their present meaning",
           r"export with opset \d+ or newer"),
    Reason("no kernel", "the operator has no rule, and onnxruntime has no kernel either that ranks could run whole",
           r"onnxruntime cannot run it \(.*(NOT_IMPLEMENTED|Exception during initialization: .*/cpu/rnn/)"),
    Reason("mode without rule", "the operator has a rule, which lacks this mode or output",
           r"has no sharded rule|its (Indices|mask) output is used"),
    Reason("no rule", "the operator has no rule", _NO_RULE),
)


def reason_of(refusal: str) -> str | None:
    """The name of the reason why a case was refused; None when some line of the refusal gives none on the list.

    Where the lines differ, the reason that stands later in the list counts: it is the one to work on.
    """
    found = [next((i for i, r in enumerate(REASONS) if re.search(r.pattern, line)), None)
             for line in refusal.splitlines() if line.strip()]
    known = [i for i in found if i is not None]
    return REASONS[max(known)].name if known and len(known) == len(found) else None
