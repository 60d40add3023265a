"""Every command, in this process by Typer's runner, and the entry point in one of its own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import authors
import pytest
import torch
from hub_server import TOKEN, HubServer
from models import inputs_for, make
from test_measured_models import randomised
from transformers import AutoModelForCausalLM

pytest.importorskip("typer")
from typer.testing import CliRunner

import hf_multimax
from hf_multimax import is_patched, multimax_parameters, patch_model
from hf_multimax.command_line import main as entry
from hf_multimax.command_line.app import app
from hf_multimax.diagnostics import measure_model
from recipes.shared.tokens import train_tokenizer

SAMPLE = Path(hf_multimax.__file__).parent / "command_line" / "sample.txt"
COMMANDS = (
    "inspect", "measure", "compare", "plot", "explore", "patch", "push", "convert", "supported", "backends", "env",
    "demo",
)  # fmt: skip


def run(*arguments, code=0, **options):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True, **options)
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def error(*arguments, code=1):
    """What a command that fails says: one line on standard error, no traceback."""
    done = run(*arguments, code=code)
    assert isinstance(done.exception, SystemExit) and "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints: a stock model, a patched one, an adapter, others."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(SAMPLE.read_text(), 300, 64)
    stock = make("GPT2LMHeadModel", vocab_size=300)
    stock.save_pretrained(root / "stock")
    patched = randomised(patch_model(make("GPT2LMHeadModel", vocab_size=300), output=True), 0.4)
    with torch.no_grad():  # sigma rises again for small scores
        patched.transformer.h[0].attn.multimax.ranges.zero_()
        patched.transformer.h[0].attn.multimax.ts.copy_(torch.tensor([0.0, 0.0, 0.9, 0.0]))
    patched.save_pretrained(root / "patched")
    image = randomised(patch_model(make("ViTForImageClassification")))
    image.save_pretrained(root / "image")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    processor |= {"image_mean": [0.5], "image_std": [0.5], "do_resize": True}
    (root / "image" / "preprocessor_config.json").write_text(json.dumps(processor))
    make("T5ForConditionalGeneration", vocab_size=300).save_pretrained(root / "t5")
    for name in ("stock", "patched", "t5"):
        tokenizer.save_pretrained(root / name)
    return root


def test_every_command_has_a_test_and_help_with_examples():
    listed = run("--help").output
    for name in COMMANDS:
        assert name in listed
        assert f"hf-multimax {name}" in run(name, "--help").output
    names = {command.name for command in app.registered_commands}
    assert names == set(COMMANDS)
    assert run("--version").output.strip() == hf_multimax.__version__


def test_patch_saves_a_model_with_the_same_outputs(folders, tmp_path):
    options = ("--order", 1, "--per-head", "--include", r"h\.1\.")
    done = run("patch", folders / "stock", tmp_path / "new", *options)
    assert "16 learnable scalars" in done.stdout and "1 attention layers" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert is_patched(model) and model.config.multimax["include"] == [r"h\.1\."]
    batch = inputs_for(model, labels=False)
    stock = AutoModelForCausalLM.from_pretrained(folders / "stock", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
    assert (tmp_path / "new" / "tokenizer.json").is_file()

    assert "not empty" in error("patch", folders / "stock", tmp_path / "new")
    run("patch", folders / "stock", tmp_path / "new", "--force", "--normalizer", "rsoftmax", "--option", "sparsity=0.3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.config.multimax["normalizer_kwargs"] == {"sparsity": 0.3}


def test_inspect_shows_the_scalars_and_names_where_sigma_rises_again(folders):
    done = run("inspect", folders / "patched")
    assert "transformer.h.0.attn: sigma rises again below -0.56, where" in done.stdout
    found = json.loads(run("inspect", folders / "patched", "--json").stdout)["layers"]
    model = AutoModelForCausalLM.from_pretrained(folders / "patched")
    for name, parameter in multimax_parameters(model).items():
        layer, _, key = name.rpartition(".multimax.")
        layer, key = (layer, key) if layer else name.split(".")
        assert found[layer][key] == pytest.approx(parameter.tolist())
    (fall,) = found["transformer.h.0.attn"]["falls"]
    assert fall["low"] is None and fall["high"] == pytest.approx(-1 / 1.8) and fall["share"] > 0.02
    x, y = found["transformer.h.0.attn"]["sigma"][0]
    assert y == pytest.approx(x + 0.9 * min(x, 0) ** 2, rel=1e-5) and x < 0
    assert "is a stock GPT2LMHeadModel, not a MultiMax model" in error("inspect", folders / "stock")
    assert "Give --data" in run("inspect", folders / "image").stdout


def test_measure_writes_what_the_library_measures(folders, tmp_path):
    ids = torch.randint(3, 290, (2, 3, 17), generator=torch.Generator().manual_seed(0))
    data = tmp_path / "batches.jsonl"
    data.write_text("\n".join(json.dumps({"input_ids": batch.tolist()}) for batch in ids))
    for name in ("stock", "patched"):
        found = json.loads(run("measure", folders / name, "--data", data, "--json", "--s", 0.1).stdout)
        model = AutoModelForCausalLM.from_pretrained(folders / name)
        expected = measure_model(model, [{"input_ids": batch} for batch in ids], s=0.1)
        assert list(found["layers"]) == list(expected)
        for layer, values in found["layers"].items():
            for measure, value in values["measures"].items():
                wanted = expected[layer].measures[measure].value
                assert value["value"] == (None if math.isnan(wanted) else pytest.approx(wanted, rel=1e-5)), measure
    table = run("measure", folders / "stock", "--heads", "--data", data).stdout
    assert table.count("head 3") == 2 and "multi-modality" in table and "Reference probability" in table


@pytest.mark.parametrize("kind", ["text", "folder", "stdin", "images", "pairs"])
def test_all_kinds_of_data(kind, folders, tmp_path):
    model, data, given = folders / "stock", tmp_path / "data", None
    if kind == "text":
        data = SAMPLE
    elif kind == "folder":
        data.mkdir()
        (data / "a.txt").write_text("The river remembers. " * 20)
    elif kind == "stdin":
        data, given = "-", "The lighthouse keeper counted the ships. " * 20
    elif kind == "images":
        image = pytest.importorskip("PIL.Image")
        model = folders / "image"
        data.mkdir()
        for i in range(3):
            image.new("L", (20, 24), 60 * i).save(data / f"{i}.png")
    else:
        model = folders / "t5"
        data.write_text("A river remembers.\tEin Fluss erinnert sich.\nA map leaves out.\tEine Karte.\n")
    done = run(
        "measure", model, "--data", data, "--length", 24, "--batch-size", 2, "--batches", 2, "--json", input=given
    )
    layers = json.loads(done.stdout)["layers"]
    assert "output" in layers and len(layers) >= 3
    assert all(0 < layer["measures"]["entropy"]["value"] < 6 for layer in layers.values())


def test_adapters_are_loaded_with_their_base(folders, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folders / "stock")
    adapted = peft.get_peft_model(model, hf_multimax.peft.MultiMaxAdapterConfig(init="paper", init_std=0.5))
    adapted.save_pretrained(tmp_path / "adapter")
    found = json.loads(run("inspect", tmp_path / "adapter", "--json").stdout)["layers"]
    learned = torch.stack([p.detach() for name, p in adapted.named_parameters() if name.endswith(".ts")])
    torch.testing.assert_close(torch.tensor([layer["ts"] for layer in found.values()]), learned)
    assert len(json.loads(run("measure", tmp_path / "adapter", "--json").stdout)["layers"]) == 3
    assert "is an adapter" in error("patch", tmp_path / "adapter", tmp_path / "new")


def test_compare_measures_both_on_the_same_batches(folders, tmp_path):
    done = run("compare", folders / "stock", folders / "patched", "--out", tmp_path / "figures", "--json")
    found = json.loads(done.stdout)
    alone = json.loads(run("measure", folders / "patched", "--json").stdout)["layers"]
    assert found["b"]["layers"] == alone and found["a"]["layers"] != alone
    assert (tmp_path / "figures" / "measures.png").is_file()
    assert "sparsity B" in run("compare", folders / "stock", folders / "patched").stdout
    for index in (0, 1):
        patch_model(make("GPT2Model", vocab_size=300), include=rf"h\.{index}\.").save_pretrained(tmp_path / str(index))
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [[3, 4, 5]]}')
    assert "no layer in common" in error("compare", tmp_path / "0", tmp_path / "1", "--data", data)


def test_plot_draws_everything(folders, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--text", "The river remembers.", "--beside", folders / "stock", "--format", "svg")
    done = run("plot", folders / "patched", "--out", tmp_path / "figures", *options)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"modulators.svg", "measures.svg", "maps.svg"}
    assert done.stdout.split() == [str(tmp_path / "figures" / f"{x}.svg") for x in ("modulators", "measures", "maps")]
    image = pytest.importorskip("PIL.Image")
    image.new("L", (20, 24), 60).save(tmp_path / "cat.png")
    options = ("--data", tmp_path / "cat.png", "--image", tmp_path / "cat.png")
    run("plot", folders / "image", "--out", tmp_path / "more", *options)
    assert {path.name for path in (tmp_path / "more").iterdir()} == {"modulators.png", "measures.png", "image.png"}
    assert "no layer 'h.9'" in error("plot", folders / "stock", "--out", tmp_path, "--text", "a b", "--layer", "h.9")
    assert "not supported" in error("plot", folders / "stock", "--out", tmp_path, "--format", "xyz")


def test_convert_goes_both_ways(folders, tmp_path):
    weights = authors.randomize(authors.ViT()).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    layout = ("--layout", "timm-vit")
    run("convert", tmp_path / "weights.pth", tmp_path / "model", *layout, "--option", "num_heads=4")
    run("convert", tmp_path / "model", tmp_path / "back.safetensors", *layout, "--to-authors")
    from safetensors.torch import load_file

    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in back)
    assert "unknown layout 'vit'" in error("convert", tmp_path / "weights.pth", tmp_path / "x", "--layout", "vit")
    assert "num_heads" in error("convert", tmp_path / "weights.pth", tmp_path / "x", *layout)
    assert "NAME=VALUE" in error("convert", tmp_path / "weights.pth", tmp_path / "x", *layout, "--option", "num_heads")
    assert "no such file" in error("convert", tmp_path / "none.pth", tmp_path / "x", *layout)


def test_supported_says_what_the_sweep_found():
    assert "gpt2 (GPT2LMHeadModel): passes every check" in run("supported", "gpt2").stdout
    assert "no attention layer" in run("supported", "bit", code=1).stdout
    assert "gpt2" in error("supported", "gptx")
    found = json.loads(run("supported", "--json").stdout)
    assert len(found["types"]) > 600
    from benchmarks.architectures import page, results

    assert page.SHIPPED.read_text() == page.shipped(results.read())


def test_backends_and_env_describe_this_machine(monkeypatch):
    found = json.loads(run("backends", "--json").stdout)
    assert list(found) == ["auto", "eager", "tiled", "native", "triton"]
    assert found["eager"]["works"] and all(entry["works"] != bool(entry["why_not"]) for entry in found.values())
    assert "tiled" in run("backends").stdout
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for done in (run("env"), run("env", "--json")):
        assert torch.__version__.split("+")[0] in done.stdout and "hf_secret" not in done.output
    assert json.loads(run("env", "--json").stdout)["hf-multimax"] == hf_multimax.__version__


def test_demo_trains_and_patches(tmp_path):
    found = json.loads(run("demo", "--steps", 3, "--out", tmp_path / "demo", "--json").stdout)
    assert found["loss"]["patched"] == pytest.approx(found["loss"]["trained"], rel=1e-5)
    assert found["loss"]["MultiMax"] < found["loss"]["trained"]
    assert is_patched(AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "multimax"))
    compared = json.loads(
        run("compare", tmp_path / "demo" / "softmax", tmp_path / "demo" / "multimax", "--json").stdout
    )
    assert list(compared["a"]["layers"]) == ["transformer.h.0.attn", "transformer.h.1.attn", "output"]
    assert "patched" in run("demo", "--steps", 1).stdout
    (tmp_path / "short.txt").write_text("too short")
    assert "too short" in error("demo", "--data", tmp_path / "short.txt")


@pytest.mark.parametrize("command", ["inspect", "measure", "compare", "plot", "patch", "push"])
def test_a_model_that_is_not_there(command, folders, tmp_path):
    rest = {"compare": [folders / "stock"], "plot": ["--out", tmp_path / "x"], "patch": [tmp_path / "x"]}
    rest["push"] = ["you/model"]
    assert "no such folder" in error(command, tmp_path / "none", *rest.get(command, []))
    (tmp_path / "empty").mkdir()
    error(command, tmp_path / "empty", *rest.get(command, []))


@pytest.mark.parametrize("command", ["plot", "compare", "patch", "demo"])
def test_a_folder_that_cannot_be_written(command, folders, tmp_path):
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "folder"
    arguments = {
        "plot": [folders / "patched", "--out", place],
        "compare": [folders / "stock", folders / "patched", "--out", place],
        "patch": [folders / "stock", place],
        "demo": ["--out", place],
    }
    assert "file" in error(command, *arguments[command])


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--data", "none.txt"], "no such file or folder"),
        (["--device", "gpu"], "gpu"),
        (["--data", "{folders}/image/model.safetensors"], "no UTF-8 text"),
        (["--data", "{folders}/image"], "no file that ends in"),
    ],
)
def test_data_that_are_none(arguments, text, folders):
    arguments = [argument.format(folders=folders) for argument in arguments]
    assert text in error("measure", folders / "stock", *arguments)
    if "--device" not in arguments:
        assert error("inspect", folders / "patched", *arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_option_is_a_usage_error(command):
    done = run(command, "--no-such-option", code=2)
    assert "No such option" in done.stderr and "Traceback" not in done.output


def test_options_out_of_range_are_named(folders, tmp_path):
    assert "MultiMaxConfig.order must be" in error("patch", folders / "stock", tmp_path / "x", "--order", 0)
    assert "unknown normalizer" in error("patch", folders / "stock", tmp_path / "x", "--normalizer", "softmaxx")
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())
    assert "--batches" in run("measure", folders / "stock", "--batches", 0, code=2).stderr
    assert "must be a probability" in error("measure", folders / "stock", "--s", 0.0)


def test_traceback_shows_where(folders):
    done = run("--traceback", "inspect", folders / "stock", code=1)
    assert isinstance(done.exception, ValueError)
    assert "error: " in run("inspect", folders / "stock", code=1).stderr


def test_without_typer_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as exit_:
        entry.main()
    assert exit_.value.code == "hf-multimax needs typer: pip install 'hf-multimax[cli]'"


def in_a_process(*arguments, **environment):
    script = "import sys; from hf_multimax.command_line.main import main; sys.argv[0] = 'hf-multimax'; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(hf_multimax.__file__).parents[1]), **environment},
        timeout=300,
    )


def test_the_entry_point_pushes_to_a_hub(folders, tmp_path):
    import tomllib

    project = tomllib.loads((Path(hf_multimax.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hf-multimax": "hf_multimax.command_line.main:main"}
    with HubServer() as hub:
        hub.users[TOKEN] = "your-name"
        environment = hub.environment(tmp_path / "hf")
        done = in_a_process("push", folders / "patched", "your-name/model", "--private", **environment)
        assert done.returncode == 0, done.stderr
        assert "your-name/model" in done.stdout
        shown = in_a_process("inspect", "your-name/model", "--json", **environment)
        assert shown.returncode == 0, shown.stderr
        assert len(json.loads(shown.stdout)["layers"]) == 3
        refused = in_a_process("push", folders / "stock", "your-name/other", **environment)
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
