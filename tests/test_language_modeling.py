"""The language modelling recipe and what all recipes share: arguments, normalizers, resumption, results, refusals."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import make
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

import hf_multimax
from hf_multimax import multimax_parameters, patch_model
from recipes import language_modeling
from recipes.shared import record
from recipes.shared.checks import DataError
from recipes.shared.data.text import load_text
from recipes.shared.models import ModelArguments, build_model
from recipes.shared.record import read_yaml, write_json
from recipes.shared.run import parse
from recipes.shared.tokens import encode, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "data": "pydoc",
    "max_characters": 100_000,
    "vocab_size": 300,
    "context": 16,
    "max_eval_windows": 8,
    "model_config": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module", autouse=True)
def _a_short_text(tmp_path_factory):
    """The first lines of the built-in text, in a file: a tokenizer of the whole is slow to train."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(load_text("pydoc")[:60_000], encoding="utf-8")
    TINY["data"] = str(path)


BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def config_file(folder, **values):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TINY, **values}), encoding="utf-8")
    return str(path)


def run(folder, *options, **values):
    arguments = [config_file(folder, **values), "--output_dir", str(folder / "out"), *options]
    return language_modeling.main(*language_modeling.RECIPE, arguments)


def refused(folder, capsys, *options, **values):
    with pytest.raises(SystemExit) as stop:
        run(folder, *options, **values)
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not (folder / "out").exists()
    return message


def losses(results):
    return [(point["step"], point[key]) for point in results["curve"] for key in ("loss", "eval_loss") if key in point]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "layers", "scalars"),
    [
        ({"normalizer": "softmax"}, ("transformer.h.0.attn", "transformer.h.1.attn"), 0),
        ({"output": True}, ("transformer.h.0.attn", "transformer.h.1.attn", "multimax_output"), 24),
        ({"attention": False, "output": True}, ("multimax_output",), 8),
        ({"normalizer": "rsoftmax", "normalizer_kwargs": {"sparsity": 0.3}}, None, 0),
    ],
    ids=str,
)
def test_a_run_from_scratch_writes_results_and_a_model_that_loads(tmp_path, options, layers, scalars):
    results = run(tmp_path, **options)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert results["task"] == "text-generation" and results["seed"] == 42
    assert results["model"]["multimax_parameters"] == scalars
    assert (results["multimax"] is None) == (options.get("normalizer") == "softmax")
    if layers:
        assert set(results["layers"]) == set(layers)
    assert results["training"]["steps"] == 4 and results["training"]["world_size"] == 1
    assert results["data"]["evaluation_tokens"] == 8 * 16
    assert [step for step, _ in losses(results)] == [1, 2, 2, 3, 4, 4, 4]
    assert results["time"]["seconds_per_step"] > 0 and results["memory"]["peak_bytes"] > 1e6
    assert results["memory"]["phase"] == "training"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert hf_multimax.is_patched(model) == (results["multimax"] is not None)
    check_perplexity(model, tokenizer, results)


