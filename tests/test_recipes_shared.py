"""What the recipes share: one way of imports, the check of numbers, tables, sources of data and their errors."""

import ast
import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_multimax.publishing.results import Results
from recipes.image_classification import add_stochastic_depth
from recipes.shared.checks import DataError, check_numbers
from recipes.shared.data.images import ImageArguments, StoredImages, load_images, read_folder
from recipes.shared.data.sources import ABOUT, describe, reading_with_datasets
from recipes.shared.record import curve, finite, over_seeds
from recipes.shared.table import columns, comparison_rows, markdown

RECIPES = Path(__file__).parents[1] / "recipes"
#: The documented parts of the package.
PUBLIC = {"training", "diagnostics", "peft", "plots", "plots.style", "cache"}
PUBLIC |= {"publishing.results", "publishing.card", "publishing.hub"}


# -- imports -----------------------------------------------------------------------------------------------------------


def imported(path):
    """The modules that a file imports anywhere, and the names that it takes from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.py")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_scripts_use_the_shared_parts_and_these_the_public_package(path):
    shared = "shared" in path.parts
    for module, names in imported(path):
        package, *inner = module.split(".")
        if package == "hf_multimax":
            assert not inner or ".".join(inner) in PUBLIC, module
            assert not any(name.startswith("_") and name != "__version__" for name in names), (module, names)
        elif package == "recipes":
            assert inner[0] == "shared" and "metrics" not in path.parts[-3:-1], module
        assert not module.startswith("."), module
    assert not (shared and "__main__" in path.read_text())


def test_shared_parts_do_not_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(RECIPES.parent).with_suffix("").parts): path for path in RECIPES.rglob("*.py")}
    left = {
        name: {m for module, names in imported(path) for m in (module, *(f"{module}.{n}" for n in names))} & {*modules}
        for name, path in modules.items()
    }
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, sorted(left)
        left = {name: others for name, others in left.items() if name not in free}


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "text"),
    [
        ("(0, inf)", (1e-9, 3), (0, -1, math.nan, math.inf), "positive"),
        ("[2, inf)", (2, 9), (1, math.nan), "at least 2"),
        ("[0, inf)", (0, 9), (-1,), "at least 0"),
        ("[0, 1)", (0, 0.5), (1, -0.1, math.nan), r"in \[0, 1\)"),
        ("(0, 1]", (1, 0.5), (0, 1.1), r"in \(0, 1\]"),
    ],
)
def test_numbers_are_in_their_intervals(interval, inside, outside, text):
    for value in (*inside, None):
        check_numbers(SimpleNamespace(a=1, b=value), interval, "b")
    for value in outside:
        with pytest.raises(DataError, match=f"--b must be {text}, got {value}"):
            check_numbers(SimpleNamespace(a=inside[0], b=value), interval, "a", "b")


def test_what_json_does_not_have_is_none():
    assert finite({"a": [1.0, math.nan, (math.inf, 2)], "b": "x"}) == {"a": [1.0, None, [None, 2]], "b": "x"}


def test_a_curve_is_what_the_trainer_logged_of_losses():
    log = [{"step": 1, "loss": "2.5", "grad_norm": 1}, {"step": 2, "multimax/ts": 3.0}, {"step": 2, "eval_loss": 2}]
    assert curve(log) == [{"step": 1, "loss": 2.5, "grad_norm": 1.0}, {"step": 2, "eval_loss": 2.0}]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_have_every_cell_where_it_belongs():
    rows = [("", "SoftMax", "MultiMax"), ("loss", "1.25", "1"), ("a long name", "", "x")]
    lines = columns(rows).split("\n")
    assert lines[1] == "loss         1.25     1" and lines[2].index("x") == lines[0].index("MultiMax")
    assert markdown(rows).split("\n")[:3] == ["|  | SoftMax | MultiMax |", "|---|---|---|", "| loss | 1.25 | 1 |"]


def test_rows_of_a_comparison_are_what_results_says():
    for path in sorted((RECIPES / "results").glob("*.json")):
        if '"kind": "comparison"' not in path.read_text():
            continue
        results = Results(path)
        for p_values in (False, True):
            header, *rows = comparison_rows(results, p_values)
            assert [row[0] for row in rows] == list(results.arms) and ("p" in header) == p_values
            for row in rows:
                cells = dict(zip(header, row, strict=True))
                assert cells["mean ± std"] == results.measured(row[0], results.metric)
                assert cells["verdict"] == results.verdict(row[0]) and cells["memory"].replace(".", "").isdigit()


def test_one_seed_has_no_deviation():
    assert over_seeds([2.0]).std is None and over_seeds([1.0, 3.0]).std == pytest.approx(2**0.5)
    assert (over_seeds([1.0, 3.0]).mean, over_seeds([1.0, 3.0]).n) == (2.0, 2)


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_source_is_described_as_what_it_is(tmp_path, monkeypatch):
    for name, about in ABOUT.items():
        assert describe(name, (name,)) == {"name": name, "dataset": None, **about}
    (tmp_path / "web").mkdir()
    monkeypatch.chdir(tmp_path)
    assert describe("web", ("fashion-mnist",)) == {"name": "web", "dataset": None, "description": "web"}
    assert describe(".", ())["name"] == tmp_path.name
    for source in ("owner/set", "owner/set:config", "owner/set:config@test"):
        assert describe(source, ()) == {"name": source, "dataset": "owner/set", "description": source}


@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError])
def test_errors_of_a_reader_are_one_line_with_their_cause(kind):
    with pytest.raises(DataError, match="^x cannot be read: first$"), reading_with_datasets("x cannot be read"):
        raise kind("first\nsecond")
    with pytest.raises(DataError, match="^x: the cause$"), reading_with_datasets("x"):
        raise kind("outer") from kind("the cause\n...")
    with pytest.raises(DataError, match="^mine$"), reading_with_datasets("x"):
        raise DataError("mine")


def test_a_class_may_have_folders_of_its_own_and_any_split_a_name(tmp_path):
    for split in ("my train", "2nd"):
        for place in ("cats/a/b", "dogs"):
            (tmp_path / split / place).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / split / place / "[0].png")
        (tmp_path / split / "README.md").write_text("no class")
    train, held_out = load_images(ImageArguments(str(tmp_path), "my train", "2nd"))
    assert train.classes == held_out.classes == ["cats", "dogs"] and train.labels.tolist() == [0, 1]
    assert held_out.read(0).size == (4, 4)
    (tmp_path / "2nd" / "cats").rename(tmp_path / "2nd" / "zebras")
    with pytest.raises(DataError, match="zebras is a class that the training images do not have: cats, dogs"):
        read_folder(tmp_path / "2nd", train.classes)


def test_images_are_read_from_bytes_or_paths_and_named_if_they_cannot_be(tmp_path):
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    picture.save(tmp_path / "p.png")
    entries = [{"path": "inner.png", "bytes": buffer.getvalue()}, {"path": str(tmp_path / "p.png"), "bytes": None}]
    entries += [{"path": None, "bytes": b"no image"}, {"path": str(tmp_path / "none.png"), "bytes": None}, None]
    images = StoredImages("set (train)", ["a"], [0] * 5, entries)
    for index in (0, 1):
        np.testing.assert_array_equal(np.asarray(images.read(index)), np.asarray(picture))
    for index, message in (
        (2, "^image 2 of set .train. cannot"),
        (3, "none.png cannot"),
        (4, "^image 4 .* is missing"),
    ):
        with pytest.raises(DataError, match=message):
            images.read(index)


def test_stochastic_depth_needs_blocks():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(DataError, match="Sequential is in a Sequential"):
        add_stochastic_depth(model, 0.1)
    add_stochastic_depth(model, 0.0)
