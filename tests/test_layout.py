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
#: Earlier modules and packages know nothing of later ones; the longest entry that a name begins with is its place.
ORDER = (
    "version",
    "cache",
    "numbers",
    "extension",
    "config",
    "attention.__init__",
    "attention.context",
    "attention.schema",
    "attention.call",
    "attention.operators",
    "attention.choice",
    "attention.triton.modulator",
    "rows",
    "attention.rowwise",
    "functional",
    "attention.tiled",
    "attention.native",
    "attention.triton",
    "loss",
    "normalizers.base",
    "normalizers.registry",
    "normalizers",
    "attention.choose",
    "attention.eager",
    "attention.scaled",
    "attention.watched",
    "attention.interface",
    "publishing.__init__",
    "publishing.results",
    "publishing.subject",
    "publishing.tables",
    "publishing.card",
    "plots",
    "publishing.hub",
    "models",
    "modeling",
    "distributed",
    "peft",
    "convert",
    "normalizers.annealing",
    "diagnostics",
    "reporting",
    "training",
    "__init__",
    "command_line.loading",
    "command_line.words",
    "command_line.data",
    "explorer",
    "command_line",
)
#: What computes with tensors alone.
KERNELS = ("attention.context", "attention.schema", "attention.call", "attention.operators", "attention.rowwise")
KERNELS = (*KERNELS, "rows.call", "rows.function", "rows.triton")
KERNELS = (*KERNELS, "attention.tiled", "attention.native", "attention.triton", "loss")


FOLDERS = {str(path.parent.relative_to(PACKAGE)).replace("/", ".") for path in PACKAGE.glob("*/**/__init__.py")}


def modules() -> dict[str, Path]:
    return {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules and packages of this package that a file imports anywhere, inside functions, too."""
    known, found = set(modules()), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in (name.removeprefix("hf_multimax.") for name in names if name.startswith("hf_multimax.")):
            package = name.rpartition(".")[0]
            found |= {name} & known or {name} & FOLDERS or {package} & (known | FOLDERS) or {"__init__"}
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
    name = f"{name}.__init__" if name in FOLDERS and f"{name}.__init__" in ORDER else name
    return ORDER.index(max((known for known in ORDER if f"{name}.".startswith(f"{known}.")), key=len))


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_comes_before_it(name):
    for other in imports(modules()[name]):
        same = ORDER[place(other)] == ORDER[place(name)]
        assert place(other) < place(name) or same, other


@pytest.mark.parametrize("folder", sorted({name for name in ORDER if any(m.startswith(f"{name}.") for m in modules())}))
def test_no_two_modules_of_a_package_need_each_other(folder):
    inside = {name: imports(path) for name, path in modules().items() if ORDER[place(name)] == folder}
    waiting = {name: {other for other in others if other in inside} - {name} for name, others in inside.items()}
    while waiting:
        ready = {name for name, others in waiting.items() if not others & waiting.keys()}
        assert ready, f"these import each other: {waiting}"
        waiting = {name: others for name, others in waiting.items() if name not in ready}


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith(KERNELS)])
def test_kernels_stand_alone(name):
    assert all(other.startswith((*KERNELS, "extension")) for other in imports(modules()[name]))


@pytest.mark.parametrize("name", modules())
def test_a_module_is_imported_without_optional_packages(name):
    kernels = name.startswith(("attention.triton.", "rows.triton.", "loss.triton"))
    triton = kernels and not name.endswith(("backend", "arguments", "__init__"))
    peft = {"peft"} if name in ("peft.config", "peft.layer", "peft.model") else set()
    shell = {"typer", "rich"} if name.startswith("command_line.") and name != "command_line.main" else set()
    assert outer_imports(modules()[name]) <= EVERYWHERE | ({"triton"} if triton else set()) | peft | shell


def test_what_is_slow_to_import_is_not_imported():
    script = "import sys, transformers.modeling_utils; before = set(sys.modules); import hf_multimax; "
    script += "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "hf_multimax.attention" in loaded
    assert not loaded & {
        "transformers.trainer",
        "accelerate",
        "entmax",
        "triton",
        "matplotlib",
        "jinja2",
        "peft",
        "typer",
        "rich",
        "gradio",
    }
    assert not loaded & {
        "hf_multimax.training",
        "hf_multimax.publishing.card",
        "hf_multimax.diagnostics",
        "hf_multimax.publishing.hub",
    }


def test_recipes_and_benchmarks_use_public_names_only():
    root = PACKAGE.parent
    for path in [*root.glob("recipes/*.py"), *root.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_multimax"):
                assert not any(alias.name.startswith("_") for alias in node.names), path


def test_functions_have_at_most_ten_parameters():
    root = PACKAGE.parent
    files = [path for folder in ("hf_multimax", "recipes", "benchmarks") for path in (root / folder).rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_triton_kernel(node):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                given = [argument for argument in given if argument.arg not in ("self", "cls")]
                assert len(given) + bool(node.args.vararg) + bool(node.args.kwarg) <= 10, f"{path}: {node.name}"


def is_triton_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
