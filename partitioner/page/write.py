"""The page from its parts: a frame, styles and scripts that lie beside this file, and the data of a plan."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx_ir as ir

from partitioner.cost import PlanCost
from partitioner.loader import write_text
from partitioner.page.data import Alternative, page_data

SCRIPTS = ("format.js", "volume.js", "network.js", "charts.js", "page.js")
"""In the order in which they are read; together they are one script."""


def write_page(path: Path, model: ir.Model, cost: PlanCost, name: str = "",
               alternatives: Sequence[Alternative] = (), explain: str = "") -> None:
    """Write the page of a plan beside and rename; see `page_data` for the arguments.

    Raises:
        PartitionError: when the path cannot be written, or an alternative is not understood.
    """
    write_text(path, page_text(page_data(model, cost, name, alternatives, explain)))


def page_text(data: Mapping[str, Any]) -> str:
    """The page as HTML.

    Only the script and the style that belong to it may take effect: the page's security policy names their digests
    and forbids everything else, so that a name from a model stays a name.
    """
    style = _part("page.css")
    script = "(() => {\n\"use strict\";\n" + "".join(map(_part, SCRIPTS)) + "})();\n"
    fields = {"title": html.escape(str(data["name"])), "style": style, "script": script, "data": _inert(data),
              "style_digest": _digest(style), "script_digest": _digest(script)}
    pieces = _part("page.html").split("@@")  # text and the names of fields in turn
    return "".join(fields[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _part(name: str) -> str:
    return (files("partitioner.page") / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _inert(data: Mapping[str, Any]) -> str:
    """JSON that an HTML parser reads as text to its end."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
