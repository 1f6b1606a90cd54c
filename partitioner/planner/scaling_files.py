"""A forecast for many devices as tables, as CSV, as JSON and as curves."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from partitioner.errors import refuse_all
from partitioner.loader import write_bytes
from partitioner.planner.scaling import Largest, Row, Scaling, Size, size_words
from partitioner.report import seconds_text, size_text

COLUMNS = ("devices", "size", "mesh", "seconds", "speedup", "efficiency", "weak_efficiency", "memory_bytes", "fits",
           "sent_bytes", "messages", "transport", "note")
"""Of the CSV file, and keys of a row in the JSON file."""


# --- tables -------------------------------------------------------------------------------------------


def render(scaling: Scaling) -> Group:
    """The tables that the command prints."""
    return Group(*([_rows(scaling)] + ([_cubes(scaling)] if scaling.largest else [])))


def _rows(scaling: Scaling) -> Table:
    figures = "measured" if scaling.measured else "estimated"
    table = _table(f"forecast with the {figures} figures of profile '{scaling.profile}'",
                   ("devices", "size", "mesh", "time", "speed-up", "efficiency", "weak eff.", "per device",
                    *(() if scaling.memory is None else ("fits",)), "sent", "messages", ""))
    before: Size | None = None
    for row in scaling.rows:
        if before is not None and row.size != before:
            table.add_section()
        before = row.size
        table.add_row(*_cells(row, scaling.memory))
    return table


def _cells(row: Row, memory: int | None) -> Iterable[str]:
    yield from (str(row.devices), size_words(row.size), row.mesh, seconds_text(row.seconds), f"{row.speedup:.3g}",
                f"{row.efficiency:.0%}", "" if row.weak_efficiency is None else f"{row.weak_efficiency:.0%}",
                size_text(row.memory_bytes))
    if memory is not None:
        yield "yes" if row.fits else "no"
    yield from (size_text(row.sent_bytes), str(row.messages), row.note)


def _cubes(scaling: Scaling) -> Table:
    assert scaling.memory is not None
    table = _table(f"largest cube in whole-shard steps within {size_text(scaling.memory)} per device",
                   ("devices", "size", "mesh", "per device", "time"))
    for cube in scaling.largest:
        if cube.size is None:
            table.add_row(str(cube.devices), "none")
        else:
            table.add_row(str(cube.devices), size_words(cube.size), cube.mesh, size_text(cube.memory_bytes),
                          seconds_text(cube.seconds))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("size", "mesh", "fits", "") else "right", overflow="fold")
    return table


# --- files --------------------------------------------------------------------------------------------


def to_dict(scaling: Scaling) -> dict[str, Any]:
    """All of it as plain data."""
    return {"profile": scaling.profile, "measured": scaling.measured, "memory_bytes": scaling.memory,
            "rows": [_record(row) for row in scaling.rows], "largest": [_cube(cube) for cube in scaling.largest]}


def _record(row: Row) -> dict[str, Any]:
    return {name: list(row.size) if name == "size" else getattr(row, name) for name in COLUMNS}


def _cube(cube: Largest) -> dict[str, Any]:
    if cube.size is None:
        return {"devices": cube.devices, "size": None}
    return {"devices": cube.devices, "size": list(cube.size), "mesh": cube.mesh, "memory_bytes": cube.memory_bytes,
            "seconds": cube.seconds}


def _csv(scaling: Scaling) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in scaling.rows:
        record = {**_record(row), "size": size_words(row.size)}
        writer.writerow(["" if value is None else value for value in record.values()])
    return text.getvalue().encode()


def _json(scaling: Scaling) -> bytes:
    return (json.dumps(to_dict(scaling), indent=1, allow_nan=False) + "\n").encode()


def _png(scaling: Scaling) -> bytes:
    from partitioner.planner.scaling_picture import draw

    return draw(scaling)


_WRITERS: dict[str, Callable[[Scaling], bytes]] = {".csv": _csv, ".json": _json, ".png": _png}


def save(scaling: Scaling, path: Path) -> None:
    """Write the file; its ending says what it is.

    Raises:
        PartitionError: as `check_targets`.
    """
    check_targets([path])
    write_bytes(path, _WRITERS[path.suffix.lower()](scaling))


def check_targets(paths: Sequence[Path]) -> None:
    """Make sure that files can be written before any time is spent on what goes into them.

    Raises:
        PartitionError: with all of those that cannot be.
    """
    refuse_all([problem for path in paths if (problem := _problem(path)) is not None]
               + [f"{path}: is named twice; name each file once" for path in dict.fromkeys(paths)
                  if paths.count(path) > 1])


def _problem(path: Path) -> str | None:
    if path.suffix.lower() not in _WRITERS:
        return f"{path}: the ending is unknown; use {', '.join(_WRITERS)}"
    if path.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        return (f"{path}: pictures need matplotlib; install it with pip install 'partitioner[plot]', or write .csv or "
                ".json")
    if path.is_dir():
        return f"{path}: is a folder; name a file in it"
    if not path.absolute().parent.is_dir():
        return f"{path}: the folder {path.absolute().parent} does not exist; create it first"
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            return None
    except OSError as error:
        return f"{path}: cannot be written ({error.strerror}); choose another place"
