"""The package's data flows one way: what each module may import of the others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_multimax

PACKAGE = Path(hf_multimax.__file__).parent
#: What every user has (huggingface_hub comes with transformers); other packages are imported where they are used.
EVERYWHERE = {*sys.stdlib_module_names, "torch", "transformers", "numpy", "safetensors", "huggingface_hub"}
#: Earlier modules know nothing of later ones.
ORDER = (
    "version",
    "cache",
    "config",
    "functional",
    "modulator",
    "structured",
    "registry",
    "normalizers",
    "kernels",
    "backend_choice",
    "backends",
    "attention",
    "results",
    "card_subject",
    "card_tables",
    "cards",
    "plots",
    "hub",
    "models",
    "modeling",
    "distributed",
    "peft",
    "convert",
    "annealing",
    "diagnostics",
    "training",
    "__init__",
)


def modules() -> dict[str, Path]:
    return {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The top-level modules of this package that a file imports anywhere, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add("kernels")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_multimax":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] for name in names if name[0] == "hf_multimax" and len(name) > 1}
    return found


def outer_imports(path: Path) -> set[str]:
    """The top-level packages, this one aside, that are imported when a file is."""
    found, waiting = set(), list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found - {"hf_multimax"}


def place(name: str) -> int:
    return ORDER.index(name.split(".")[0])


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_comes_before_it(name):
    for other in imports(modules()[name]):
        own_package = name.split(".")[0] if "." in name else None
        assert place(other) < place(name) or other == own_package, other


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("kernels")])
def test_kernels_stand_alone(name):
    assert imports(modules()[name]) <= {"kernels", "cache"}


@pytest.mark.parametrize("name", modules())
def test_a_module_is_imported_without_optional_packages(name):
    kernels = {"triton"} if name.startswith("kernels.triton_") and name != "kernels.triton_attention" else set()
    peft = {"peft"} if name in ("peft.config", "peft.layer", "peft.model") else set()
    assert outer_imports(modules()[name]) <= EVERYWHERE | kernels | peft


def test_what_is_slow_to_import_is_not_imported():
    script = "import sys, transformers.modeling_utils; before = set(sys.modules); import hf_multimax; "
    script += "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "hf_multimax.attention" in loaded
    assert not loaded & {"transformers.trainer", "accelerate", "entmax", "triton", "matplotlib", "jinja2", "peft"}
    assert not loaded & {"hf_multimax.training", "hf_multimax.cards", "hf_multimax.diagnostics", "hf_multimax.hub"}


def test_recipes_and_benchmarks_use_public_names_only():
    root = PACKAGE.parent
    for path in [*root.glob("recipes/*.py"), *root.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_multimax"):
                assert not any(alias.name.startswith("_") for alias in node.names), path