def check_perplexity(model, tokenizer, results):
    """The figures again, token by token, from the definition."""
    text = Path(TINY["data"]).read_text()
    cut = text.find("\n", int(len(text) * 0.95)) + 1
    windows = encode(tokenizer, text[cut:])[: 8 * 16].view(8, 16)
    with torch.no_grad():
        log_p = model(windows).logits.double().log_softmax(-1)
    token_losses = -log_p[:, :-1].gather(-1, windows[:, 1:, None])
    mean = token_losses.mean().item()
    size = len(tokenizer.decode(windows.flatten()).encode())
    metrics = results["metrics"]
    assert metrics["loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(mean * windows.numel() / size), rel=1e-4)


def test_the_summary_is_one_table(tmp_path, capsys):
    results = run(tmp_path)
    out = capsys.readouterr().out
    for line in ("normalizer", "perplexity", "byte_perplexity", "step, s", "peak memory", "transformer.h.1.attn"):
        assert line in out
    assert f"{results['metrics']['perplexity']:.4f}" in out


def test_fine_tuning_a_checkpoint_keeps_its_tokenizer_and_starts_as_softmax(tmp_path):
    run(tmp_path, normalizer="softmax")
    checkpoint = tmp_path / "softmax"
    (tmp_path / "out").rename(checkpoint)
    before = json.loads((checkpoint / "results.json").read_text())["metrics"]
    results = run(tmp_path, "--model", str(checkpoint), "--learning_rate", "1e-12", "--max_steps", "1")
    assert results["metrics"]["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert results["multimax"]["init"] == "identity" and results["model"]["source"] == str(checkpoint)
    assert results["data"]["vocabulary"] == 300


def test_resumed_equals_uninterrupted(tmp_path):
    config = {**TINY["model_config"], "resid_pdrop": 0.1}  # the random numbers go on, too
    whole = run(tmp_path, output=True, model_config=config)
    (tmp_path / "out").rename(tmp_path / "whole")
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):  # after the third step; a checkpoint was written after the second
        interrupted(tmp_path, after=3, model_config=config)
    assert (folder / "checkpoint-2").is_dir() and not (folder / "results.json").exists()
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    resumed = run(tmp_path, "--resume_from_checkpoint", "last", output=True, model_config=config)
    assert losses(resumed) == losses(whole)
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["training"]["resumed"] and not whole["training"]["resumed"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "out")]
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    """A run that was stopped while it wrote a checkpoint goes on from the one before."""
    whole = run(tmp_path)
    (tmp_path / "out").rename(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, after=3, output=False)
    for name, content in (("checkpoint-3", None), ("checkpoint-4", "{")):
        (tmp_path / "out" / name).mkdir()
        if content:
            (tmp_path / "out" / name / "trainer_state.json").write_text(content)
    assert losses(run(tmp_path, "--resume_from_checkpoint", "last")) == losses(whole)


def test_a_run_stopped_after_its_last_step_is_not_trained_on(tmp_path):
    whole = run(tmp_path, lr_scheduler_type="constant")
    (tmp_path / "out" / "results.json").unlink()
    again = run(tmp_path, "--resume_from_checkpoint", "last", lr_scheduler_type="constant")
    assert again["training"]["steps"] == 4
    assert again["metrics"] == whole["metrics"] and losses(again) == losses(whole)
    assert again["time"]["seconds_per_step"] is None


def test_a_diverged_run_writes_its_results(tmp_path, capsys):
    results = run(tmp_path, learning_rate=1e30, max_grad_norm=0.0, eval_strategy="no")
    assert results["metrics"]["perplexity"] is None
    assert "not finite" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["loss"] is None


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path):
    run(tmp_path, normalizer="softmax")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "half")
    results = run(tmp_path / "half", "--model", str(tmp_path / "half"))
    assert results["training"]["precision"] == "float32"


def interrupted(folder, after, **values):
    class Interruption(record.Costs):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == after:
                raise KeyboardInterrupt

    timer, record.Costs = record.Costs, Interruption
    try:
        run(folder, **{"output": True, **values})
    finally:
        record.Costs = timer


def test_two_processes_give_what_one_gives_with_the_double_batch(tmp_path):
    one = run(tmp_path, per_device_train_batch_size=4)
    (tmp_path / "out").rename(tmp_path / "one")
    config = config_file(tmp_path, per_device_train_batch_size=2, ddp_backend="gloo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "recipes.language_modeling", config, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "out" / "results.json").read_text())
    assert two["training"]["world_size"] == 2 and two["training"]["wrapper"] == "DistributedDataParallel"
    assert two["training"]["batch_size"] == one["training"]["batch_size"] == 4
    for (step, a), (same, b) in zip(losses(one), losses(two), strict=True):
        assert step == same and a == pytest.approx(b, rel=1e-4)
    assert two["metrics"]["perplexity"] == pytest.approx(one["metrics"]["perplexity"], rel=1e-4)
    assert done.stdout.count("byte_perplexity") == 1


# -- the arms of a comparison ------------------------------------------------------------------------------------------


def stock():
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_layer=1, n_head=2, n_embd=16))


