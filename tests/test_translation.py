"""The translation recipe end to end on tiny data: one process and two, resumed, scored, and refusing what is wrong."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import sacrebleu
import torch
from models import inputs_for, make
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_multimax import is_patched, multimax_parameters, patch_model
from hf_multimax.training import MultiMaxSeq2SeqTrainingArguments, MultiMaxTrainingArguments
from recipes import translation
from recipes.language_modeling import TextArguments
from recipes.shared import tokens
from recipes.shared.checks import DataError
from recipes.shared.data import sentences
from recipes.shared.data.sentence_batches import LengthBuckets, in_buckets, tokenize
from recipes.shared.data.sentences import TranslationArguments
from recipes.shared.models import ModelArguments
from recipes.shared.record import read_yaml
from recipes.shared.run import parse
from recipes.translation import smoothed_loss

ROOT = Path(__file__).parents[1]
CLASSES = (ModelArguments, TranslationArguments, MultiMaxSeq2SeqTrainingArguments)
TINY = {
    "model_type": "marian",
    "encoder_layers": 1,
    "decoder_layers": 1,
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
}
TINY_T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}


def pairs(count=60):
    """Different sentences of two to six words, and their translation word by word."""
    english = list(NUMBERS)
    lines = []
    for i in range(count):
        words = [english[(i // 6**k + k) % 6] for k in range(2 + i % 5)]
        lines.append((" ".join(words) + ".", " ".join(NUMBERS[word] for word in words) + "."))
    return lines


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Two parallel text files, as arguments."""
    source, target = zip(*pairs())
    return ["--data", write(tmp_path / "t.en", source), "--target_data", write(tmp_path / "t.de", target)]


def run(folder, *arguments, model=TINY):
    """A run of a few steps through the command line's function."""
    settings = {
        "output_dir": folder,
        "model_config": json.dumps(model),
        "vocab_size": 60,
        "max_length": 24,
        "validation_size": 9,
        "num_beams": 2,
        "max_new_tokens": 8,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return translation.main("translation", CLASSES, translation.make_job, [*options, *map(str, arguments)])


def losses(results):
    return [point["loss"] for point in results["curve"] if "loss" in point]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "model"),
    [
        (["--normalizer", "softmax"], TINY),
        (["--output", "true", "--label_smoothing_factor", "0.1"], TINY),
        (["--normalizer", "sparsemax", "--train_sampling_strategy", "group_by_length"], TINY_T5),
    ],
    ids=["softmax", "multimax", "t5"],
)
def test_a_run_trains_scores_and_saves(tmp_path, files, capsys, options, model):
    results = run(tmp_path / "run", *files, *options, model=model)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"] == "translation"
    assert results["data"]["language"] == ["en", "de"]
    assert (results["data"]["training_examples"], results["data"]["evaluation_examples"]) == (51, 9)
    assert (results["multimax"] is None) == ("softmax" in options)
    assert all(math.isfinite(loss) for loss in losses(results))
    assert len(losses(results)) == 3
    metrics = results["metrics"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert results["layers"]
    assert capsys.readouterr().out.count("translation  ") == 3

    rows = json.loads((tmp_path / "run" / "translations.json").read_text())
    translations = [row["translation"] for row in rows]
    references = [row["reference"] for row in rows]
    held_out = pairs()
    assert {(row["source"], row["reference"]) for row in rows} <= set(held_out)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    assert metrics["bleu"] == bleu.corpus_score(translations, [references]).score
    assert metrics["chrf"] == chrf.corpus_score(translations, [references]).score
    assert metrics["bleu_signature"] == str(bleu.get_signature())
    assert metrics["chrf_signature"] == str(chrf.get_signature())

    # What was saved is what was scored: the generation options come with the model.
    saved, tokenizer = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModelForSeq2SeqLM, AutoTokenizer))
    assert is_patched(saved) == ("softmax" not in options)
    batch = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
    again = tokenizer.batch_decode(saved.eval().generate(**batch), skip_special_tokens=True)
    assert again == translations

    # The held-out loss is that of every token alike, without smoothing.
    labels = tokenizer(text_target=references, padding=True, return_tensors="pt")
    labels = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
    with torch.no_grad():
        logits = saved(**batch, decoder_input_ids=saved.prepare_decoder_input_ids_from_labels(labels=labels)).logits
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_learns_to_translate(tmp_path, files):
    options = ["--max_steps", "60", "--per_device_train_batch_size", "16"]
    results = run(tmp_path / "run", *files, *options, model={**TINY, "d_model": 32, "encoder_ffn_dim": 64})
    assert results["metrics"]["bleu"] > 10
    assert losses(results)[-1] < 0.5 * losses(results)[0]


