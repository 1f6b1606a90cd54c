"""The README and the docs are true: their examples run, their outputs are these, their names exist.

A fenced block of `python`, `pycon` or `console` is run in the order of its page, in a folder that holds the
files of the README's tour.  Words after the language say more: `slow` (not in the fast suite), `exit N` (the
code that the command ends with), `file=NAME` (not run but written to that file).
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

from partitioner.mesh import Mesh
from partitioner.ops.kernels import onednn
from tests.test_docs_tables import cells, code_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
SOURCES = ("partitioner", "passes", "runtime", "benchmarks", "tests")

RECORDED = {"torch": "2.13", "onnxscript": "0.7", "onnx": "1.23"}
"""The exporter with which the outputs in the docs were made: others name nodes differently, and are not compared."""

COMPARED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MEASURED = {
    r"\d+\.\d+ s\b": "# s",
    r"peak \d+(\.\d+)? [KMG]?i?B": "peak #",  # bytes have no fraction: a run may find all its memory there
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
    """Whether the outputs in the docs are those of the installed exporter, and of the kernels that are here."""
    return onednn.is_available() and all(version(name).startswith(f"{known}.") for name, known in RECORDED.items())


# --- running the examples ---------------------------------------------------------------------------


class Session:
    """The examples of one page, run one after the other in the current folder."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "docs"}

    def run(self, block: Block) -> None:
        for word in block.words:
            if word.startswith("file="):
                Path(word.removeprefix("file=")).write_text(block.text)
                return
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
    from partitioner.ops import plugins, registry

    shutil.copytree(tour, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_OPERATORS", dict(registry._OPERATORS))
    monkeypatch.setenv(plugins.VARIABLE, "")
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
        check_operator(session.names["UnfoldTensor"])


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
        test_conformance.test_float32_is_as_good_as_onnxruntime(case, every=True)
        test_conformance.test_communication_passes_keep_the_bits(case, every=True)
        test_conformance.test_extents_come_from_the_maps(case)


# --- an operator of one's own ------------------------------------------------------------------------


OWN = "local_range.py"


@pytest.fixture
def own(workplace: Path) -> Path:
    """A folder with the operator of docs/operators.md, its model and a volume."""
    page = ROOT / "docs" / "operators.md"
    (text,) = (b.text for b in blocks(page) if f"file={OWN}" in b.words)
    assert len(text.splitlines()) <= 40
    (workplace / OWN).write_text(text)
    session = Session()
    for block in blocks(page):
        if "texture.onnx" in block.text and block.language == "python" and "onnx.save" in block.text:
            session.run(block)
    return workplace


def local_range(x: np.ndarray, radius: int, step: int) -> np.ndarray:
    """The largest minus the smallest neighbour, by plain shifts of the whole volume."""
    found = [x, x]
    for axis in (2, 3, 4):
        places = [np.arange(x.shape[axis]) + k * step for k in range(-radius, radius + 1)]
        for index, (pick, none) in enumerate(((np.maximum, -np.inf), (np.minimum, np.inf))):
            rows = [np.take(found[index], place.clip(0, x.shape[axis] - 1), axis) for place in places]
            outside = [(place < 0) | (place >= x.shape[axis]) for place in places]
            shape = [-1 if a == axis else 1 for a in range(5)]
            rows = [np.where(o.reshape(shape), none, row) for o, row in zip(outside, rows, strict=True)]
            found[index] = pick.reduce(rows)
    return (found[0] - found[1]).astype(x.dtype)


@pytest.mark.parametrize(("mesh", "cuts"), [
    (None, {}), ("depth=3", {"depth": (0, 4, 30, 41)}), ("depth=3", {"depth": (0, 0, 41, 41)}),
    ("height=4", {"height": (0, 1, 2, 37, 38)}), ("depth=2,width=3", {"width": (0, 3, 3, 29)}),
])
def test_an_operator_of_ones_own_is_exact(own: Path, mesh: str | None, cuts: dict[str, tuple[int, ...]]) -> None:
    import partitioner as pt

    pt.load_operators(OWN)
    x = np.load("volume.npy")
    plan = pt.partition("texture.onnx", mesh=mesh, cuts=cuts)
    assert plan.to_dict()["gathered"] == []
    np.testing.assert_array_equal(plan.run({"volume": x})["ranges"], local_range(x, 2, 3))


@pytest.mark.parametrize("named", ["option", "environment"])
def test_an_operator_of_ones_own_in_processes_of_their_own(own: Path, named: str) -> None:
    option, environment = ((), {"PARTITIONER_OPERATORS": OWN}) if named == "environment" else (("--operators", OWN), {})
    backend = ("--backend", "gloo") if named == "option" else ()
    command = [sys.executable, "-m", "partitioner.cli", "run", "texture.onnx", *option, *backend, "--mesh", "depth=2",
               "--cuts", "depth=5", "--input", "volume.npy", "--output", "ranges.npy"]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True,
                           text=True, check=False)
    assert found.returncode == 0, found.stderr
    np.testing.assert_array_equal(np.load("ranges.npy"), local_range(np.load("volume.npy"), 2, 3))


