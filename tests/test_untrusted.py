"""Files that somebody else wrote: an index, sizes and numbers that lead elsewhere are refused by name, at once."""

import json

import pytest
import torch
from test_save_load import edit_config, patched
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from hf_multimax import MultiMaxConfig

LOADERS = (AutoModelForCausalLM, GPT2LMHeadModel)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["evil.bin", "../model.safetensors", "/tmp/model.safetensors", "a/b.safetensors",
                                  "..\\model.safetensors", "evil.pt", "", 3, None])  # fmt: skip
def test_an_index_names_safetensors_beside_it(tmp_path, name, loader):
    patched().save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    torch.save({"a": torch.ones(1)}, tmp_path / "evil.bin")
    path.write_text(json.dumps(index))
    with pytest.raises(OSError, match="must name safetensors beside it"):
        loader.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": '])
def test_an_index_that_is_none(tmp_path, text):
    patched().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(OSError, match="no index of safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [*LOADERS, AutoConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_labels", 10**18), ("n_layer", 10**9), ("n_head", 10**12), ("vocab_size", 10**30), ("n_positions", 10**15),
     ("num_labels", -1), ("n_layer", 1e300), ("n_embd", 0)],
)  # fmt: skip
def test_sizes_have_bounds(tmp_path, field, value, loader):
    patched().save_pretrained(tmp_path)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json: {field} must be at (most|least)"):
        loader.from_pretrained(tmp_path)


def test_sizes_inside_a_part_have_bounds(tmp_path):
    patched().save_pretrained(tmp_path)
    edit_config(tmp_path, text_config={"num_hidden_layers": 10**18})
    with pytest.raises(ValueError, match=r"text_config\.num_hidden_layers must be at most"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [10**400, 10**5000, float("inf"), float("nan"), -(10**400)], ids=lambda x: f"{x!s:.9}"
                         if isinstance(x, float) else "integer")  # fmt: skip
def test_numbers_that_no_float_holds_are_refused_by_the_fields_name(value):
    with pytest.raises(ValueError, match=r"MultiMaxConfig\.init_std must be"):
        MultiMaxConfig(init_std=value)
