"""Saving and loading through the Auto classes, in other processes, and every way a checkpoint can be wrong."""

import json
import logging
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from models import inputs_for, make
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import hf_multimax.modeling
from hf_multimax import MultiMaxConfig, is_patched, multimax_parameters, patch_model

LOADERS = {
    "GPT2Model": AutoModel,
    "GPT2LMHeadModel": AutoModelForCausalLM,
    "GPT2ForSequenceClassification": AutoModelForSequenceClassification,
    "GPT2ForTokenClassification": AutoModelForTokenClassification,
    "ViTForImageClassification": AutoModelForImageClassification,
    "DeiTForImageClassification": AutoModelForImageClassification,
    "SiglipForImageClassification": AutoModelForImageClassification,
    "T5ForConditionalGeneration": AutoModelForSeq2SeqLM,
    "MT5ForConditionalGeneration": AutoModelForSeq2SeqLM,
    "MarianMTModel": AutoModelForSeq2SeqLM,
}


def patched(name="GPT2LMHeadModel", **options):
    model = patch_model(make(name), **options)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter))
    return model


def same(model, other, batch=None):
    batch = batch or inputs_for(model)
    with torch.no_grad():
        return torch.equal(model(**batch)[0], other(**batch)[0])


def python(code, *arguments, expect=0):
    """Run code in a fresh process, without a terminal."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        holder, _, leaf = key.rpartition("__")
        (values[holder] if holder else values)[leaf] = value
    path.write_text(json.dumps(values))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("options", [{}, {"order": 3, "per_head": True}, {"affine": True}], ids=str)
def test_round_trip_by_auto_class(tmp_path, name, options):
    model = patched(name, **options)
    model.save_pretrained(tmp_path)
    other = LOADERS[name].from_pretrained(tmp_path)
    assert type(other) is type(model)
    assert other.config.multimax == model.config.multimax
    assert other.config._attn_implementation == "multimax"
    assert same(model, other)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MarianMTModel", "T5ForConditionalGeneration"])
def test_output_modulators_round_trip(tmp_path, name):
    model = patched(name, output=True)
    assert {"multimax_output.ranges", "multimax_output.ts"} < set(multimax_parameters(model))
    model.save_pretrained(tmp_path)
    assert same(model, LOADERS[name].from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ViTForImageClassification", "T5ForConditionalGeneration"])
def test_another_process_saves_identical_files(tmp_path, name):
    first, second = tmp_path / "first", tmp_path / "second"
    patched(name, order=1).save_pretrained(first)
    python(
        """
        import sys, transformers, hf_multimax
        getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2]).save_pretrained(sys.argv[3])
        """,
        LOADERS[name].__name__,
        first,
        second,
    )
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert [file for file in files if (first / file).read_bytes() != (second / file).read_bytes()] == []
    assert not any(file.endswith((".bin", ".pkl", ".pt")) for file in files)


def test_sharded(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"])
@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}], ids=str)
def test_the_scalars_stay_float32_in_a_half_precision_model(tmp_path, dtype, device_map):
    model = patched(output=True)
    expected = {name: value.clone() for name, value in multimax_parameters(model).items()}
    if dtype == "auto":
        model.bfloat16()
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map=device_map, low_cpu_mem_usage=True)
    assert other.dtype == (dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    assert all(torch.equal(value, expected[name]) for name, value in multimax_parameters(other).items())
    assert other(**inputs_for(other)).logits.dtype == other.dtype


def test_auto_config_shows_the_entry(tmp_path):
    patched(order=1, include="attn").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.multimax == MultiMaxConfig(order=1, include="attn").to_dict()
    assert config.model_type == "gpt2"
    assert isinstance(config, transformers.GPT2Config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["base_model_type"]) == ("multimax", "gpt2")
    assert json.loads(config.to_json_string())["multimax"] == config.multimax


def test_loading_by_the_generated_class(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    cls = hf_multimax.modeling.MultiMaxGPT2LMHeadModel
    assert cls is type(model)
    assert same(model, cls.from_pretrained(tmp_path))
    config = hf_multimax.modeling.MultiMaxGPT2Config.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    with pytest.raises(AttributeError, match="MultiMaxNothing"):
        _ = hf_multimax.modeling.MultiMaxNothing


def test_from_config_makes_a_new_model_by_the_papers_initialisation():
    config = patched(init="paper").config
    model = AutoModelForCausalLM.from_config(config)
    values = torch.cat([p.flatten() for p in multimax_parameters(model).values()])
    assert is_patched(model) and isinstance(model, transformers.GPT2LMHeadModel)
    assert 0 < values.abs().max() < 0.2


def test_an_inner_model_saves_by_itself(tmp_path):
    model = patched()
    model.transformer.save_pretrained(tmp_path)
    inner = AutoModel.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(inner(ids)[0], model.transformer(ids)[0])


def test_a_part_that_does_not_know_the_whole_does_not_save(tmp_path):
    with pytest.raises(ValueError, match="whole model"):
        patched("T5ForConditionalGeneration").encoder.config.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_beside_the_model_loads(tmp_path):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a word and a word"], vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
    tokenizer.save_pretrained(tmp_path)
    patched().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a word").input_ids == tokenizer("a word").input_ids


# -- other head classes ------------------------------------------------------------------------------------------------


def test_another_head_takes_the_attention_scalars(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for name, value in multimax_parameters(model).items():
        assert torch.equal(multimax_parameters(other)[name], value)


def test_the_encoder_of_an_encoder_decoder(tmp_path):
    model = patched("T5ForConditionalGeneration", include=["encoder", "decoder"])
    model.save_pretrained(tmp_path)
    encoder = transformers.AutoModelForTextEncoding.from_pretrained(tmp_path)
    assert is_patched(encoder) and isinstance(encoder, transformers.T5EncoderModel)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(encoder(ids)[0], model.encoder(ids)[0])


def test_an_output_modulator_is_dropped_where_there_are_no_logits(tmp_path, caplog):
    patched(output=True).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = AutoModel.from_pretrained(tmp_path)
    assert "dropped" in caplog.text
    assert not hasattr(model, "multimax_output")
    assert model.config.multimax["output"] is False


def test_an_output_modulator_of_another_head_starts_anew(tmp_path, caplog):
    patched(output=True).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert "newly initialised" in caplog.text
    assert model.multimax_output.ts.eq(0).all()


def test_parts_of_a_composite_model(tmp_path):
    """They refuse to load without the plugin, and load with it in the whole."""
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**part, "vocab_size": 31, "max_position_embeddings": 16, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**part, "image_size": 8, "patch_size": 4})
    model = patch_model(transformers.CLIPModel(config).eval())
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    batch = {"input_ids": torch.tensor([[3, 4, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    found, expected = (m(**batch).logits_per_image for m in (AutoModel.from_pretrained(tmp_path), model))
    torch.testing.assert_close(found, expected)
    output = python(_WITHOUT_PLUGIN.replace("GPT2LMHeadModel", "CLIPVisionModel"), tmp_path)
    assert "refused CLIPVisionModel" in output


def test_an_encoder_decoder_of_two_models(tmp_path):
    settings = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertConfig(**settings, intermediate_size=16)
    decoder = transformers.BertConfig(**settings, intermediate_size=16, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = patch_model(transformers.EncoderDecoderModel(config).eval())
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    other = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(other(input_ids=ids, decoder_input_ids=ids)[0], model(input_ids=ids, decoder_input_ids=ids)[0])


# -- base checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_checkpoint_in_a_multimax_class_gets_initialised_scalars(tmp_path, dtype):
    stock = make("GPT2LMHeadModel")
    stock.save_pretrained(tmp_path)
    config = patched(output=True).config
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=dtype)
    assert all(p.dtype == torch.float32 and p.eq(0).all() for p in multimax_parameters(model).values())
    if dtype == torch.float32:
        with hf_multimax.backend("eager"):
            assert same(stock, model)


# -- without the plugin ------------------------------------------------------------------------------------------------

_WITHOUT_PLUGIN = """
    import sys, transformers
    for name in ("AutoConfig", "AutoModelForCausalLM", "GPT2LMHeadModel"):
        try:
            getattr(transformers, name).from_pretrained(sys.argv[1])
        except Exception as error:
            print("refused", name)
