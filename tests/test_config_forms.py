"""Every public way from a config to a config is one round trip, on each of our classes."""

import copy
import json
import pickle

import pytest
import transformers
from transformers import AutoConfig
from zoo import zoo_model

from hf_multimax import patch_model

NAMES = ("LlamaForCausalLM", "ViTForImageClassification", "BertForSequenceClassification", "Gemma3ForCausalLM",
         "BartForConditionalGeneration")  # fmt: skip


def clip():
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**part, "vocab_size": 31, "max_position_embeddings": 16}
    vision = {**part, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def _through_file(config, folder):
    config.to_json_file(folder / "config.json")
    return type(config).from_json_file(folder / "config.json")


def _saved(config, folder):
    config.save_pretrained(folder)
    return folder


WAYS = {
    "from_dict(to_dict)": lambda c, f: type(c).from_dict(c.to_dict()),
    "from_dict(to_diff_dict)": lambda c, f: type(c).from_dict(c.to_diff_dict()),
    "from_dict(json)": lambda c, f: type(c).from_dict(json.loads(c.to_json_string())),
    "from_dict(json, whole)": lambda c, f: type(c).from_dict(json.loads(c.to_json_string(use_diff=False))),
    "call": lambda c, f: type(c)(**c.to_dict()),
    "call on disk form": lambda c, f: type(c)(**json.loads(c.to_json_string())),
    "from_json_file": _through_file,
    "from_pretrained": lambda c, f: type(c).from_pretrained(_saved(c, f)),
    "AutoConfig": lambda c, f: AutoConfig.from_pretrained(_saved(c, f)),
    "AutoConfig of a file": lambda c, f: AutoConfig.from_pretrained(_saved(c, f) / "config.json"),
    "for_model": lambda c, f: AutoConfig.for_model(**json.loads(c.to_json_string())),
    "deepcopy": lambda c, f: copy.deepcopy(c),
    "pickle": lambda c, f: pickle.loads(pickle.dumps(c)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [*NAMES, clip], ids=lambda x: getattr(x, "__name__", x))
def test_round_trip(make, way, tmp_path):
    model = patch_model(make() if callable(make) else zoo_model(make), order=1)
    config = model.config
    found = WAYS[way](config, tmp_path)
    assert type(found) is type(config) and found.model_type == config.model_type != "multimax"
    assert found.multimax == config.multimax and found._attn_implementation == "multimax"
    assert found.to_json_string() == config.to_json_string()
    expected, actual = config.to_dict(), found.to_dict()
    for name in ("architectures", "_name_or_path"):
        expected.pop(name, None), actual.pop(name, None)
    assert json.loads(json.dumps(actual)) == json.loads(json.dumps(expected))
    found.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").to_json_string() == config.to_json_string()


def test_the_form_on_disk_and_in_memory(tmp_path):
    model = patch_model(zoo_model("BertForSequenceClassification"))
    model.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert (on_disk["model_type"], on_disk["base_model_type"]) == ("multimax", "bert")
    assert on_disk["architectures"] == ["MultiMaxBertForSequenceClassification"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["BertForSequenceClassification"] and config.id2label == model.config.id2label
    assert not hasattr(config, "base_model_type") and not hasattr(config, "auto_map")


def test_the_config_of_another_architecture_is_refused():
    values = json.loads(patch_model(zoo_model("LlamaForCausalLM")).config.to_json_string())
    generated = type(patch_model(zoo_model("BertForMaskedLM")).config)
    with pytest.raises(ValueError, match="MultiMax 'llama', not of a 'bert'"):
        generated.from_dict(values)


def test_attributes_are_set_and_shown_as_on_a_stock_config():
    config = patch_model(zoo_model("LlamaForCausalLM")).config
    config.update({"rms_norm_eps": 1e-3})
    config.update_from_string("rms_norm_eps=0.01")
    assert config.rms_norm_eps == 0.01 and "multimax" in repr(config)
    assert config == copy.deepcopy(config)
    assert config.get_text_config() is config
    with pytest.raises(ValueError, match=r"MultiMaxConfig\.order"):
        config.multimax = {"order": -1}
