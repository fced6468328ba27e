"""The arrows of the house: who may import whom, read from every import statement of the package.

Imports inside functions and under TYPE_CHECKING count as well. A module or a third-party package that the
tables below do not know fails: a new room is entered here first.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "lizardzoo"
MAX_LINES = 500

# Room (a module or folder right under lizardzoo/) -> the rooms it may import, besides itself.
GROUND = {"errors", "registry", "config"}
MIXERS = GROUND | {"kernels", "mixers"}
ADAPTERS = MIXERS | {"cache", "hub", "smollm2", "adapters"}
VERBS = {"loading", "linearize", "streaming", "distill", "evaluate", "diagnose", "selection"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "registry": {"errors"},
    "config": {"errors", "registry"},
    "kernels": {"errors"},
    "mixers": MIXERS,
    "cache": MIXERS,
    "hub": MIXERS | {"smollm2"},  # folders, files and cards; adapters lend their models what it knows
    "adapters": ADAPTERS,
    "loading": ADAPTERS,
    "linearize": ADAPTERS | {"loading"},
    "streaming": ADAPTERS | {"loading", "linearize"},
    "distill": ADAPTERS | {"loading"},
    "evaluate": ADAPTERS,
    "diagnose": ADAPTERS | {"evaluate"},
    "selection": ADAPTERS | {"linearize", "evaluate"},
    "smollm2": {"errors"},
    "testing": ADAPTERS | {"loading", "linearize"},  # for tests and plug-in authors: nothing in the package imports it
    "cli": ADAPTERS | VERBS,
    "__main__": {"cli"},
    "__init__": ADAPTERS | VERBS,  # the public names; no room imports them from here
}

# Inside these folders a part imports itself and the shared parts, never a sibling: variants do not know each
# other. Collectors put variants together.
SHARED: dict[str, set[str]] = {
    "kernels": {"dispatch", "features", "launching", "merge", "rotary", "rows", "state"},
    "mixers": {"base", "branches", "feature_maps", "gates", "merge"},
    "adapters": {"attention", "base", "bases", "config", "fit", "limits", "masks", "publishing"},
}
COLLECTORS: dict[str, set[str]] = {
    "kernels": {"__init__", "hybrid", "heavy"},  # hybrid is made of both branches, heavy stands behind a window
    "mixers": {"__init__", "presets"},
    "adapters": {"__init__"},
}

# Third-party package -> the rooms that may import it.
TRANSFORMERS = {"cache", "hub", "adapters", "smollm2", "testing", "cli"} | VERBS
TORCH = set(ROOMS) - {"errors", "registry", "config", "__main__"}
THIRD_PARTY: dict[str, set[str]] = {
    "torch": TORCH,
    "numpy": {"distill", "evaluate", "diagnose"},
    "triton": {"kernels"},  # and there in <op>/triton*.py only
    "transformers": TRANSFORMERS,
    "huggingface_hub": TRANSFORMERS,
    "safetensors": {"loading", "streaming", "distill", "hub", "adapters", "testing"},
    "jinja2": {"hub"},
    "yaml": {"hub"},
    "tokenizers": {"smollm2"},
    "gguf": {"smollm2"},
    "filelock": {"smollm2"},
    "peft": {"distill", "testing"},
    "accelerate": {"distill"},
    "datasets": {"distill", "evaluate"},
    "matplotlib": {"distill", "evaluate", "diagnose"},
    "lm_eval": {"evaluate"},
    "tqdm": {"distill"},
    "typer": {"cli"},
    "rich": {"cli", "distill", "evaluate", "diagnose", "selection"},
    "hypothesis": {"testing"},
}
# `import lizardzoo` and a forward pass need none of these.
OPTIONAL = [
    "accelerate",
    "datasets",
    "flash_attn",
    "gguf",
    "hypothesis",
    "lm_eval",
    "matplotlib",
    "peft",
    "triton",
]

DYNAMIC_IMPORTS = {"importlib.import_module", "import_module", "__import__"}
FILES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """One imported module, as `lizardzoo.kernels.window` or `torch.nn`, and where it is written."""

    target: str
    place: str


def module_parts(path: Path) -> list[str]:
    """["kernels", "window", "reference"] for that file; a package's own file ends in "__init__"."""
    return list(path.relative_to(PACKAGE).with_suffix("").parts)


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package (and not a name inside one)."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import in the file, wherever it stands, dynamic ones with a literal name included."""
    package = ["lizardzoo", *module_parts(path)[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            ours = source.split(".")[0] == "lizardzoo"
            targets = [name if ours and is_module(name) else source for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC_IMPORTS:
            name = node.args[0] if node.args else None
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno} imports by a computed name"
            targets = [str(name.value)]
        for target in dict.fromkeys(targets):
            yield Import(target, f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}")


def inner_imports(path: Path) -> list[tuple[list[str], str]]:
    """The imports of the package's own modules: parts below lizardzoo (["__init__"] for itself), place."""
    found = [i for i in imports_of(path) if i.target.split(".")[0] == "lizardzoo"]
    return [(i.target.split(".")[1:] or ["__init__"], i.place) for i in found]


def outer_imports(path: Path) -> list[tuple[str, str]]:
    """The imports from outside the standard library and the package: top-level name, place."""
    inside = {"lizardzoo", *sys.stdlib_module_names}
    found = [(i.target.split(".")[0], i.place) for i in imports_of(path)]
    return [(name, place) for name, place in found if name not in inside]


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_parts(path)))
def test_imports_point_down(path: Path) -> None:
    room, *_ = module_parts(path)
    assert room in ROOMS, f"lizardzoo/{room} is not in this test's table ROOMS: enter it and its arrows"
    allowed = ROOMS[room] | {room}
    found = inner_imports(path)
    wrong = [f"{place} imports {target[0]}" for target, place in found if target[0] not in allowed]
    assert not wrong, f"{room} may import {sorted(allowed)} only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_parts(path)))
