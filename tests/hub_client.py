"""What people do with a Hub, each in a process of its own: ``python hub_client.py <function> <folder> ...``.

The environment is ``HubServer.environment(home)``. What came out is printed as JSON: per step its value or its error.
"""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

REPORT: dict[str, dict[str, Any]] = {}
PROMPT = [[3, 4, 5, 6]]
RESULTS = {
    "kind": "run",
    "schema": 1,
    "task": "text-generation",
    "command": "python -m recipes.language_modeling recipes/configs/lm_web_small.yaml --seed 0",
    "seed": 0,
    "model": {
        "class": "GPT2LMHeadModel",
        "type": "gpt2",
        "source": None,
        "parameters": 26848,
        "multimax_parameters": 16,
    },
    "data": {
        "name": "web",
        "dataset": None,
        "description": "World English Bible",
        "language": ["en"],
        "licence": "public domain",
        "training_examples": 10,
        "evaluation_examples": 3,
    },
    "training": {"steps": 4, "batch_size": 2, "learning_rate": 0.001, "world_size": 1, "device": "cpu"},
    "metrics": {"perplexity": 43.21, "loss": 3.766},
}


def attempt(name: str, action: Callable[[], Any]) -> None:
    """Do it and note its value, or its error with the state of the Hub before and after."""
    before = _hub("state")
    try:
        REPORT[name] = {"value": action()}
    except Exception as error:
        REPORT[name] = {"error": type(error).__name__, "text": str(error), "unchanged": _hub("state") == before}


def _hub(path: str, values: Any = None) -> Any:
    """Talk to the server behind the client's back; None where there is none, offline."""
    if os.environ["HF_HUB_OFFLINE"] == "1":
        return None
    data = None if values is None else json.dumps(values).encode()
    with urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/test/{path}", data=data) as answer:
        return json.load(answer)


def _with_faults(faults: dict[str, int | str], action: Callable[[], Any]) -> Callable[[], Any]:
    def act() -> Any:
        _hub("faults", faults)
        try:
            return action()
        finally:
            _hub("faults", {})

    return act