def test_a_resumed_run_has_the_losses_of_one_that_was_not_interrupted(tmp_path, files):
    options = [*files, "--max_steps", "16", "--save_steps", "10", "--train_sampling_strategy", "group_by_length"]
    options += ["--label_smoothing_factor", "0.1", "--output", "true"]
    model = {**TINY, "dropout": 0.1}
    whole = run(tmp_path / "whole", *options, model=model)
    interrupted = tmp_path / "resumed"
    interrupted.mkdir()
    (tmp_path / "whole" / "checkpoint-10").rename(interrupted / "checkpoint-10")  # in the second epoch
    resumed = run(interrupted, *options, "--resume_from_checkpoint", "last", model=model)
    assert resumed["training"]["resumed"]
    assert losses(resumed) == losses(whole)
    assert resumed["metrics"] == whole["metrics"]


def test_two_processes_train_and_translate_as_one_with_the_same_batch(tmp_path, files):
    folder = tmp_path / "two"
    options = [*files, "--train_sampling_strategy", "group_by_length", "--max_steps", "5", "--adam_epsilon", "1e-3"]
    options += ["--validation_size", "12"]  # 48 remain: a last batch that is not full is filled up in two processes
    options += ["--label_smoothing_factor", "0.1", "--max_eval_examples", "7"]  # seven do not divide by two
    one = run(tmp_path / "one", *options, "--per_device_train_batch_size", 16)
    script = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_translation as t; "
    script += "t.run(*sys.argv[1:])"
    (tmp_path / "run.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(folder), *options],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("translation  ") == 3  # the main process alone prints
    two = json.loads((folder / "results.json").read_text())
    assert two["training"]["world_size"] == 2
    assert two["training"]["wrapper"] == "DistributedDataParallel"
    assert two["training"]["batch_size"] == one["training"]["batch_size"] == 16
    assert two["data"] == one["data"]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
    assert (folder / "translations.json").read_text() == (tmp_path / "one" / "translations.json").read_text()


def test_a_checkpoint_is_fine_tuned_with_its_own_tokenizer(tmp_path, files):
    run(tmp_path / "first", *files, "--normalizer", "softmax")
    options = [*files, "--model", tmp_path / "first", "--source_prefix", "one two: "]
    tuned = run(tmp_path / "second", *options)
    assert tuned["model"]["source"] == str(tmp_path / "first")
    assert tuned["model"]["type"] == "marian"
    assert tuned["multimax"]["init"] == "identity"
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert before.get_vocab() == after.get_vocab()


# -- data --------------------------------------------------------------------------------------------------------------


def same(path, **options):
    return sorted(sentences.read_pairs(str(path), None, "train", TranslationArguments(**options))) == sorted(pairs())


def test_formats_of_local_data(tmp_path):
    write(tmp_path / "t.tsv", ["\t".join(pair) for pair in pairs()])
    rows = [{"en": english, "de": german} for english, german in pairs()]
    write(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    write(tmp_path / "nested.jsonl", [json.dumps({"translation": row}) for row in rows])
    write(tmp_path / "set.jsonl", [json.dumps({"translation": row}) for row in (*rows, {"en": " ", "de": "leer"})])
    assert same(tmp_path / "t.tsv")
    assert same(tmp_path / "t.jsonl")
    assert same(tmp_path / "nested.jsonl")
    assert same(tmp_path / "set.jsonl")  # without the blank pair
    swapped = TranslationArguments(source_lang="de", target_lang="en")
    assert sentences.read_pairs(str(tmp_path / "t.jsonl"), None, "train", swapped)[0] == pairs()[0][::-1]


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A folder that `datasets` reads as it reads a data set of the Hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", pairs()), ("test", pairs(5))):
        rows = [json.dumps({"translation": {"en": english, "de": german}}) for english, german in rows]
        write(folder / f"{split}.jsonl", rows)
    return str(folder)


def test_splits_of_a_data_set(data_set):
    train, held_out = sentences.read_data(TranslationArguments(data=data_set, validation_split="test"))
    assert (train, held_out) == (pairs(), pairs(5))
    with pytest.raises(ValueError, match="split 'missing' of the data set .*cannot be read: .*missing"):
        sentences.read_data(TranslationArguments(data=data_set, validation_split="missing"))
    with pytest.raises(ValueError, match="no sentence in language 'fr', only de, en|only en, de"):
        sentences.read_data(TranslationArguments(data=data_set, target_lang="fr"))


def test_what_is_held_out_is_the_same_every_time_and_not_trained_on(files):
    options = TranslationArguments(data=files[1], target_data=files[3], validation_size=10)
    train, held_out = sentences.read_data(options)
    assert (train, held_out) == sentences.read_data(options)
    assert sorted(train + held_out) == sorted(pairs())
    assert held_out != pairs()[:10]


def test_tokens_come_back_as_they_were_written(files):
    options = TranslationArguments(vocab_size=60)
    model = tokens.train_sentencepiece(pairs(), 60)
    assert model == tokens.train_sentencepiece(pairs(), 60)
    for make_tokenizer in (tokens.marian_tokenizer, tokens.t5_tokenizer):
        tokenizer = make_tokenizer(model, options)
        tokenized = tokenize(pairs(), tokenizer, options, cut=False)
        for (*_, row), (source, target) in zip(tokenized, pairs()):
            assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == source
            assert tokenizer.decode(row["labels"], skip_special_tokens=True) == target
            assert tokenizer.unk_token_id not in row["input_ids"] + row["labels"]
            assert row["labels"][-1] == tokenizer.eos_token_id
        assert max(max(example.row["input_ids"]) for example in tokenized) < len(tokenizer)


# -- batches and loss --------------------------------------------------------------------------------------------------


def test_length_buckets_depend_on_seed_and_epoch_only():
    lengths = [1 + (7 * i) % 50 for i in range(997)]
    buckets = LengthBuckets(lengths, 8, seed=0)
    first = list(buckets)
    assert sorted(first) == list(range(997))
    assert first == list(LengthBuckets(lengths, 8, seed=0))
    buckets.set_epoch(1)
    assert first != list(buckets) != list(LengthBuckets(lengths, 8, seed=1))

    def padding(order):
        batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 997, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.1 * padding(range(997))


@pytest.mark.parametrize(
    "option", [{"generation_num_beams": 3}, {"predict_with_generate": True}, {"prediction_loss_only": True}], ids=str
)
def test_options_of_generation_that_do_not_act_are_refused(tmp_path, option):
    training = MultiMaxSeq2SeqTrainingArguments(str(tmp_path), **option)
    with pytest.raises(DataError, match=f"--{next(iter(option))} does not act here"):
        translation.make_job(ModelArguments(), TranslationArguments(), training)


def test_evaluation_buckets_hold_every_sentence_with_its_reference(files):
    options = TranslationArguments(vocab_size=60)
    tokenizer = tokens.marian_tokenizer(tokens.train_sentencepiece(pairs(), 60), options)
    ordered = in_buckets(tokenize(pairs(), tokenizer, options, cut=False), 8)
    assert sorted((source, target) for source, target, _ in ordered) == sorted(pairs())
    for source, _, row in ordered:
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == source
    lengths = [len(example.row["input_ids"]) for example in ordered]
    assert lengths != sorted(lengths)
    assert all(max(lengths[i : i + 8]) - min(lengths[i : i + 8]) <= 6 for i in range(0, 60, 8))


@pytest.mark.parametrize("name", ["MarianMTModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["own tokens", "int", "tensor"])
def test_label_smoothing_of_modulated_logits(name, items):
    model = patch_model(make(name), output=True).train()
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    batch = inputs_for(model)
    labels = batch.pop("labels")
    outputs = model(**batch, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=labels))
    loss = smoothed_loss(outputs, labels, num_items_in_batch=items, smoothing=0.1)
    log_p = outputs.logits.log_softmax(-1)
    kept = labels != -100
    nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = (0.9 * nll - 0.1 * log_p.mean(-1))[kept].sum() / (kept.sum() if items is None else 7)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradients = {key: p.grad for key, p in multimax_parameters(model).items() if "multimax_output" in key}
    assert gradients
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *arguments, model=TINY):
    """The message with which a run ends that never starts."""
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "run", *arguments, model=model)
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in capsys.readouterr().err
    message = str(ended.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


BAD_FILES = {
    "empty.tsv": ("", "there is no text in"),
    "empty.jsonl": ("\n", "there is no text in"),
    "one.tsv": ("one two\n", "line 1 of .* has 1 fields"),
    "no.jsonl": ("one two\n", "no.jsonl cannot be read: JSON parse error: .* in row 0"),
    "list.jsonl": ("[1]\n", "line 1 of .* has no sentence in language 'en', only none"),
    "fr.jsonl": ('{"en": "one", "fr": "un"}\n', "no sentence in language 'de', only en, fr"),
    "blank.jsonl": ('{"en": "one", "de": " "}\n', "there is no pair of sentences in"),
    "few.tsv": ("one\teins\ntwo\tzwei\n", "only 2 pairs of sentences"),
    "plain.txt": ("one two\n", "has one language only: give --target_data"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_do_not_fit(tmp_path, capsys, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    assert re.search(message, refused(capsys, tmp_path, "--data", tmp_path / name))


def test_options_that_do_not_fit(tmp_path, capsys, files):
    short = write(tmp_path / "short.de", ["eins"])
    cases = [
        (["--data", tmp_path / "none.en", "--target_data", short], "there is no file"),
        (["--data", tmp_path / "none"], "there is no file or folder"),
        (["--data", files[1], "--target_data", short], "has 60 lines and .* has 1"),
        ([*files, "--max_length", "2"], "no pair of .* is within --max_length 2"),
        ([*files, "--num_beams", "0"], "--num_beams must be positive"),
        ([*files, "--validation_target_data", short], "needs --validation_data"),
        ([*files, "--vocab_size", "3"], "no vocabulary of 3 pieces"),
        ([*files, "--normalizer", "nonsense"], "--normalizer nonsense is unknown"),
        (["--target_lang", "fr"], "help-en-de has en and de, not en to fr"),
    ]
    for arguments, message in cases:
        assert re.search(message, refused(capsys, tmp_path, *arguments)), message
    message = refused(capsys, tmp_path, *files, model={"model_type": "bart"})
    assert "no tokenizer is trained here for model_type bart" in message


def test_a_tokenizer_of_another_model(tmp_path, capsys, files):
    run(tmp_path / "marian", *files, "--normalizer", "softmax", "--max_steps", 1)
    options = TranslationArguments(vocab_size=80)
    larger = [(a, b + f" {i}") for i, (a, b) in enumerate(pairs())]
    tokens.marian_tokenizer(tokens.train_sentencepiece(larger, 80), options).save_pretrained(tmp_path / "big")
    tokens.t5_tokenizer(tokens.train_sentencepiece(pairs(), 50), options).save_pretrained(tmp_path / "t5")
    model = [*files, "--model", tmp_path / "marian"]
    message = refused(capsys, tmp_path, *model, "--tokenizer", tmp_path / "big")
    assert re.search("the tokenizer has .* tokens and the model only .*: give the model's own tokenizer", message)
    assert "pad_token_id is 0 in the tokenizer" in refused(capsys, tmp_path, *model, "--tokenizer", tmp_path / "t5")
    assert "--max_length 500 is too long" in refused(capsys, tmp_path, *model, "--max_length", 500)
    assert "--max_new_tokens 500 is too long" in refused(capsys, tmp_path, *model, "--max_new_tokens", 500)


# -- configs -----------------------------------------------------------------------------------------------------------

LANGUAGE = ("lm_web_small", "wikitext103_6layer", "gpt2_finetune")
TRANSLATION = ("translation_help_small", "iwslt14_de_en", "t5_small_finetune", "opus_mt_finetune")


@pytest.mark.parametrize("name", LANGUAGE + TRANSLATION)
def test_configs_are_understood(name):
    classes = CLASSES
    if name in LANGUAGE:
        classes = (ModelArguments, TextArguments, MultiMaxTrainingArguments)
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    model, data, training = parse(name, classes, [str(config), "--use_cpu", "true"])
    values = read_yaml(config)
    assert training.output_dir == values["output_dir"] == f"runs/{name}"
    assert training.learning_rate == values["learning_rate"]
    assert training.max_grad_norm == 1.0
    assert (model.model is None) == bool(model.model_config)


def test_the_configured_models_can_be_made():
    for name in ("translation_help_small", "iwslt14_de_en"):
        values = read_yaml(ROOT / "recipes" / "configs" / f"{name}.yaml")
        options = TranslationArguments(max_length=values["max_length"])
        tokenizer = MagicMock(pad_token_id=9, eos_token_id=0, **{"__len__.return_value": 10})
        with torch.device("meta"):
            model = translation.stock_model(ModelArguments(model_config=values["model_config"]), options, tokenizer)
        translation.check_fit(model, tokenizer, options)
        assert model.config.d_model == values["model_config"]["d_model"]
        assert model.config.init_std == pytest.approx(model.config.d_model**-0.5)
        assert len(model.model.decoder.layers) == values["model_config"]["decoder_layers"]


@pytest.mark.slow
def test_the_built_in_data_runs_with_the_small_config(tmp_path):
    config = ROOT / "recipes" / "configs" / "translation_help_small.yaml"
    options = ["--output_dir", tmp_path / "run", "--max_steps", 4, "--max_eval_examples", 4, "--use_cpu", "true"]
    options += ["--validation_size", 20, "--max_new_tokens", 8, "--disable_tqdm", "true"]
    results = translation.main("translation", CLASSES, translation.make_job, [str(config), *map(str, options)])
    assert results["data"]["training_examples"] > 15_000
    assert results["data"]["licence"] == "MPL-2.0"
    assert results["metrics"]["loss"] < 9
