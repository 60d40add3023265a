"""Model cards: every figure is in results.json, metadata are complete, edits keep what was there, cards read back."""

import copy
import importlib.resources
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard import metadata_eval_result
from models import TRAINED, inputs_for, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

import hf_multimax.publishing.card
from hf_multimax import multimax_parameters, patch_model
from hf_multimax.diagnostics import attention_statistics, measure_model
from hf_multimax.plots import plot_modulators
from hf_multimax.publishing.card import layer_modulators, model_card
from hf_multimax.publishing.results import MEASURES, Figure, Results
from recipes import report
from tests.card_metrics import read_metrics

ROOT = Path(__file__).parents[1]
METRICS = {
    "text-generation": {"perplexity": 20.0, "byte_perplexity": 1.8, "loss": 3.0},
    "image-classification": {"accuracy": 0.81, "top5_accuracy": 0.97, "loss": 0.5},
    "translation": {"bleu": 21.0, "chrf": 44.0, "loss": 2.0},
}


@pytest.fixture
def model():
    return patch_model(make("GPT2LMHeadModel"), init="paper")


def run_of(model, task="text-generation", arm="multimax", seed=0, patched=True, dataset=None) -> dict:
    """A results.json with made-up figures, of the shape that recipes write."""
    made_up = random.Random(f"{arm}{seed}")
    layers = {
        layer: {"sparsity": made_up.random(), "multi_modality": made_up.random(), "entropy": 2.0, "topk_mass": 0.4}
        | (scalars if patched else {})
        for layer, scalars in layer_modulators(model).items()
    }
    beams = {"num_beams": 4, "bleu_signature": "nrefs:1|case:mixed"}
    metrics = {name: value * made_up.uniform(0.9, 1.1) for name, value in METRICS[task].items()}
    return {
        "kind": "run",
        "schema": 1,
        "task": task,
        "command": f"python -m recipes.language_modeling config.yaml --seed {seed}",
        "seed": seed,
        "model": {
            "class": model.stock_class.__name__,
            "type": model.config.model_type,
            "source": None,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multimax_parameters": 16 if patched else 0,
        },
        "multimax": model.config.multimax if patched else None,
        "data": {
            "name": "web",
            "dataset": dataset,
            "description": "An English | text <b>",
            "language": ["en"],
            "licence": "public domain",
            "training_examples": 1000,
            "evaluation_examples": 100,
        },
        "training": {"steps": 400, "batch_size": 16, "learning_rate": 1e-3, "world_size": 1, "precision": "float32"},
        "metrics": metrics | (beams if task == "translation" else {}),
        "curve": [{"step": step, "eval_loss": 5 - step / 100 + made_up.random() / 5} for step in range(40, 401, 40)],
        "time": {"training_seconds": 1.0, "evaluation_seconds": 1.0, "seconds_per_step": made_up.uniform(0.1, 0.2)},
        "memory": {"peak_bytes": made_up.randrange(10**8, 10**9), "kind": "resident"},
        "layers": layers,
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "machine": {"processor": "A processor", "threads": 1, "device": "cpu"},
    }


def comparison_of(model, seeds=(0, 1, 2), asked=None, p=None, task="text-generation", metric="perplexity") -> dict:
    """The same for a comparison of SoftMax, the model's own config and one that learns nothing."""
    arms = {"softmax": False, "multimax-attention": True}
    runs = {arm: [run_of(model, task, arm, seed, patched) for seed in seeds] for arm, patched in arms.items()}
    paired = {}
    if seeds:
        pairs = zip(runs["multimax-attention"], runs["softmax"])
        differences = [ours["metrics"][metric] - theirs["metrics"][metric] for ours, theirs in pairs]
        mean, several = statistics.fmean(differences), len(seeds) > 1
        interval = {"low": mean - 1.2345 if several else None, "high": mean + 1.2345 if several else None}
        paired = {"multimax-attention": {metric: {"difference": mean, **interval, "n": len(seeds), "p": p}}}
    return {
        "kind": "comparison",
        "schema": 1,
        "task": task,
        "command": "python -m recipes.compare compare.yaml",
        "recipe": "language_modeling",
        "reference": "softmax",
        "seeds_asked": asked or len(seeds),
        "complete": asked is None,
        "metric": metric,
        "lower_is_better": metric == "perplexity",
        "data": run_of(model, task)["data"],
        "arms": {arm: {"overrides": {"normalizer": arm.split("-")[0]}, "runs": runs[arm]} for arm in arms},
        "summary": {arm: summary_of(runs[arm]) for arm in arms},
        "paired": paired,
        "versions": {},
        "machine": {},
    }


