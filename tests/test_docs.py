"""The README and the docs are true: their examples run, their outputs are these, their names exist.

A fenced block of `python`, `pycon` or `console` is run in the order of its page, in a folder that holds the
files of the README's tour.  Words after the language say more: `slow` (not in the fast suite), `exit N` (the
code that the command ends with).
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from partitioner import dialect
from partitioner.layout import parse_layout
from partitioner.maps import AxisMap
from partitioner.mesh import Mesh
from partitioner.ops import registered
from tests.examples import one_graph

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
SOURCES = ("partitioner", "passes", "runtime", "benchmarks", "tests")

RECORDED = {"torch": "2.13", "onnxscript": "0.7", "onnx": "1.23"}
"""The exporter with which the outputs in the docs were made: others name nodes differently, and are not compared."""

COMPARED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MEASURED = {
    r"\d+\.\d+ s\b": "# s",
    r"peak \d+\.\d+ [KMG]?i?B": "peak #",
    r"error [\d.e+-]+, relative [\d.e+-]+": "error #",
    r"onnxruntime \d+\.\d+\.\d+": "onnxruntime #",
}
"""What differs from run to run and from machine to machine."""


@dataclass(frozen=True)
class Block:
    """A fenced block: language, the words after it, the text, and where it begins."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    text = page.read_text()
    for match in re.finditer(r"^```(\S*)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[1], tuple(match[2].split()), match[3]))
    return found


def is_recorded() -> bool:
    """Whether the outputs in the docs are those of the installed exporter."""
    return all(version(name).startswith(f"{known}.") for name, known in RECORDED.items())


# --- running the examples ---------------------------------------------------------------------------


class Session:
    """The examples of one page, run one after the other in the current folder."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "docs"}

    def run(self, block: Block) -> None:
        {"python": self._python, "pycon": self._pycon, "console": self._console}[block.language](block)

    def _python(self, block: Block) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, block.where, "exec", dont_inherit=True), self.names)

    def _pycon(self, block: Block) -> None:
        parsed = doctest.DocTestParser().get_doctest(block.text, self.names, block.where, str(block.page), block.line)
        assert parsed.examples, f"{block.where}: no example"
        output = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=COMPARED)
        failed = runner.run(parsed, out=output.write, clear_globs=False).failed
        self.names.update(parsed.globs)
        assert not failed or not is_recorded(), output.getvalue()

    def _console(self, block: Block) -> None:
        expected = int(block.words[block.words.index("exit") + 1]) if "exit" in block.words else 0
        for command, wanted in commands(block):
            code, printed = execute(command)
            assert code == expected, f"{block.where}: {command} ended with {code}\n{printed}"
            if is_recorded():
                same = doctest.OutputChecker().check_output(masked(wanted), masked(printed), COMPARED)
                assert same, f"{block.where}: {command} printed\n{printed}\ninstead of\n{wanted}"


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output shown under it."""
    parts = re.split(r"^\$ (.*)$", block.text, flags=re.MULTILINE)
    yield from zip(parts[1::2], (text.lstrip("\n") for text in parts[2::2]), strict=True)


def masked(text: str) -> str:
    """An output without what differs from run to run."""
    for pattern, instead in MEASURED.items():
        text = re.sub(pattern, instead, text)
    return text


def execute(command: str) -> tuple[int, str]:
    """Exit code and output of a command; `partition` runs in this process."""
    name, *arguments = shlex.split(command)
    if name == "partition":
        from partitioner.cli import main

        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return main(arguments), output.getvalue()
    start = [sys.executable, "-m", "torch.distributed.run"] if name == "torchrun" else [name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([*start, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return found.returncode, found.stdout


@pytest.fixture(scope="session")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the tour makes first."""
    folder = tmp_path_factory.mktemp("tour")
    session = Session()
    with contextlib.chdir(folder):
        session.run(next(b for b in blocks(README) if b.language == "python"))
        code, printed = execute("partition compile small.onnx --mesh depth=2 --shape 1x1x41x38x29 -o small.plan.onnx")
    assert code == 0, printed
    return folder


@pytest.fixture
def workplace(tour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the tour's files; what examples register or set is forgotten afterwards."""
    import runtime.allocator
    import tests.reference
    from partitioner.ops import registry

    shutil.copytree(tour, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_OPERATORS", dict(registry._OPERATORS))
    monkeypatch.setattr(tests.reference, "RULES", dict(tests.reference.RULES))
    monkeypatch.setattr(runtime.allocator, "keep_memory_tight", lambda: None)  # it concerns the whole process
    return tmp_path


RUN = ("python", "pycon", "console")
SLOW_PAGES = [page for page in PAGES if any("slow" in block.words for block in blocks(page))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def run_page(page: Path, with_slow: bool) -> Session:
    session = Session()
    for block in blocks(page):
        if block.language in RUN and (with_slow or "slow" not in block.words):
            session.run(block)
    return session


@by_page
def test_examples_are_true(page: Path, workplace: Path) -> None:
    session = run_page(page, with_slow=False)
    if page.stem == "architecture":
        check_operator(session.names["SpaceToDepth"])


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES, ids=lambda page: page.stem)
def test_all_examples_are_true(page: Path, workplace: Path) -> None:
    run_page(page, with_slow=True)


def check_operator(cls: Any) -> None:
    """The operator that the docs add as an example stands the tests of all operators."""
    from tests import test_conformance
    from tests.examples import Case

    for index, example in enumerate(cls.examples):
        case = Case(f"{example.op_type}-{index}", cls.domain, example)
        test_conformance.check_float64(case, weights_given=False)
        test_conformance.test_float32_is_as_good_as_onnxruntime(case)
        test_conformance.test_communication_passes_keep_the_bits(case)
        test_conformance.test_extents_come_from_the_maps(case)


def test_a_wrong_example_is_seen(workplace: Path) -> None:
    wrong = (Block(README, 1, "pycon", (), ">>> 1 + 1\n3\n"), Block(README, 1, "python", (), "assert 1 == 2\n"),
             Block(README, 1, "console", (), "$ partition plan small.plan.onnx\nplan for 3 ranks (depth=3)\n"),
             Block(README, 1, "console", (), "$ partition plan nothing.onnx\n"))
    for block in wrong[0 if is_recorded() else 1 :]:
        with pytest.raises(AssertionError):
            Session().run(block)


def test_the_same_model_gives_the_same_plan(workplace: Path) -> None:
    before = Path("small.plan.onnx").read_bytes()
    assert execute("partition compile small.onnx --mesh depth=2 --shape 1x1x41x38x29 -o again.onnx")[0] == 0
    assert Path("again.onnx").read_bytes() == before


# --- names -------------------------------------------------------------------------------------------


def cells(page: str, head: str) -> list[list[str]]:
    """The rows of the table whose first line begins with `| head |`."""
    lines = iter((ROOT / "docs" / page).read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {head} |"))
    next(lines)
    rows: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def code_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_operators_is_current() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate_operators.py"))
    text = (ROOT / "docs" / "operators.md").read_text()
    assert generator["page"](text) == text, "run python docs/generate_operators.py"
    count = sum(1 for domain, _, _ in registered() if domain == "")
    assert f"{count} operators" in README.read_text()


def test_passes_are_those_of_the_pipeline() -> None:
    from partitioner.compiler import standard_pipeline

    names = [item.name for item in standard_pipeline(Mesh(()), {}, {}).passes]
    assert [code_of(row[0])[0] for row in cells("architecture.md", "pass")] == names
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    assert not [name for name in names if name not in picture]
    xml.etree.ElementTree.fromstring(picture)


def test_every_map_is_described() -> None:
    def concrete(cls: type[AxisMap]) -> set[str]:
        return {cls.__name__, *(name for sub in cls.__subclasses__() for name in concrete(sub))}

    assert {code_of(row[0])[0] for row in cells("architecture.md", "map")} == concrete(AxisMap) - {"AxisMap"}


def test_layers_are_those_of_the_contract() -> None:
    """The page names the main modules of each layer, in the order of the contract, and leaves helpers out."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = next(contract["layers"] for contract in config if contract["id"] == "layers")
    level = {name: index for index, row in enumerate(rows) for name in re.findall(r"[\w.]+", row)}
    text = next(b.text for b in blocks(ROOT / "docs" / "architecture.md") if "partitioner.cli\n" in b.text)
    told = [{level[name] for name in re.findall(r"[\w.]+", line)} for line in text.splitlines()]
    assert len(told) > 10 and all(len(levels) == 1 for levels in told)
    assert told == sorted(told, key=min)


def test_node_types_and_attributes_are_those_of_the_dialect() -> None:
    rows = cells("plan-format.md", "node")
    told = {code_of(row[0])[0]: {name for name in code_of(row[3]) if name not in ("sum", "prod", "max", "min", "moments")}
            for row in rows}
    known = {name: {a.name for a in build(name, 18).attributes.values()} for name, build in dialect._FUNCTIONS.items()}
    assert told == known
    for row in rows:
        function = dialect._FUNCTIONS[code_of(row[0])[0]]("f", 18)
        assert len(row[1].split(",")) == len(function.inputs) and len(row[2].split(",")) == len(function.outputs)


def test_metadata_keys_are_those_of_the_dialect() -> None:
    keys = {value for name, value in vars(dialect).items() if name.startswith("_") and name.isupper()
            and isinstance(value, str)}
    told = set(re.findall(r"`(partitioner\.[a-z]+)`", (ROOT / "docs" / "plan-format.md").read_text()))
    assert told == keys


def test_layouts_parse_and_print_as_told() -> None:
    rows = cells("plan-format.md", "layout")
    assert len(rows) > 5
    for row in rows:
        (text,) = code_of(row[0])
        assert str(parse_layout(text)) == text


FLOAT, FEW = np.zeros((2, 3, 6, 6), np.float32), np.zeros((2, 3), np.float32)
VECTOR = np.zeros(3, np.float32)
REFUSED = {
    "Conv": helper.make_node("Conv", ["few", "few"], ["y"]),
    "ConvTranspose": helper.make_node("ConvTranspose", ["few", "few"], ["y"]),
    "MaxPool": helper.make_node("MaxPool", ["x"], ["unused", "y"], kernel_shape=[2, 2]),
    "BatchNormalization": helper.make_node("BatchNormalization", ["x", *["v"] * 4], ["y", "m", "s"], training_mode=1),
    "Dropout": helper.make_node("Dropout", ["x", "", "true"], ["y"]),
    "InstanceNormalization": helper.make_node("InstanceNormalization", ["few", "v", "v"], ["y"]),
    "Resize": helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="cubic"),
    "Resize, antialias": helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear", antialias=1),
    "MatMul": helper.make_node("MatMul", ["few", "v"], ["y"]),
    "Cast": helper.make_node("Cast", ["x"], ["y"], to=TensorProto.COMPLEX64),
    "Slice": helper.make_node("Slice", ["x", "where", "where"], ["y"]),
    "Pad": helper.make_node("Pad", ["x", "where"], ["y"]),
    "Reshape": helper.make_node("Reshape", ["x", "where"], ["y"]),
}
"""One node per line of the table of what is refused."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_docs_call_refused_is_refused(name: str) -> None:
    import partitioner as pt

    node = REFUSED[name]
    node.name = "the_node"
    inputs = {"x": FLOAT, "few": FEW, "v": VECTOR, "where": np.zeros(4, np.int64)}
    constants = {"true": np.asarray(True), "sizes": np.array([2, 3, 9, 9], np.int64)}
    given = {key: array for key, array in inputs.items() if key in node.input}
    model = one_graph([node], given, {key: array for key, array in constants.items() if key in node.input},
                      {"y": (TensorProto.FLOAT, ())}, 18)
    with pytest.raises(pt.PartitionError, match=f"the_node .{node.op_type}.: "):
        pt.partition(model)


def test_every_line_of_what_is_refused_is_tried() -> None:
    told = {name for row in cells("operators.md", "operator | refused") for name in code_of(row[0])}
    assert told == {name.partition(",")[0] for name in REFUSED}


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


OTHERS = frozenset({"cubic", "docs", "generate_operators"})


@by_page
def test_names_in_the_text_exist(page: Path) -> None:
    """Every identifier in inline code is a word of the sources, the configuration, ONNX or the page's own examples."""
    import onnx

    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".gitignore"]
    known = set(re.findall(r"\w+", " ".join(path.read_text() for path in files)))
    known |= {schema.name for schema in onnx.defs.get_all_schemas()} | set(dir(onnx)) | OTHERS
    known |= {word for block in blocks(page) for word in re.findall(r"\w+", block.text)}
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    words = {word for code in code_of(prose) for word in re.findall(r"\b[A-Za-z_]\w{2,}", code)}
    assert not words - known, f"{page.name} names {sorted(words - known)}"


def test_make_targets_and_extras_exist() -> None:
    text, makefile = README.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for given in re.findall(r"\.\[([\w,]+)\]", text):
        assert set(given.split(",")) <= set(extras), given
    default = re.search(r"^TORCH\s+\?= (\S+)$", makefile, re.MULTILINE)
    assert default is not None and f"`{default[1]}`" in text