def test_all_arms_of_a_seed_start_from_the_same_weights_and_random_numbers():
    states, draws = [], []
    for options in ({"normalizer": "softmax"}, {}, {"output": True}, {"normalizer": "sparsemax"}):
        model = build_model(ModelArguments(**options), stock, seed=3)
        draws.append(torch.rand(3))
        scalars = multimax_parameters(model)
        states.append({name: p for name, p in model.named_parameters() if name not in scalars})
    for state, draw in zip(states[1:], draws[1:]):
        assert torch.equal(draw, draws[0])
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    other = build_model(ModelArguments(), stock, seed=4)
    assert not torch.equal(other.transformer.wte.weight, states[0]["transformer.wte.weight"])


def test_pretraining_starts_as_in_the_paper_and_fine_tuning_as_softmax():
    scratch = build_model(ModelArguments(), stock, seed=0)
    assert all(p.any() for p in multimax_parameters(scratch).values())
    tuned = build_model(ModelArguments(model="somewhere"), stock, seed=0)
    assert not any(p.any() for p in multimax_parameters(tuned).values())


def test_a_patched_checkpoint_keeps_what_it_has_or_is_refused():
    def make():
        return patch_model(stock(), order=1)

    model = build_model(ModelArguments(model="somewhere"), make, seed=0)
    assert model.config.multimax["order"] == 1
    build_model(ModelArguments(model="somewhere", normalizer="multimax", order=1), make, seed=0)
    for options in ({"normalizer": "softmax"}, {"normalizer": "sparsemax"}, {"output": True}, {"order": 2}):
        with pytest.raises(DataError, match="patched already"):
            build_model(ModelArguments(model="somewhere", **options), make, seed=0)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_options_override_the_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("context: 32\nlearning_rate: 1e-3\nmodel_config: {n_layer: 1}\noutput_dir: somewhere\n")
    parsed = parse("language_modeling", language_modeling.RECIPE[1], [str(path), "--context", "64"])
    model, text, training = parsed
    assert (text.context, text.data, training.learning_rate) == (64, "web", 1e-3)
    assert model.model_config == {"n_layer": 1} and training.output_dir == "somewhere"
    again = parse("x", language_modeling.RECIPE[1], [str(path), "--model_config", '{"n_layer": 2}'])
    assert again[0].model_config == {"n_layer": 2}


