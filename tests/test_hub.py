"""Publishing and loading with the real client, each in a process of its own, against the Hub of hub_server.py."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, get_session
from models import make

from hf_multimax import patch_model, push
from hf_multimax.publishing.card import model_card

ROOT = Path(__file__).parents[1]

CARD = b"---\nlicense: mit\ntags:\n- poetry\n---\n# My model\n\nWritten by hand.\n"
WRONG_TOKEN = "hf_wrongToken"

#: What was changed in a pushed model's config.json, and what the error must say.
TAMPERED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-normalizer": ({"multimax.normalizer": "nonsense"}, "unknown normalizer 'nonsense'"),
    "code-as-normalizer": ({"multimax.normalizer": "__import__('os').system('id')"}, "unknown normalizer"),
    "order-99": ({"multimax.order": 99}, "MultiMaxConfig.order must be at most 16, got 99"),
    "code-as-order": ({"multimax.order": "__import__('os')"}, "MultiMaxConfig.order must be an integer"),
    "negative-width": ({"n_embd": -32}, "config.json: n_embd must be at least 1, got -32"),
    "no-heads": ({"n_head": 0}, "config.json: n_head must be at least 1, got 0"),
    "negative-vocabulary": ({"vocab_size": -1}, "config.json: vocab_size must be at least 1, got -1"),
    "negative-layers": ({"n_layer": -2}, "config.json: n_layer must be at least 0, got -2"),
    "path-as-type": (
        {"base_model_type": "../../x"},
        "base_model_type must be a model type of Transformers, got '../../x'",
    ),
    "list-as-type": ({"base_model_type": ["gpt2"]}, "base_model_type must be a model type of Transformers"),
    "endless-pattern": ({"multimax.include": "(a+)+$"}, "MultiMaxConfig.include: '(a+)+$' could take forever"),
    "long-pattern": ({"multimax.exclude": "a" * 1000}, "MultiMaxConfig.exclude must have at most 300 characters"),
    "options-of-another": ({"multimax.normalizer_kwargs": {"alpha": "1"}}, "MultiMaxConfig.normalizer_kwargs"),
    "options-of-a-wrong-type": (
        {"multimax.normalizer": "entmax", "multimax.normalizer_kwargs": {"alpha": "os"}},
        "MultiMaxConfig.normalizer_kwargs: alpha",
    ),
    "options-as-a-list": (
        {"multimax.normalizer_kwargs": [1]},
        "MultiMaxConfig.normalizer_kwargs must be a JSON object",
    ),
    "kernel-to-fetch": ({"attn_implementation": "evil/kernel"}, "evil/kernel"),
    "kernel-in-a-dict": ({"attn_implementation": {"": "evil/kernel"}}, "attn_implementation must be"),
    "hidden-kernel-to-fetch": (
        {"_attn_implementation_internal": "evil/kernel"},
        "_attn_implementation_internal must be",
    ),
    "kernel-in-a-part": (
        {"text_config": {"attn_implementation": "evil/kernel"}},
        "text_config.attn_implementation must",
    ),
    "pickle-as-weights": ({"transformers_weights": "adapter_model.bin"}, "transformers_weights must name safetensors"),
}


def run(hub: HubServer, home: Path, *arguments: Any, **environment: str) -> dict[str, dict[str, Any]]:
    """The report of a function of hub_client.py, whose output and errors must show no token."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hub_client.py")), *map(str, arguments)],
        env={**_environment(), **hub.environment(home), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not any(token in done.stdout + done.stderr for token in [*hub.users, WRONG_TOKEN])
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.put("another/base", {})
        server.put("someone/carded", {"README.md": CARD})
        server.repositories["someone/carded"].refs["refs/pr/1"] = server.repositories["someone/carded"].refs["main"]
        server.put("someone/broken-card", {"README.md": b"---\ntags: [\n---\n"})
        server.put("someone/raced", {})
        server.put("someone/lost", {})
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pushed(hub: HubServer, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run(hub, home, "push_all", tmp_path_factory.mktemp("push"))


@pytest.fixture(scope="module")
def with_plugin(hub: HubServer, home: Path, pushed: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plugin")
    sharded = next(
        commit.oid
        for commit in hub.repositories["someone/sharded"].commits.values()
        if "model.safetensors.index.json" in commit.files
    )
    return run(hub, home, "load_with_plugin", folder, *break_models(hub, folder), SHARDED=sharded)


def break_models(hub: HubServer, folder: Path) -> list[str]:
    """Repositories that must not load; and one whose loader file would leave a trace."""
    good = hub.files("someone/gpt2")
    for name, (changes, _) in TAMPERED.items():
        config = json.loads(good["config.json"])
        for key, value in changes.items():
            holder, _, leaf = key.rpartition(".")
            (config[holder] if holder else config)[leaf] = value
        hub.put(f"someone/{name}", {**good, "config.json": json.dumps(config).encode()})
    trace = f"open({str(folder / 'trace')!r}, 'w').close()\n".encode()
    hub.put("someone/locked", good, private=True)
    hub.put("someone/evil", {**good, "multimax_loader.py": trace + good["multimax_loader.py"]})
    model = patch_model(make("GPT2LMHeadModel", vocab_size=300))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    pickled = {**good, "model.safetensors": None, "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()}
    hub.put("someone/pickled", pickled)
    hub.put("someone/truncated", {**good, "model.safetensors": good["model.safetensors"][:-1000]})
    hub.put("someone/truncated-header", {**good, "model.safetensors": good["model.safetensors"][:100]})
    return [*(f"someone/{name}" for name in (*TAMPERED, "pickled", "truncated", "truncated-header"))]


def value(report: dict[str, dict[str, Any]], name: str) -> Any:
    assert "error" not in report[name], f"{name}: {report[name]['error']}: {report[name]['text']}"
    return report[name]["value"]


def error(report: dict[str, dict[str, Any]], name: str, kind: str, *texts: str) -> None:
    """That it failed, with all of these texts in its message, and left the Hub as it was."""
    found = report[name]
    assert "error" in found, f"{name} gave {found.get('value')}"
    assert found["error"] == kind, found["text"]
    assert [text for text in texts if text not in found["text"]] == [], found["text"]
    assert found["unchanged"]


# -- push --------------------------------------------------------------------------------------------------------------

TRAINER_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "multimax_loader.py"}
MODEL_FILES = {"README.md", "config.json", "model.safetensors", "modulators.png", "multimax_loader.py"}
TEXT_FILES = MODEL_FILES | {"generation_config.json"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("step", "repo_id", "files", "titles"),
    [
        ("push", "someone/gpt2", TEXT_FILES | TOKENIZER_FILES | {"results.json"}, ["Upload MultiMax model"]),
        ("push_to_hub", "someone/t5", TEXT_FILES | TOKENIZER_FILES, ["Upload tokenizer", "by method"]),
        ("image processor", "someone/vit", MODEL_FILES | {"preprocessor_config.json"}, ["Upload MultiMax model"]),
        ("Trainer", "someone/trained", TRAINER_FILES | TOKENIZER_FILES | {"training_args.bin"}, ["by Trainer"]),
        ("save_pretrained", "someone/saved", TEXT_FILES, ["Upload MultiMax model"]),
        ("private", "someone/secret", TEXT_FILES, ["Upload MultiMax model"]),
    ],
)
def test_every_way_makes_one_commit_with_everything(hub, pushed, step, repo_id, files, titles):
    value(pushed, step)
    assert set(hub.files(repo_id)) == files
    assert hub.log(repo_id) == titles
    assert b"- multimax" in hub.files(repo_id)["README.md"]
    assert hub.repositories[repo_id].private == (step == "private")


def test_results_and_tags_are_published(hub, pushed):
    files = hub.files("someone/gpt2")
    assert json.loads(files["results.json"])["metrics"]["perplexity"] == 43.21
    assert b"43.21" in files["README.md"]
    assert b"- mine" in hub.files("someone/t5")["README.md"]
    assert b"pip install hf-multimax" in hub.files("someone/t5")["README.md"]


def test_a_revision_that_does_not_exist_is_created(hub, pushed):
    assert hub.repositories["someone/gpt2"].refs["dev"] == value(pushed, "revision")
    assert b"MultiMaxViT" in hub.files("someone/gpt2", "dev")["config.json"]
    assert b"MultiMaxGPT2" in hub.files("someone/gpt2")["config.json"]


def test_a_pull_request_leaves_main_alone(hub, pushed):
    assert value(pushed, "pull request").endswith("/another/base/discussions/1")
    assert hub.files("another/base") == {}
    assert set(hub.files("another/base", "refs/pr/1")) == TEXT_FILES


def test_a_card_is_edited_not_overwritten(hub, pushed):
    value(pushed, "existing card")
    for revision in ("main", "refs/pr/1"):
        card = hub.files("someone/carded", revision)["README.md"].decode()
        assert "\n# My model\n" in card and "\nWritten by hand.\n" in card
        assert "license: mit" in card
        assert "- poetry\n- multimax" in card


def test_weights_of_another_sharding_do_not_stay(hub, pushed):
    """Transformers would load model.safetensors, the older one, rather than the shards."""
    titles = hub.log("someone/sharded")
    assert len(titles) == 2 and value(pushed, "nothing new") == hub.repositories["someone/sharded"].refs["main"]
    first = hub.repositories["someone/sharded"].commits[value(pushed, "sharded")].files
    assert sum(name.startswith("model-0000") for name in first) > 1
    assert "model.safetensors" not in first
    assert set(hub.files("someone/sharded")) == TEXT_FILES


AGAIN = "Call it again"


@pytest.mark.parametrize(
    ("step", "kind", "texts"),
    [
        ("stock model", "TypeError", ["push needs a MultiMax model", "patch_model"]),
        ("results that are no file", "FileNotFoundError", ["missing.json"]),
        ("results that are no results", "ValueError", ["is no results.json"]),
        ("token with a line break", "ValueError", ["token is empty or has characters"]),
        ("bad token", "RuntimeError", ["someone/gpt2", "hf auth login", "HF_TOKEN"]),
        ("no right to write", "RuntimeError", ["another/base", "right to write", "create_pr=True"]),
        ("no such namespace", "RuntimeError", ["nobody/gpt2", "right to write"]),
        ("broken card", "RuntimeError", ["someone/broken-card", "nothing is half-done"]),
        ("cut in the weights", "RuntimeError", [AGAIN, "nothing is half-done"]),
        ("cut in the weights, new branch", "RuntimeError", [AGAIN]),
        ("cut in the commit", "RuntimeError", [AGAIN]),
        ("cut in the commit, new branch", "RuntimeError", [AGAIN]),
        ("commit refused", "RuntimeError", ["right to write"]),
        ("commit refused, new branch", "RuntimeError", ["right to write"]),
        ("server error", "RuntimeError", [AGAIN, "500"]),
        ("server error, new branch", "RuntimeError", [AGAIN, "500"]),
    ],
)
def test_a_push_that_fails_says_how_to_go_on_and_changes_nothing(pushed, step, kind, texts):
    error(pushed, step, kind, *texts)


def test_another_commit_meanwhile_is_not_undone(hub, pushed):
    assert "Someone else committed" in pushed["raced"]["text"]
    assert hub.log("someone/raced") == ["Upload MultiMax model", "put", "put"]
    assert value(pushed, "after a cut")
    assert "other.txt" in hub.files("someone/raced")


def test_a_lost_answer_makes_no_second_commit(hub, pushed):
    assert pushed["answer lost"]["error"] == "RuntimeError"
    assert value(pushed, "after that") == hub.repositories["someone/lost"].refs["main"]
    assert hub.log("someone/lost") == ["Upload MultiMax model", "put"]


# -- bad arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"repo_id": "a/b/c"}, ValueError, "a/b/c"),
        ({"repo_id": ""}, ValueError, "repo_id must be"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer must be the object"),
        ({"tags": 3}, TypeError, "tags must be"),
        ({"license": ["mit"]}, TypeError, "license must be"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_published_are_refused_before_anything_is_sent(arguments, kind, message):
    with pytest.raises(kind, match=message):
        push(patch_model(make("GPT2LMHeadModel")), **{"repo_id": "someone/never", **arguments})


# -- cards -------------------------------------------------------------------------------------------------------------

CARDS = sorted(path.stem for path in (ROOT / "model_cards").glob("*.md") if path.stem != "template")


@pytest.fixture
def validate(hub, monkeypatch):
    """The client's own validation of a card, asked of the local Hub though the tests are offline."""

    def post(url, **options):
        return get_session().post(f"{hub.url}/api/validate-yaml", **options)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.repocard.get_session", lambda: SimpleNamespace(post=post))
    return lambda card: ModelCard(str(card), ignore_metadata_errors=True).validate()


@pytest.mark.parametrize("name", CARDS)
def test_cards_of_the_evidence_pass_validation(validate, hub, name):
    before = len(hub.requests)
    validate(ModelCard.load(ROOT / "model_cards" / f"{name}.md"))
    values = json.loads((ROOT / "recipes" / "results" / f"{name}.json").read_text())
    runs = [run for arm in values["arms"].values() for run in arm["runs"][:1] if run["multimax"]]
    for run in runs:
        data = model_card(None, run, repo_id=f"someone/{name}", license="apache-2.0")
        validate(data)
        assert data.data.pipeline_tag == run["task"] and data.data.model_name == name
    assert runs and len(hub.requests) == before + len(runs) + 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: mine", "license"),
        ("pipeline_tag: poetry", "pipeline_tag"),
        ("language: English", "language"),
        ("base_model: /a/folder/of/mine", "base_model"),
        ("tags: [1]", "tags"),
    ],
)
def test_wrong_metadata_do_not_pass_validation(validate, metadata, message):
    with pytest.raises(ValueError, match=message):
        validate(f"---\n{metadata}\n---\n# A model\n")


# -- load --------------------------------------------------------------------------------------------------------------

CLASSES = {
    "gpt2": "MultiMaxGPT2LMHeadModel",
    "t5": "MultiMaxT5ForConditionalGeneration",
    "vit": "MultiMaxViTForImageClassification",
}


def assert_loaded(report: dict[str, Any], pushed: dict[str, Any]) -> None:
    """The pushed models, with the same logits, tokens and images."""
    for name, class_name in CLASSES.items():
        found = value(report, name)
        assert found["class"] == class_name
        assert found["logits"] == value(pushed, f"logits of {name}")
    assert value(report, "tokenizer")
    assert value(report, "image processor") == "ViTImageProcessorPil"


def assert_pipelines(report: dict[str, Any]) -> None:
    assert value(report, "text generation").startswith("a word")
    assert value(report, "task from the card") == "text-generation"
    assert set(value(report, "image classification")) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert value(report, "translation") > 1


def test_loading_with_the_plugin(pushed, with_plugin):
    assert_loaded(with_plugin, pushed)
    assert_pipelines(with_plugin)


@pytest.mark.parametrize("variant", ["sharded", "private", "pull request", "Trainer", "save_pretrained"])
def test_loading_a_variant(pushed, with_plugin, variant):
    assert value(with_plugin, variant) == value(pushed, "logits of gpt2")


def test_loading_in_half_precision_keeps_the_scalars(with_plugin):
    assert value(with_plugin, "bfloat16") == ["torch.bfloat16", "torch.float32"]


def test_loading_with_trust_remote_code_alone(hub, home, pushed, tmp_path):
    report = run(hub, home, "load_with_trust", tmp_path)
    assert_loaded(report, pushed)
    assert_pipelines(report)


def test_loading_offline_from_the_cache(hub, home, pushed, with_plugin, tmp_path):
    report = run(hub, home, "load_offline", tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert_loaded(report, pushed)
    assert report["never loaded"]["error"] == "OSError"


def test_without_the_plugin_an_error_says_what_to_install(hub, home, pushed, tmp_path):
    good = hub.files("someone/gpt2")
    config = {key: value for key, value in json.loads(good["config.json"]).items() if key != "auto_map"}
    hub.put("someone/no-loader", {**good, "config.json": json.dumps(config).encode(), "multimax_loader.py": None})
    report = run(hub, home, "load_without", tmp_path)
    for step in ("config, trusting", "model, trusting", "pipeline, trusting"):
        error(report, step, "ImportError", "pip install hf-multimax")
    for step in ("model", "pipeline", "stock class"):
        assert "error" in report[step]
    error(report, "model", "ValueError", "trust_remote_code=True")
    error(report, "no loader", "ValueError", "multimax")
    assert value(report, "tokenizer")


# -- what must not load ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_config_is_refused(with_plugin, name):
    error(with_plugin, f"someone/{name}", "ValueError", TAMPERED[name][1])


def test_pickled_weights_are_refused_without_asking_a_converter(hub, with_plugin):
    error(with_plugin, "someone/pickled", "OSError", "someone/pickled", "safetensors only", "pickled")
    assert not any("discussions" in request or "commits" in request for request in hub.requests)


@pytest.mark.parametrize("name", ["truncated", "truncated-header"])
def test_truncated_weights_are_refused_by_name(with_plugin, name):
    error(with_plugin, f"someone/{name}", "OSError", "model.safetensors of", f"someone/{name}", "force_download=True")


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("missing repository", "someone/nothing"),
        ("missing revision", "nothing"),
        ("private, bad token", "someone/locked"),
        ("private, no token", "someone/locked"),
        ("tokenizer, missing repository", "someone/nothing"),
    ],
)
def test_what_is_not_there_or_not_allowed(with_plugin, step, text):
    error(with_plugin, step, "OSError", text)


def test_no_code_of_a_repository_runs_unasked(hub, with_plugin, tmp_path_factory, pushed):
    assert value(with_plugin, "executes no loader") == value(pushed, "logits of gpt2")
    assert not list(tmp_path_factory.getbasetemp().glob("plugin*/trace"))
