"""The documentation is run: every Python block of README, CONTRIBUTING, docs/ and hub_cards/, one namespace per file.

A block that cannot run here says why on the line above it: `<!-- not run: needs a Hub account -->`. Blocks
run in a folder of their own that holds `corpus.txt`, a text of some 5,000 words. A quoted Hub name such as
"HuggingFaceTB/SmolLM2-135M-Instruct" stands for a tiny random Llama, and "me/..." for a linearized one: both
lie in the Hub's local cache, so that the code under test takes its usual way.
"""

import ast
import importlib.util
import inspect
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import transformers
from huggingface_hub import constants

import lizardzoo as lz
import lizardzoo.hub
import lizardzoo.kernels
import lizardzoo.testing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CARDS = sorted((ROOT / "hub_cards").rglob("*.md"))
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *CARDS]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"(```|~~~) *(py|Py|\{ *\.?py)")
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
HUB_NAME = re.compile(r"""["']([\w-]+/[\w-]+(?:\.\d[\w-]*)*)["']""")


class Block(NamedTuple):
    """One fenced block; `line` is where its code starts, `runs` whether it is not excused."""

    code: str
    line: int
    runs: bool


def blocks_of(path: Path) -> list[Block]:
    """The Python blocks of a Markdown file, in order."""
    text = path.read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        line = text.count("\n", 0, match.start(1)) + 1
        blocks.append(Block(match[1], line, not NOT_RUN.fullmatch(above.strip())))
    return blocks


@pytest.fixture
def stand_in(tiny_folder: Path) -> Iterator[Any]:
    """A function that puts a tiny model into the Hub's local cache under a name."""
    made: list[Path] = []

    def put(name: str) -> None:
        entry = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        if entry.exists():
            return
        made.append(entry)
        snapshot = entry / "snapshots" / ("0" * 40)
        shutil.copytree(tiny_folder, snapshot)
        if name.startswith("me/"):
            lz.linearize(tiny_folder).save_pretrained(snapshot)
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text("0" * 40)

    yield put
    for entry in made:
        shutil.rmtree(entry)


def name_of(path: Path) -> str:
    """As a reader says it: "docs/quickstart.md"."""
    return path.relative_to(ROOT).as_posix()


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a page that is not excused, in its folder."""
    monkeypatch.chdir(folder)
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (folder / "corpus.txt").write_text(licence * 3, encoding="utf-8")
    module = types.ModuleType("snippets")  # one that torch.compile finds: it looks globals up where a class says it is
    monkeypatch.setitem(sys.modules, "snippets", module)
    for block in blocks_of(path):
        if block.runs:
            # The empty lines give a traceback the line of the Markdown file.
            exec(compile("\n" * (block.line - 1) + block.code, path, "exec"), vars(module))


ON_A_HUB = {DOCS / "howto" / "publish.md", *CARDS}
"""Run by tests/hub/test_publish_page.py and test_hub_cards.py."""


@pytest.mark.parametrize("path", [path for path in FILES if blocks_of(path) and path not in ON_A_HUB], ids=name_of)
def test_the_snippets_run(
    path: Path, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_registries: None
) -> None:
    code = [block.code for block in blocks_of(path) if block.runs]
    assert code, f"{name_of(path)} has no Python block that runs"
    for hub_name in dict.fromkeys(found for each in code for found in HUB_NAME.findall(each)):
        stand_in(hub_name)
    run(path, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_snippet_is_overlooked(path: Path) -> None:
    """A Python block in a list, a note or another fence would be shown and never run."""
    text = path.read_text(encoding="utf-8")
    assert len(ANY_BLOCK.findall(text)) == len(BLOCK.findall(text))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_commands_exist_with_their_options(path: Path) -> None:
    """Those of `lizardzoo` and of make, in blocks and in sentences."""
    from typer.main import get_command

    from lizardzoo.cli import app

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"(?:^|`)lizardzoo ([a-z][^\n`]*)", text, re.MULTILINE):
        name, *words = shlex.split(line, comments=True)
        assert name in commands, f"lizardzoo has no command {name}"
        known = {option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts}
        assert {word for word in words if word.startswith("-")} <= known, f"lizardzoo {line}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)


def messages() -> Iterator[str]:
    """Every text of the package, and of transformers where it is the one that speaks; {} where values are put in."""
    for path in [*(ROOT / "lizardzoo").rglob("*.py"), Path(inspect.getfile(transformers.AutoConfig))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_what_is_really_said() -> None:
    """A symptom in code font is an error's text; what is left out of it, numbers and names may be anything."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").replace("\n", " ")
    quotes = re.findall(r"\*\*`([^`]+ [^`]+)`\.\*\*", page)
    assert len(quotes) > 10
    said = list(messages())
    for quote in quotes:
        pieces = re.split(r"\.\.\.|'[^']*'|lizard_llama|\d+|\w+Layer\b", quote)
        pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in pieces), re.DOTALL)
        assert any(map(pattern.search, said)), f"nothing says {quote!r}"


@pytest.mark.parametrize(
    "package", [lz, lz.evaluate, lizardzoo.hub, lizardzoo.kernels, lizardzoo.testing], ids=lambda p: p.__name__
)
def test_the_reference_has_every_public_name(package: types.ModuleType) -> None:
    """mkdocs fails at a name that is shown and does not exist, this test at one that exists and is not shown."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)}
    assert set(package.__all__) - shown == set()


@pytest.fixture
def fresh_registries() -> Iterator[None]:
    """What a snippet registers is forgotten after it: the laws are run over every registered mixer."""
    from lizardzoo.adapters import ADAPTERS
    from lizardzoo.config import MIXERS, PRESETS
    from lizardzoo.registry import Registry

    registries: tuple[Registry[Any], ...] = (MIXERS, PRESETS, ADAPTERS)
    before = [set(registry.names()) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


@pytest.fixture(scope="module")
def figures() -> Any:
    """The script that draws the site's figures."""
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_that_pages_show_are_those_that_are_drawn(figures: Any) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert set(re.findall(r"figures/(\w+)\.svg", pages)) == set(figures.FIGURES)


def test_figures_are_pictures_and_always_the_same(figures: Any) -> None:
    for name in figures.FIGURES:
        drawn = figures.svg(name)
        assert ElementTree.fromstring(drawn).tag.endswith("svg"), name
        assert drawn == figures.svg(name), name


def test_the_kernels_figure_reads_the_notes_right(figures: Any) -> None:
    """A row that is taken for another, or a cell read wrong, and the parts no longer make the whole."""
    cases, parts, totals, peer = figures.notes_table(figures.NOTES.read_text(encoding="utf-8"))
    assert len(cases) == len(totals) == len(peer) >= 1
    for column, total in enumerate(totals):
        assert sum(times[column] for times in parts.values()) == pytest.approx(total, rel=0.01)


def test_every_public_name_exists_and_is_documented() -> None:
    """A dataclass without a docstring has its signature for one; `inspect.getdoc` would take its base's."""
    assert lz.__all__
    assert len(set(lz.__all__)) == len(lz.__all__)
    for name in lz.__all__:
        thing = getattr(lz, name)
        if inspect.isclass(thing) or callable(thing):
            text = thing.__doc__ or ""
            assert text.strip(), f"lizardzoo.{name} has no docstring"
            assert not text.startswith(f"{name}("), f"lizardzoo.{name} has no docstring of its own"


def test_the_changelog_is_about_this_version() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', pyproject, re.MULTILINE)
    newest = re.search(r"^## \[?(\d[^\s\]]*)", changelog, re.MULTILINE)
    assert version
    assert newest
    assert newest[1] == version[1] == lz.__version__