def test_bad_input_is_one_sentence_before_anything_is_written(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    checkpoint = tmp_path / "checkpoint"
    set_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=200, n_layer=1, n_head=2, n_embd=16)).save_pretrained(checkpoint)
    tokenizer = train_tokenizer(Path(TINY["data"]).read_text(), 300, 64)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cases = [
        (["--data", str(empty)], "there is no text in"),
        (["--data", str(tmp_path / "nowhere.txt")], "there is no file or folder"),
        (["--validation_data", str(empty)], "there is no text in"),
        (["--context", "100000"], "less than one window"),
        (["--validation_share", "2"], "--validation_share"),
        (["--context", "0"], "--context must be positive"),
        (["--context", "1"], "--context must be at least 2"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1"),
        (["--label_smoothing_factor", "1.5"], "--label_smoothing_factor must be in"),
        (["--model_config", '{"n_layer": "two"}'], "n_layer"),
        (["--model_config", json.dumps(BERT)], "BertLMHeadModel sees the tokens that it should predict"),
        (["--multimax_clip_keys", "9"], "multimax_clip='scale' only"),
        (["--model_config", "{"], "--model_config is no JSON"),
        (["--normalizer", "hardmax"], "--normalizer hardmax is unknown"),
        (["--normalizer", "softmax", "--output", "true"], "does not go with --normalizer softmax"),
        (["--normalizer", "entmax15", "--output", "true"], "entmax15"),
        (["--normalizer", "topk_softmax"], "k"),
        (["--include", "nothing_is_called_so"], "nothing_is_called_so"),
        (["--model_config", '{"model_type": "mamba"}'], "mamba"),
        (["--model", str(checkpoint), "--tokenizer", str(tmp_path / "tokenizer")], "300 tokens and the model only 200"),
        (["--model", str(tmp_path / "nowhere"), "--tokenizer", str(tmp_path / "tokenizer")], "nowhere"),
        (["--multimax_clip", "scale"], "multimax_clip_keys"),
        (["--resume_from_checkpoint", str(tmp_path / "nowhere")], "there is no such folder"),
    ]
    for options, message in cases:
        said = refused(tmp_path, capsys, *options)
        assert message in said, (options, said)


def test_a_wrong_file_of_options_is_refused(tmp_path, capsys):
    assert "unknown options: contxt" in refused(tmp_path, capsys, contxt=3)
    for text, message in (("a: [", "no YAML"), ("word", "option: value")):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            read_yaml(tmp_path / "wrong.yaml")
    with pytest.raises(DataError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_a_folder_to_write_to_must_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--output_dir is missing"):
        language_modeling.main(*language_modeling.RECIPE, [config_file(tmp_path)])
    assert not (tmp_path / "trainer_output").exists()


def test_windows_of_two_tokens_are_the_shortest(tmp_path):
    assert run(tmp_path, context=2)["data"]["context"] == 2


def test_bert_as_a_decoder_is_trained(tmp_path):
    results = run(tmp_path, model_config={**BERT, "is_decoder": True})
    assert results["model"]["class"] == "BertLMHeadModel"


@pytest.mark.parametrize("options", [["--normalizer", "sparsemax"], ["--learning_rate", "0.5"]], ids=str)
def test_a_run_is_not_resumed_as_another(tmp_path, options):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, 3, save_steps=2, save_strategy="steps", normalizer="softmax", output=False)
    name = options[0].removeprefix("--")
    with pytest.raises(SystemExit, match=f"began with other options .{name} was .*choose another folder"):
        run(
            tmp_path, *options, "--resume_from_checkpoint", "last",
            save_steps=2, save_strategy="steps", normalizer="softmax", output=False,
        )  # fmt: skip
    assert not (tmp_path / "out" / "results.json").exists()


def test_no_held_out_window_is_dropped(tmp_path):
    for name in ("whole", "dropping"):
        (tmp_path / name).mkdir()
    whole, dropping = (
        run(tmp_path / name, per_device_eval_batch_size=5, dataloader_drop_last=name == "dropping", max_steps=1)
        for name in ("whole", "dropping")
    )
    assert dropping["metrics"] == pytest.approx(whole["metrics"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "h.0"}, "is patched already"),
        ({"affine": True}, "is patched already"),
        ({"init": "paper"}, "is patched already"),
    ],
    ids=str,
)
def test_options_that_a_patched_checkpoint_does_not_have_are_refused(tmp_path, options, message):
    model = patch_model(make("GPT2LMHeadModel"))
    with pytest.raises(DataError, match=message):
        build_model(ModelArguments(model="x", **options), lambda: model, seed=0)
    assert build_model(ModelArguments(model="x", order=2, init="identity"), lambda: model, seed=0) is model


def test_an_earlier_run_is_neither_overwritten_nor_resumed_unasked(tmp_path):
    run(tmp_path, max_steps=2)
    written = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(SystemExit, match="holds an earlier run"):
        run(tmp_path, max_steps=2)
    assert (tmp_path / "out" / "results.json").read_bytes() == written


def test_results_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