def summary_of(runs) -> dict:
    columns = {}
    for run in runs:
        measured = {**run["metrics"], **run["time"], "peak_bytes": run["memory"]["peak_bytes"]}
        for name, value in measured.items():
            if not isinstance(value, str):
                columns.setdefault(name, []).append(value)
    return {
        name: {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
        }
        for name, values in columns.items()
    }


def numbers_in(values) -> list[float]:
    if isinstance(values, dict):
        return [number for value in values.values() for number in numbers_in(value)]
    if isinstance(values, list):
        return [number for value in values for number in numbers_in(value)]
    return [float(values)] if isinstance(values, int | float) and not isinstance(values, bool) else []


def section(card: ModelCard, title: str) -> str:
    return re.search(rf"^### {title}\n(.*?)^### ", card.text, flags=re.DOTALL | re.MULTILINE).group(1)


def table_numbers(text: str) -> list[str]:
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows
    return [number for row in rows for number in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", row.partition("` |")[2])]


def is_rounding(text: str, numbers) -> bool:
    decimals = len(text.partition(".")[2])
    return any(abs(float(text) - number) <= 0.5000001 * 10**-decimals for number in numbers)


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", METRICS)
def test_a_run_reads_back(model, task):
    run = run_of(model, task)
    card = ModelCard(str(model_card(model, run, repo_id="someone/a-model")))
    measured = {name: Figure(value) for name, value in run["metrics"].items() if isinstance(value, float)}
    assert read_metrics(card) == {"multimax": measured}
    assert ("`nrefs:1|case:mixed`" in card.text) == (task == "translation")


def test_a_comparison_reads_back(model, tmp_path):
    comparison = comparison_of(model)
    path = tmp_path / "README.md"
    model_card(None, comparison, name="lm_web").save(path)
    found = read_metrics(path)
    assert found.keys() == comparison["arms"].keys()
    for arm, figures in found.items():
        assert figures == {name: Figure(**comparison["summary"][arm][name]) for name in METRICS["text-generation"]}
    (arm,) = read_metrics(model_card(model, comparison, repo_id="someone/a-model"))
    assert arm == "multimax-attention"


@pytest.mark.parametrize("task, metric", [("text-generation", "perplexity"), ("translation", "bleu")])
def test_every_figure_is_a_rounding_of_one_in_results(model, task, metric):
    comparison = comparison_of(model, seeds=range(5), p=0.0312, task=task, metric=metric)
    measured = numbers_in(comparison)
    for card in (model_card(None, comparison), model_card(model, comparison)):
        for number in table_numbers(section(card, "Results")):
            assert is_rounding(number, measured), number
        assert "0.031" in section(card, "Results")
        arms = comparison["summary"].values()
        bytes_ = [arm["peak_bytes"]["mean"] for arm in arms]
        seconds = [arm["seconds_per_step"]["mean"] for arm in arms]
        ratios = [a / b for of_one in (bytes_, seconds) for a in of_one for b in of_one]
        for number in table_numbers(section(card, "Cost")):
            assert is_rounding(number, [*seconds, *(b / 1e6 for b in bytes_), *ratios]), number
        layers = numbers_in([run["layers"] for arm in comparison["arms"].values() for run in arm["runs"]])
        for title in ("Modulators", "Attention"):
            for number in table_numbers(section(card, title)):
                assert is_rounding(number, layers), number


def test_a_card_whose_table_was_changed_is_refused(model):
    card = model_card(model, run_of(model))
    shown = section(card, "Results").splitlines()
    row = next(line for line in shown if line.startswith("| `multimax`"))
    number = table_numbers(row)[0]
    card.text = card.text.replace(row, row.replace(number, str(float(number) + 1)))
    with pytest.raises(ValueError, match="perplexity"):
        read_metrics(card)


def test_without_results_there_is_no_figure(model):
    card = model_card(model, repo_id="someone/a-model")
    assert read_metrics(card) == {}
    assert "### Results" not in card.text
    assert "### Cost" not in card.text
    assert "No measurement" in card.text
    assert card.data.pipeline_tag == "text-generation"


def test_missing_seeds_are_said(model):
    text = model_card(None, comparison_of(model, seeds=(0, 1), asked=3)).text
    assert "2 of 3" in text
    assert "Of the 3 seeds asked for, 2 were run for `softmax`." in text
    assert "Not complete" not in model_card(None, comparison_of(model)).text


def test_one_seed_has_no_interval(model):
    results = Results(comparison_of(model, seeds=(0,)))
    assert "[" not in results.difference("multimax-attention")
    assert results.verdict("multimax-attention") == "one seed"
    assert "±" not in results.measured("softmax", "perplexity")


@pytest.mark.parametrize("lower_is_better", [True, False])
@pytest.mark.parametrize("shift, verdict", [(-2.0, "better"), (0.0, "not told apart"), (2.0, "worse")])
def test_the_verdict_follows_the_interval(model, shift, verdict, lower_is_better):
    comparison = comparison_of(model)
    comparison["lower_is_better"] = lower_is_better
    sign = 1 if lower_is_better else -1
    entry = comparison["paired"]["multimax-attention"]["perplexity"]
    entry.update(difference=sign * shift, low=sign * shift - 1, high=sign * shift + 1)
    results = Results(comparison)
    assert results.verdict("multimax-attention") == verdict
    assert results.verdict("softmax") == "-"


def test_a_small_spread_is_not_rounded_away(model):
    comparison = comparison_of(model)
    for arm in comparison["arms"].values():
        for index, run in enumerate(arm["runs"]):
            run["metrics"]["perplexity"] = 20.0 + index * 1.5e-4
    comparison["summary"] = {arm: summary_of(entry["runs"]) for arm, entry in comparison["arms"].items()}
    assert Results(comparison).measured("softmax", "perplexity") == "20.00015 ± 0.00015"


# -- results that are refused -----------------------------------------------------------------------------------------


def changed(values, path, value):
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return values


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("kind",), "demo", "kind"),
        (("schema",), 2, "schema 2"),
        (("metrics", "perplexity"), float("nan"), "no results.json"),
        (("multimax",), None, "not of this model"),
        (("model",), {}, "incomplete: model.class is missing"),
        (("data",), {}, "incomplete: data.name is missing"),
        (("memory",), None, "memory must be a JSON object, got null"),
        (("layers",), [], "layers must be a JSON object"),
        (("command",), None, "command must be a JSON string"),
        (("model", "parameters"), 5, "not of this model.*5 parameters instead of"),
        (("multimax", "order"), 1, "not of this model.*another MultiMaxConfig"),
        (("model", "class"), "T5ForConditionalGeneration", "not of this model.*T5ForConditionalGeneration"),
        (("layers", "transformer.h.1.attn", "ts"), [1.0, 2.0, 3.0, 4.0], "not of this model.*h.1.attn.ts"),
    ],
)
def test_wrong_results_are_refused(model, path, value, message):
    with pytest.raises(ValueError, match=message):
        model_card(model, changed(run_of(model), path, value))


@pytest.mark.parametrize("normalizer, option", [("entmax", "alpha"), ("rsoftmax", "sparsity")])
def test_learned_options_are_shown_as_they_are(normalizer, option):
    model = patch_model(make("GPT2LMHeadModel"), normalizer=normalizer, normalizer_kwargs={"learn": True})
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(0.25)
    layer = model.get_submodule("transformer.h.1.attn.multimax")
    value = layer.values()[option].item()
    run = run_of(model)
    assert run["layers"]["transformer.h.1.attn"][f"learned_{option}"] == pytest.approx(value)
    assert f"| {value:.4f} |" in str(model_card(model, run))
    assert f"| {value:.4f} |" in str(model_card(None, run))
    with pytest.raises(ValueError, match=f"not of this model.*h.1.attn.learned_{option}"):
        model_card(model, changed(run, ("layers", "transformer.h.1.attn", f"learned_{option}"), value + 0.25))


def test_measures_are_told_from_what_was_learned(model):
    batch = inputs_for(model)
    assert set(next(iter(attention_statistics(model, [batch]).values()))) == set(MEASURES)


@pytest.mark.parametrize(
    "memory, phrase",
    [
        ({"kind": "resident", "phase": "training"}, "of the whole process, in training"),
        ({"kind": "cuda", "phase": "training"}, "allocated on the GPU, in training"),
        ({"kind": "resident"}, "of the whole process, evaluation and attention statistics included"),
    ],
)
def test_the_card_says_what_memory_is_of(model, memory, phrase):
    run = changed(run_of(model), ("memory",), {"peak_bytes": 10**8, **memory})
    assert f"Peak memory is that {phrase}." in str(model_card(model, run))


def test_a_summary_that_is_not_of_its_runs_is_refused(model):
    wrong = changed(comparison_of(model), ("summary", "softmax", "perplexity", "mean"), 1.0)
    with pytest.raises(ValueError, match="summary.softmax.perplexity"):
        model_card(None, wrong)


def test_incomplete_files_are_refused_by_name(model, tmp_path):
    path = tmp_path / "results.json"
    run = run_of(model)
    del run["metrics"]
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"results\.json is incomplete: metrics"):
        model_card(model, path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"results\.json is no results"):
        model_card(model, path)
    with pytest.raises(FileNotFoundError):
        model_card(model, tmp_path / "nothing.json")


def test_what_is_no_multimax_model_is_refused(model):
    with pytest.raises(ValueError, match="patch_model"):
        model_card(make("GPT2LMHeadModel"))
    with pytest.raises(ValueError, match="stock model"):
        model_card(None, run_of(model, patched=False))
    with pytest.raises(ValueError, match="model, results or both"):
        model_card(None)


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_metadata_are_complete(model):
    run = run_of(model, dataset="someone/web")
    run["model"]["source"] = "openai-community/gpt2"
    data = model_card(model, run, repo_id="someone/a-model", license="mit").data
    values = data.to_dict()
    assert values["base_model"] == "openai-community/gpt2"
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "text-generation"
    assert values["datasets"] == ["someone/web"]
    assert values["metrics"] == ["perplexity"]
    assert values["license"] == "mit"
    assert values["language"] == ["en"]
    assert values["tags"] == ["multimax", "gpt2"]
    (index,) = values["model-index"]
    assert index["name"] == "a-model"
    (result,) = index["results"]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"] == {"name": "web", "type": "someone/web"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == run["metrics"]
    assert all(isinstance(entry, EvalResult) for entry in data.eval_results)


def test_the_hub_s_own_results_format_holds_ours(model):
    run = run_of(model)
    card = ModelCard(str(model_card(model, run, repo_id="someone/a-model")))
    expected = metadata_eval_result(
        model_pretty_name="a-model",
        task_pretty_name="text generation",
        task_id="text-generation",
        metrics_pretty_name="perplexity, multimax",
        metrics_id="perplexity",
        metrics_value=run["metrics"]["perplexity"],
        dataset_pretty_name="web",
        dataset_id="web",
    )["model-index"][0]["results"][0]
    (found,) = card.data.to_dict()["model-index"][0]["results"]
    assert (found["task"], found["dataset"]) == (expected["task"], expected["dataset"])
    assert found["metrics"][0] | {"verified": False} == expected["metrics"][0] | {
        "args": {"arm": "multimax", "seeds": 1}
    }


@pytest.mark.parametrize("source", [None, "/a/folder", "./runs/first", "tests"])
def test_a_folder_is_no_base_model(model, source, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = run_of(model)
    run["model"]["source"] = source
    assert model_card(model, run).data.base_model is None


@pytest.mark.parametrize("name", TRAINED)
def test_every_first_class_model_has_a_card_that_says_how_to_load_it(name):
    model = patch_model(make(name))
    card = model_card(model, repo_id="someone/a-model")
    auto = {"LMHeadModel": "CausalLM", "MTModel": "Seq2SeqLM", "Generation": "Seq2SeqLM"}
    auto = next((kind for ending, kind in auto.items() if name.endswith(ending)), "ImageClassification")
    assert f'AutoModelFor{auto}.from_pretrained("someone/a-model")' in card.text
    assert card.data.pipeline_tag == {"CausalLM": "text-generation", "ImageClassification": "image-classification"}.get(
        auto, "translation" if name == "MarianMTModel" else None
    )


def test_the_code_of_a_card_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), pad_token="a"
    )
    model.save_pretrained("someone/a-model")
    tokenizer.save_pretrained("someone/a-model")
    card = model_card(model, repo_id="someone/a-model", tokenizer=tokenizer)
    code = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL).group(1)
    assert "pipeline" in code
    names = {}
    exec(code, names)
    assert torch.equal(names["model"].transformer.h[0].attn.multimax.ts, model.transformer.h[0].attn.multimax.ts)
    assert names["pipe"].tokenizer is names["tokenizer"]

    heads = patch_model(make("GPT2DoubleHeadsModel"))  # no Auto class makes it
    heads.save_pretrained("heads")
    card = model_card(heads, repo_id="heads")
    exec(re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL).group(1), names)
    assert type(names["model"]) is type(heads)


def test_image_processors_are_loaded_as_such():
    model = patch_model(make("ViTForImageClassification"))
    text = model_card(model, repo_id="someone/a-model", tokenizer=ViTImageProcessorPil()).text
    assert 'image_processor = AutoImageProcessor.from_pretrained("someone/a-model")' in text
    assert 'pipeline("image-classification", model=model, image_processor=image_processor)' in text


def test_the_first_lines_say_what_to_install(model):
    lines = [line for line in model_card(model).text.splitlines() if line and not line.startswith("<!--")]
    assert lines[0].startswith("# ")
    assert "pip install hf-multimax" in lines[1]
    loader = importlib.resources.files("hf_multimax").joinpath("models/loader_file.py").read_text()
    assert "pip install hf-multimax" in loader


# -- what was changed -------------------------------------------------------------------------------------------------


def test_scalars_of_every_kind_of_modulator_are_shown():
    model = patch_model(make("GPT2LMHeadModel"), per_head=True, affine=True, output=True, include=r"h\.0\.")
    text = model_card(model).text
    assert "1 attention layer (some, chosen by name) and the output logits" in text
    assert "order 1, of scores that are scaled and shifted first, one for each attention head" in text
    assert "| `transformer.h.0.attn` | 0.0000 … 0.0000 |" in text
    assert "| `multimax_output` |" in text
    assert "| layer | b1 | d1 | t_b1 | t_d1 | scale | shift |" in text


def test_other_normalizers_have_cards_too():
    model = patch_model(make("GPT2LMHeadModel"), normalizer="entmax", normalizer_kwargs={"learn": True, "alpha": 1.25})
    text = model_card(model).text
    assert "## entmax in the place of SoftMax" in text
    assert "`alpha=1.25`, `learn=True`" in text
    assert "| layer | learned_alpha |" in text
    assert "| `transformer.h.0.attn` | 1.2500 |" in text
    assert "never exactly zero" not in text


def test_text_of_others_cannot_break_the_page(model):
    run = run_of(model)
    run["data"]["description"] = "A | text\n<!-- /multimax -->\n# with a title"
    card = model_card(model, run)
    assert card.text.count("<!-- /multimax -->") == 1
    assert "\n# with" not in card.text


# -- an existing card -------------------------------------------------------------------------------------------------

EXISTING = """---
license: mit
language: de
tags:
- mine
datasets:
- someone/other
model-index:
- name: theirs
  results:
  - task:
      type: text-generation
    dataset:
      type: web
      name: web
    metrics:
    - type: perplexity
      value: 1000.0
  - task:
      type: text-generation
    dataset:
      type: news
      name: news
    metrics:
    - type: perplexity
      value: 17.5
custom: kept
---
# Mine

My own words, and $1,000.
"""


def test_an_existing_card_is_edited(model):
    existing = ModelCard(EXISTING)
    run = run_of(model, dataset=None)
    card = model_card(model, run, repo_id="someone/a-model", existing=existing)
    assert str(existing) == str(ModelCard(EXISTING))
    values = card.data.to_dict()
    assert (values["license"], values["language"], values["custom"]) == ("mit", "de", "kept")
    assert values["tags"] == ["mine", "multimax", "gpt2"]
    assert values["datasets"] == ["someone/other"]
    found = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert found == {("news", "perplexity"): 17.5, **{("web", key): value for key, value in run["metrics"].items()}}
    assert values["model-index"][0]["name"] == "theirs"
    assert card.text.startswith("# Mine\n\n<!-- multimax-install -->")
    assert "My own words, and $1,000." in card.text
    assert read_metrics(card) == read_metrics(model_card(model, run))


def test_editing_again_changes_only_our_part(model):
    first = model_card(model, run_of(model), existing=ModelCard(EXISTING))
    first.text += "\nAdded by hand.\n"
    again = model_card(model, run_of(model), existing=ModelCard(str(first)))
    assert str(again) == str(first)
    other = run_of(model, dataset="someone/new", arm="other")
    moved = model_card(model, other, existing=first)
    assert "Added by hand." in moved.text
    assert moved.text.count("<!-- multimax -->") == 1
    assert read_metrics(moved) == read_metrics(model_card(model, other))
    cleared = model_card(model, existing=first)
    assert read_metrics(cleared) == {}
    assert [entry.dataset_type for entry in cleared.data.eval_results] == ["news"]


def test_cards_without_metadata_title_or_unix_lines(model):
    card = model_card(model, existing=ModelCard("Only words."))
    assert card.text.startswith("<!-- multimax-install -->")
    assert "Only words." in card.text
    assert card.data.tags == ["multimax", "gpt2"]
    card = model_card(model, existing=ModelCard(EXISTING.replace("\n", "\r\n")))
    assert "\n" not in card.text.replace("\r\n", "")


@pytest.mark.parametrize("marker", ["<!-- multimax -->", "<!-- /multimax-install -->"])
def test_half_a_block_is_refused(model, marker):
    with pytest.raises(ValueError, match=re.escape(marker)):
        model_card(model, existing=ModelCard(EXISTING + marker))


def test_the_template_is_the_package_s():
    link = ROOT / "model_cards" / "template.md"
    assert link.is_symlink()
    assert link.resolve() == Path(hf_multimax.publishing.card.__file__).parent / "template.md"
    assert "publishing/template.md" in (ROOT / "pyproject.toml").read_text()


# -- figures and the report -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"affine": True}, {"per_head": True, "affine": True}])
def test_modulators_are_drawn_as_they_are(options):
    model = patch_model(make("GPT2LMHeadModel"), init="paper", **options)
    axes, _ = plot_modulators(layer_modulators(model)).axes
    identity, *lines = axes.lines
    heads = model.config.n_head if options.get("per_head") else 1
    assert len(lines) == 2 * heads
    x = torch.tensor(identity.get_xdata())
    expected = model.transformer.h[0].attn.multimax.modulate(x.expand(heads, 1, -1))
    torch.testing.assert_close(torch.tensor(lines[heads - 1].get_ydata()), expected[-1, 0].detach())


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="ranges"):
        plot_modulators({"layer": {"sparsity": 0.5}})


@pytest.fixture
def repository(tmp_path, model):
    """A copy of what the report reads, with made-up comparisons."""
    folder = tmp_path / "recipes" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Title\n\n<!-- evidence -->\nof before\n<!-- /evidence -->\n\nThe rest.\n")
    (folder / "lm_web.json").write_text(json.dumps(comparison_of(model)))
    images = comparison_of(model, seeds=range(5), asked=6, p=0.0003, task="image-classification", metric="accuracy")
    (folder / "images.json").write_text(json.dumps(images))
    (folder / "demo.json").write_text('{"perplexity": 1.0}')
    (folder / "measures").mkdir()
    layers = measure_model(model, [inputs_for(model, labels=False)])
    measured = {"path": "runs/a", "layers": {name: layer.to_dict() for name, layer in layers.items()}}
    (folder / "measures" / "images.json").write_text(json.dumps(measured))
    return tmp_path


def test_the_report_writes_cards_figures_and_readme(repository, capsys):
    report.main(["--root", str(repository)])
    for name in ("lm_web", "images"):
        comparison = json.loads((repository / "recipes" / "results" / f"{name}.json").read_text())
        card = repository / "model_cards" / f"{name}.md"
        assert read_metrics(card).keys() == comparison["arms"].keys()
        for link in re.findall(r"!\[.*?\]\((.*?)\)", card.read_text()):
            figure = card.parent / link
            assert figure.read_bytes().startswith(b"\x89PNG")
            assert figure.stat().st_size < 60_000
        figures = {path.stem.removeprefix(name) for path in (repository / "docs").glob(f"{name}*.png")}
        assert figures == {"", "-modulators"} | ({"-measures"} if name == "images" else set())
        assert figures == set(re.findall(rf"\.\./docs/{name}([\w-]*)\.png", card.read_text()))
    text = (repository / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- evidence -->\n|")
    assert text.endswith("<!-- /evidence -->\n\nThe rest.\n")
    assert "of before" not in text
    assert "python -m recipes.compare compare.yaml" in text
    assert "5 of 6" in text
    assert "< 0.001" in text
    assert not (repository / "model_cards" / "demo.md").exists()
    measured = numbers_in(
        [json.loads(path.read_text()) for path in (repository / "recipes" / "results").glob("*.json")]
    )
    for row in [line for line in text.splitlines() if " ↓ " in line or " ↑ " in line]:
        shown = table_numbers("| ` | " + " | ".join(row.split(" | ")[3:5]))
        assert shown and all(is_rounding(number, measured) for number in shown)


def test_check_finds_what_is_out_of_date(repository, model, capsys):
    root = ["--root", str(repository)]
    with pytest.raises(SystemExit, match="not up to date"):
        report.main([*root, "--check"])
    assert not (repository / "model_cards").exists()
    report.main(root)
    report.main([*root, "--check"])
    path = repository / "recipes" / "results" / "lm_web.json"
    path.write_text(json.dumps(comparison_of(model, seeds=(0, 1))))
    with pytest.raises(SystemExit, match="lm_web.md.*README.md.*lm_web.png") as exit_:
        report.main([*root, "--check"])
    assert "images.md" not in str(exit_.value)
    path.write_text(json.dumps(comparison_of(model)))
    path = repository / "recipes" / "results" / "measures" / "images.json"
    path.write_text(path.read_text().replace("runs/a", "runs/b"))
    with pytest.raises(SystemExit, match="images-modulators.png.*images-measures.png"):
        report.main([*root, "--check"])
    path.write_text("[]")
    with pytest.raises(SystemExit, match="images.json is not what `hf-multimax measure RUN --json` writes"):
        report.main(root)


def test_the_report_says_what_is_missing(repository, tmp_path):
    with pytest.raises(SystemExit, match="no comparison"):
        report.main(["--root", str(tmp_path / "elsewhere")])
    (repository / "README.md").write_text("# No markers\n")
    with pytest.raises(SystemExit, match="<!-- evidence -->"):
        report.main(["--root", str(repository)])
    assert not (repository / "model_cards").exists()


def test_this_repository_is_up_to_date():
    results = (ROOT / "recipes" / "results").glob("*.json")
    if not any(json.loads(path.read_text()).get("kind") == "comparison" for path in results):
        pytest.skip("no comparison is in recipes/results")
    command = [sys.executable, "-m", "recipes.report", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