def _logits(model: Any) -> list[float]:
    """The first row of logits of a text or image model, which JSON carries without loss."""
    import torch

    if hasattr(model.config, "image_size"):
        inputs = {"pixel_values": torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)}
    else:
        inputs = {"input_ids": torch.tensor(PROMPT)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor(PROMPT)
    with torch.no_grad():
        return model.eval()(**inputs).logits.flatten().tolist()


# -- push --------------------------------------------------------------------------------------------------------------


def push_all(folder: str) -> None:
    """Every way to publish, and every way that it can go wrong."""
    import torch
    from models import make
    from transformers import Trainer, TrainingArguments

    import hf_multimax

    time.sleep = lambda seconds: None  # the client waits between its attempts

    def patched(name: str, **config: Any) -> Any:
        model = hf_multimax.patch_model(make(name, **config), output=name.startswith("GPT2"))
        with torch.no_grad():
            for parameter in hf_multimax.multimax_parameters(model).values():
                parameter.copy_(torch.randn_like(parameter))
        return model

    gpt2, vit = patched("GPT2LMHeadModel", vocab_size=300), patched("ViTForImageClassification", num_channels=3)
    t5 = patched("T5ForConditionalGeneration")
    tokenizer, push = _tokenizer(), hf_multimax.push
    results = {**RESULTS, "multimax": gpt2.config.multimax}
    results["model"] = {**RESULTS["model"], "parameters": gpt2.num_parameters()}
    results["model"]["multimax_parameters"] = sum(p.numel() for p in hf_multimax.multimax_parameters(gpt2).values())

    for name, model in {"gpt2": gpt2, "vit": vit, "t5": t5}.items():
        REPORT[f"logits of {name}"] = {"value": _logits(model)}
    attempt("push", lambda: push(gpt2, "someone/gpt2", tokenizer=tokenizer, results=results).oid)
    attempt("push_to_hub", lambda: t5.push_to_hub("t5", commit_message="by method", tags=["mine"]).oid)
    attempt("t5 tokenizer", lambda: str(_t5_tokenizer().push_to_hub("someone/t5")))
    attempt("image processor", lambda: push(vit, "someone/vit", image_processor=_image_processor()).oid)

    arguments = TrainingArguments(f"{folder}/trained", hub_model_id="someone/trained", report_to=[], use_cpu=True)
    trainer = Trainer(gpt2, arguments, processing_class=tokenizer)
    attempt("Trainer", lambda: trainer.push_to_hub(commit_message="by Trainer").oid)
    attempt("save_pretrained", lambda: gpt2.save_pretrained(f"{folder}/saved", push_to_hub=True))

    attempt("private", lambda: push(gpt2, "someone/secret", private=True).oid)
    attempt("revision", lambda: push(vit, "someone/gpt2", revision="dev").oid)
    attempt("pull request", lambda: push(gpt2, "another/base", create_pr=True).pr_url)
    attempt("to the pull request", lambda: push(t5, "someone/carded", revision="refs/pr/1").oid)
    attempt("sharded", lambda: push(gpt2, "someone/sharded", max_shard_size="20KB").oid)
    attempt("one file again", lambda: push(gpt2, "someone/sharded").oid)
    attempt("nothing new", lambda: push(gpt2, "someone/sharded").oid)
    attempt("existing card", lambda: push(gpt2, "someone/carded").oid)

    stock, fresh = make("GPT2LMHeadModel"), patched("GPT2LMHeadModel", vocab_size=300, n_inner=40)
    attempt("stock model", lambda: push(stock, "someone/new"))
    attempt("results that are no file", lambda: push(fresh, "someone/new", results=f"{folder}/missing.json"))
    attempt("results that are no results", lambda: push(fresh, "someone/new", results={"perplexity": float("nan")}))
    attempt("token with a line break", lambda: push(fresh, "someone/gpt2", token="hf_wrongToken\n"))
    attempt("bad token", lambda: push(fresh, "someone/gpt2", token="hf_wrongToken"))
    attempt("no right to write", lambda: push(fresh, "another/base"))
    attempt("no such namespace", lambda: push(fresh, "nobody/gpt2"))
    attempt("broken card", lambda: push(fresh, "someone/broken-card"))
    faults: dict[str, dict[str, int | str]] = {
        "cut in the weights": {"lfs": "cut"},
        "cut in the commit": {"commit": "cut"},
        "commit refused": {"commit": 403},
        "server error": {"preupload": 500},
    }
    for name, fault in faults.items():
        attempt(name, _with_faults(fault, lambda: push(fresh, "someone/gpt2")))
        attempt(f"{name}, new branch", _with_faults(fault, lambda: push(fresh, "someone/gpt2", revision="new")))
    attempt("raced", _with_faults({"preupload": "race"}, lambda: push(fresh, "someone/raced")))
    attempt("answer lost", _with_faults({"commit": "lost"}, lambda: push(fresh, "someone/lost")))
    attempt("after that", lambda: push(fresh, "someone/lost").oid)
    attempt("after a cut", lambda: push(fresh, "someone/raced").oid)


def _tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a word and a word"], vocab_size=300)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="Ġ")


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0)])


def _image_processor() -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 16, "width": 16})


# -- load --------------------------------------------------------------------------------------------------------------


