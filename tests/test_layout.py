"""The package's data flows one way: what each module may import of the others."""

import ast
from pathlib import Path

import pytest

import hf_multimax

PACKAGE = Path(hf_multimax.__file__).parent
#: Earlier modules know nothing of later ones.
ORDER = (
    "version",
    "config",
    "functional",
    "modulator",
    "structured",
    "registry",
    "normalizers",
    "kernels",
    "backends",
    "attention",
    "models",
    "modeling",
    "distributed",
    "peft",
    "results",
    "card_subject",
    "card_tables",
    "cards",
    "convert",
    "annealing",
    "diagnostics",
    "plots",
    "hub",
    "training",
    "__init__",
)


def modules() -> dict[str, Path]:
    return {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The top-level modules of this package that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add("kernels")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_multimax":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found


def place(name: str) -> int:
    return ORDER.index(name.split(".")[0])


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_comes_before_it(name):
    for other in imports(modules()[name]):
        own_package = name.split(".")[0] if "." in name else None
        assert place(other) < place(name) or other == own_package, other


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("kernels")])
def test_kernels_stand_alone(name):
    assert imports(modules()[name]) <= {"kernels"}


def test_recipes_and_benchmarks_use_public_names_only():
    root = PACKAGE.parent
    for path in [*root.glob("recipes/*.py"), *root.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_multimax"):
                assert not any(alias.name.startswith("_") for alias in node.names), path