def test_the_ways_to_name_operators_are_those_of_the_code() -> None:
    from partitioner.ops import plugins

    text = (ROOT / "docs" / "operators.md").read_text()
    assert f"`{plugins.VARIABLE}=" in text
    (block,) = (b for b in blocks(ROOT / "docs" / "operators.md") if b.language == "toml")
    assert tomllib.loads(block.text)["project"]["entry-points"][plugins.GROUP]


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


def test_the_table_of_operators_is_current() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate_operators.py"))
    text, readme = (ROOT / "docs" / "operators.md").read_text(), README.read_text()
    found = generator["page"](text)
    if not version("onnx").startswith(f"{RECORDED['onnx']}."):  # it lists versions and tests of operators
        text, found = (re.findall(r"^\| (\w+) \|", page, re.MULTILINE) for page in (text, found))
    assert found == text and generator["readme"](readme) == readme, "run python docs/generate_operators.py"
    assert generator["COUNT"].search(readme)


def test_passes_are_those_of_the_pipeline() -> None:
    from partitioner.compiler import standard_pipeline

    names = [item.name for item in standard_pipeline(Mesh(()), {}, {}).passes]
    assert [code_of(row[0])[0] for row in cells("architecture.md", "pass")] == names
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    assert not [name for name in names if name not in picture]
    xml.etree.ElementTree.fromstring(picture)


def test_layers_are_those_of_the_contract() -> None:
    """The page names the main modules of each layer, in the order of the contract, and leaves helpers out."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = next(contract["layers"] for contract in config if contract["id"] == "layers")
    level = {name: index for index, row in enumerate(rows) for name in re.findall(r"[\w.]+", row)}
    text = next(b.text for b in blocks(ROOT / "docs" / "architecture.md") if "partitioner.cli\n" in b.text)
    told = [{level[name] for name in re.findall(r"[\w.]+", line)} for line in text.splitlines()]
    assert len(told) > 10 and all(len(levels) == 1 for levels in told)
    assert told == sorted(told, key=min)


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


OTHERS = frozenset({"cubic", "docs", "generate_operators", "constant_value"})


@by_page
def test_names_in_the_text_exist(page: Path) -> None:
    """Every identifier in inline code is a word of the sources, the results, ONNX or the page's own examples."""
    import onnx

    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")
             if not path.name.startswith("test_docs")]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".gitignore"]
    files += (ROOT / "benchmarks" / "results").glob("*.md")  # what the figures are of
    known = set(re.findall(r"\w+", " ".join(path.read_text() for path in files)))
    known |= {schema.name for schema in onnx.defs.get_all_schemas()} | set(dir(onnx)) | OTHERS
    known |= {word for block in blocks(page) for word in re.findall(r"\w+", block.text)}
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    words = {word for code in code_of(prose) for word in re.findall(r"\b[A-Za-z_]\w{2,}", code)}
    assert not words - known, f"{page.name} names {sorted(words - known)}"


def test_make_targets_and_extras_exist() -> None:
    text, makefile = README.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    commands = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    for command in re.findall(r"^(?:.*`)?python -m benchmarks (\w+)", text, re.MULTILINE):
        assert f'add_parser("{command}"' in commands, command
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for given in re.findall(r"\.\[([\w,]+)\]", text):
        assert set(given.split(",")) <= set(extras), given
    default = re.search(r"^TORCH\s+\?= (\S+)$", makefile, re.MULTILINE)
    assert default is not None and f"`{default[1]}`" in text