def load_with_plugin(folder: str, *broken: str) -> None:
    """After ``import hf_multimax``: every variant, the pipelines, and what must not load."""
    import torch

    import hf_multimax

    _load_models({})
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def gpt2(repo_id: str = "someone/gpt2", **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(repo_id, **options)

    def in_bfloat16() -> list[str]:
        model = gpt2(dtype=torch.bfloat16, device_map="auto")
        scalars = hf_multimax.multimax_parameters(model).values()
        return [str(model.dtype), *{str(parameter.dtype) for parameter in scalars}]

    attempt("sharded", lambda: _logits(gpt2("someone/sharded", revision=os.environ["SHARDED"])))
    attempt("private", lambda: _logits(gpt2("someone/secret")))
    attempt("pull request", lambda: _logits(gpt2("another/base", revision="refs/pr/1")))
    attempt("Trainer", lambda: _logits(gpt2("someone/trained")))
    attempt("save_pretrained", lambda: _logits(gpt2("someone/saved")))
    attempt("bfloat16", in_bfloat16)
    _load_pipelines({})
    attempt("executes no loader", lambda: _logits(gpt2("someone/evil")))

    attempt("missing repository", lambda: gpt2("someone/nothing"))
    attempt("missing revision", lambda: gpt2(revision="nothing"))
    attempt("private, bad token", lambda: gpt2("someone/locked", token="hf_wrongToken"))
    attempt("private, no token", lambda: gpt2("someone/locked", token=False))
    attempt("tokenizer, missing repository", lambda: AutoTokenizer.from_pretrained("someone/nothing"))
    for repo_id in broken:
        attempt(repo_id, lambda repo_id=repo_id: repr(gpt2(repo_id)).partition("(")[0])


def load_with_trust(folder: str) -> None:
    """The plugin is installed but not imported."""
    _load_models({"trust_remote_code": True})
    _load_pipelines({"trust_remote_code": True})


def load_offline(folder: str) -> None:
    import hf_multimax  # noqa: F401

    _load_models({})
    attempt("never loaded", lambda: _load("AutoModelForCausalLM", "someone/raced", {}))


def load_without(folder: str) -> None:
    """The plugin is not installed."""

    class Absent:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == "hf_multimax":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

    trust = {"trust_remote_code": True}
    attempt("config, trusting", lambda: AutoConfig.from_pretrained("someone/gpt2", **trust))
    attempt("model, trusting", lambda: AutoModelForCausalLM.from_pretrained("someone/gpt2", **trust))
    attempt("pipeline, trusting", lambda: pipeline("text-generation", "someone/gpt2", **trust))
    attempt("model", lambda: AutoModelForCausalLM.from_pretrained("someone/gpt2"))
    attempt("stock class", lambda: GPT2LMHeadModel.from_pretrained("someone/gpt2"))
    attempt("pipeline", lambda: pipeline("text-generation", "someone/gpt2"))
    attempt("no loader", lambda: AutoModelForCausalLM.from_pretrained("someone/no-loader"))
    attempt("tokenizer", lambda: AutoTokenizer.from_pretrained("someone/gpt2")("a word").input_ids)


def _read_image_processor(repo_id: str, options: dict[str, Any]) -> tuple[Any, bool]:
    """The processor, and whether the Auto class gave it: that of Transformers 5.15 does not without torchvision."""
    from transformers import AutoImageProcessor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    try:
        return AutoImageProcessor.from_pretrained(repo_id, **options), True
    except ImportError:
        return ViTImageProcessorPil.from_pretrained(repo_id), False


def _load(auto_class: str, repo_id: str, options: dict[str, Any]) -> dict[str, Any]:
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(repo_id, **options)
    return {"class": repr(model).partition("(")[0], "logits": _logits(model)}


def _load_models(options: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    attempt("gpt2", lambda: _load("AutoModelForCausalLM", "someone/gpt2", options))
    attempt("t5", lambda: _load("AutoModelForSeq2SeqLM", "someone/t5", options))
    attempt("vit", lambda: _load("AutoModelForImageClassification", "someone/gpt2", {"revision": "dev", **options}))
    attempt("tokenizer", lambda: AutoTokenizer.from_pretrained("someone/gpt2", **options)("a word").input_ids)
    attempt("image processor", lambda: type(_read_image_processor("someone/vit", options)[0]).__name__)


def _load_pipelines(options: dict[str, Any]) -> None:
    """Transformers 5 has no pipeline for translation, which is ``generate`` with the tokenizer."""
    from PIL import Image
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

    image = Image.linear_gradient("L").convert("RGB")

    def generate_text() -> str:
        return pipeline("text-generation", "someone/gpt2", **options)("a word", max_new_tokens=3)[0]["generated_text"]

    def classify() -> list[str]:
        processor, is_auto = _read_image_processor("someone/vit", options)
        given = options if is_auto else {"image_processor": processor, **options}
        return [item["label"] for item in pipeline("image-classification", "someone/vit", **given)(image)]

    def translate() -> int:
        tokenizer = AutoTokenizer.from_pretrained("someone/t5", **options)
        model = AutoModelForSeq2SeqLM.from_pretrained("someone/t5", **options)
        output = model.generate(**tokenizer(["a b"], return_tensors="pt"), num_beams=2, max_new_tokens=4)
        return output.shape[1]

    attempt("text generation", generate_text)
    attempt("task from the card", lambda: pipeline(model="someone/gpt2", **options).task)
    attempt("image classification", classify)
    attempt("translation", translate)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(REPORT, default=repr))