def test_variants_do_not_know_each_other(path: Path) -> None:
    room, *inside = module_parts(path)
    if room not in SHARED or inside[0] in COLLECTORS[room]:
        return
    allowed = SHARED[room] | {inside[0]}
    siblings = [
        f"{place} imports {'.'.join(target)}"
        for target, place in inner_imports(path)
        if target[0] == room and [*target, "__init__"][1] not in allowed
    ]
    assert not siblings, f"{room}/{inside[0]} may import {sorted(allowed)} of its own room only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_parts(path)))
def test_third_party_packages_stay_in_their_rooms(path: Path) -> None:
    room, *_ = module_parts(path)
    for name, place in outer_imports(path):
        assert name in THIRD_PARTY, f"{place}: {name} is not in this test's table THIRD_PARTY"
        rooms = THIRD_PARTY[name]
        assert room in rooms, f"{place}: {name} may be imported in {sorted(rooms)} only"


def test_triton_is_imported_in_kernel_files_only_and_kernels_never_call_the_reference() -> None:
    for path in FILES:
        parts = module_parts(path)
        is_kernel = parts[0] == "kernels" and len(parts) == 3 and parts[2].startswith("triton")
        if not is_kernel:
            assert "triton" not in [name for name, _ in outer_imports(path)], f"{path} imports triton"
        else:
            wrong = [place for target, place in inner_imports(path) if "reference" in target]
            assert not wrong, "a Triton kernel must not lean on the reference it is tested against"


def test_every_third_party_import_is_a_declared_dependency() -> None:
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    declared = {
        {"pyyaml": "yaml"}.get(name, name).replace("-", "_")
        for name in re.findall(r'"([A-Za-z][\w-]*)(?:>=|\[)', pyproject)
    }
    from_others = {"tokenizers"}  # transformers pins the one version it works with
    used = {name for path in FILES for name, _ in outer_imports(path)}
    assert used - declared - from_others == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_parts(path)))
def test_files_are_short_enough_to_be_read_whole(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(PACKAGE.parent)} has {lines} lines; split it"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, from the repository's root."""
    return subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)


def test_the_package_imports_and_runs_without_its_optional_dependencies() -> None:
    """Each is made unimportable; a linearized model still answers."""
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import lizardzoo as lz
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=16)
model = lz.linearize(LlamaForCausalLM(config), ["recommended", "hybrid"])
logits = model(torch.arange(10)[None]).logits
assert logits.isfinite().all()
loaded = [name for name in {OPTIONAL!r} if sys.modules.get(name) is not None]
assert not loaded, loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_loads_no_optional_dependency_by_itself() -> None:
    """Compared with what transformers' own Llama loads where they are installed."""
    code = f"""
import sys
import transformers.models.llama.modeling_llama
before = set(sys.modules)
import lizardzoo
new = sorted(set({[*OPTIONAL, "typer", "rich"]!r}) & (set(sys.modules) - before))
assert not new, new
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