"""


@pytest.mark.parametrize("with_loader", [True, False])
@pytest.mark.parametrize("options", [{}, {"attention": False, "output": True}], ids=str)
def test_stock_transformers_refuses_the_checkpoint(tmp_path, with_loader, options):
    patched(**options).save_pretrained(tmp_path)
    if not with_loader:
        path = tmp_path / "config.json"
        values = json.loads(path.read_text())
        del values["auto_map"]
        path.write_text(json.dumps(values))
    output = python(_WITHOUT_PLUGIN, tmp_path)
    assert all(f"refused {name}" in output for name in ("AutoConfig", "AutoModelForCausalLM", "GPT2LMHeadModel"))


def test_trust_remote_code_loads_without_importing_the_plugin(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path / "model")
    output = python(
        """
        import sys, torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        print(repr(model).partition("(")[0], model(torch.tensor([[3, 4, 5]])).logits.sum().item())
        """,
        tmp_path / "model",
    )
    name, value = output.strip().splitlines()[-1].split()
    assert name == "MultiMaxGPT2LMHeadModel"
    assert float(value) == pytest.approx(model(torch.tensor([[3, 4, 5]])).logits.sum().item(), rel=1e-4)


# -- checkpoints that do not fit ---------------------------------------------------------------------------------------


def test_a_missing_key_is_named(tmp_path):
    patched().save_pretrained(tmp_path)
    key = "transformer.h.1.attn.multimax.ts"
    edit_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if k != key})
    with pytest.raises(ValueError, match=rf"missing: {key}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_renamed_key_is_named(tmp_path):
    patched().save_pretrained(tmp_path)
    edit_weights(
        tmp_path,
        lambda weights: {k.replace("h.1.attn.multimax.ts", "h.1.attn.multimax.tt"): v for k, v in weights.items()},
    )
    with pytest.raises(
        ValueError, match=r"missing: \S*h\.1\.attn\.multimax\.ts; unexpected: \S*h\.1\.attn\.multimax\.tt"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_reshaped_key_is_named(tmp_path):
    patched().save_pretrained(tmp_path)
    edit_config(tmp_path, multimax__order=3)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.multimax\.ranges: \[4\] instead of \[6\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.multimax\.ranges"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_missing_output_modulator_is_named(tmp_path):
    patched().save_pretrained(tmp_path)
    edit_config(tmp_path, multimax__output=True)
    with pytest.raises(ValueError, match=r"missing: multimax_output\.ranges"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_unexpected_key_is_named(tmp_path):
    patched(affine=True).save_pretrained(tmp_path)
    edit_config(tmp_path, multimax__affine=False)
    with pytest.raises(ValueError, match=r"unexpected: \S*h\.0\.attn\.multimax\.scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_another_wrong_weight_is_refused_as_ever(tmp_path):
    patched().save_pretrained(tmp_path)
    edit_config(tmp_path, vocab_size=77)
    with pytest.raises(RuntimeError, match=r"wte.*ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.config.vocab_size == 77


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"multimax__order": 0}, r"MultiMaxConfig\.order"),
        ({"multimax__order": "__import__('os')"}, r"MultiMaxConfig\.order"),
        ({"multimax__init_std": -1}, r"MultiMaxConfig\.init_std"),
        ({"multimax__per_head": "yes"}, r"MultiMaxConfig\.per_head"),
        ({"multimax__normalizer": "nonsense"}, "nonsense.*register_normalizer"),
        ({"multimax__include": "("}, r"MultiMaxConfig\.include"),
        ({"multimax": None}, "multimax"),
        ({"base_model_type": "nonsense"}, "base_model_type"),
        ({"base_model_type": "multimax"}, "base_model_type"),
    ],
)
def test_a_config_edited_to_something_impossible_is_refused(tmp_path, change, text):
    patched().save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_without_the_entry_is_refused(tmp_path):
    patched().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["multimax"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="'multimax'"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, "generated"])
def test_another_attention_implementation_at_load_is_refused(tmp_path, loader):
    patched().save_pretrained(tmp_path)
    loader = hf_multimax.modeling.MultiMaxGPT2LMHeadModel if loader == "generated" else loader
    with pytest.raises(ValueError, match="unpatch_model"):
        loader.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="unpatch_model"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="sdpa")


@pytest.mark.parametrize("config", [None, AutoConfig, transformers.GPT2Config])
def test_a_stock_class_loads_what_the_checkpoint_is(tmp_path, config):
    model = patched(output=True)
    model.save_pretrained(tmp_path)
    given = {} if config is None else {"config": config.from_pretrained(tmp_path)}
    other, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True, **given)
    assert type(other) is type(model) and same(model, other)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ValueError, match="unpatch_model"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="sdpa", **given)


def test_a_stock_model_built_from_a_multimax_config_does_nothing_in_silence(tmp_path):
    model = transformers.GPT2LMHeadModel(patched().config)
    with pytest.raises(ValueError, match="Auto class"):
        model(torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="from_pretrained"):
        patch_model(model)
    with pytest.raises(ValueError, match="does not have"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_config_was_replaced_is_not_saved(tmp_path):
    model = patched()
    model.config = make("GPT2LMHeadModel").config
    with pytest.raises(ValueError, match="config was replaced"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_beside_which_the_scalars_would_be_lost_are_refused(tmp_path):
    model = patch_model(make("GPT2LMHeadModel"))
    model.add_adapter(LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="adapters of add_adapter"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "out")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=None), type(model))


def test_limits_of_minus_one_are_defaults(tmp_path):
    model = patch_model(make("GPT2LMHeadModel"))
    model.config.max_relative_positions = -1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.max_relative_positions == -1


def test_pickled_weights_are_refused(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safetensors only"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_truncated_weights_are_refused(tmp_path):
    patched().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Exception, match="(?i)safetensor|incomplete|header|invalid"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
