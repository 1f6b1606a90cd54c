"""The words of `--preprocess` and `--output-op`: an optional name, then what to do."""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.errors import PartitionError


def split_name(text: str, names: Sequence[str], known: Sequence[str], option: str, what: str) -> tuple[str, str]:
    """`[NAME=]WORD[=NUMBERS]` as a name and the rest; the only name where none is given.

    Args:
        names: of the inputs or outputs; they may have equals signs of their own.
        known: the words that can be used.
        option, what: for messages, as `--output-op` and `output`.

    Raises:
        PartitionError: for an unknown word or name, or when a name is needed.
    """
    if not isinstance(text, str):  # from Python
        raise PartitionError(f"{option} {text!r}: give a text, as '{known[0]}'")
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(f"{name}=") and _word(text[len(name) + 1 :]) in known:
            return name, text[len(name) + 1 :]
    if _word(text) not in known:
        first, _, rest = text.partition("=")
        if _word(rest) in known:
            raise PartitionError(f"{option} {text}: {what} '{first}' is unknown; the model has {', '.join(names)}")
        raise PartitionError(f"{option} {text}: '{first}' is unknown; use {', '.join(known)}")
    if len(names) != 1:
        raise PartitionError(f"{option} {text}: the model has {len(names)} {what}s ({', '.join(names)}); "
                             f"write NAME={text}")
    return names[0], text


def _word(text: str) -> str:
    return text.partition("=")[0]
