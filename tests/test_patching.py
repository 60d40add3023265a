"""patch_model and unpatch_model: what they change, what they leave alone, and what they refuse."""

import copy
import pickle

import accelerate
import pytest
import torch
import transformers
from models import ALL, inputs_for, make
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig

import hf_multimax
from hf_multimax import MultiMaxConfig, freeze_base, is_patched, multimax_parameters, patch_model, unpatch_model
from hf_multimax.models.discovery import attention_layers


def randomised(model):
    """A patched model whose scalars are far from the identity."""
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter))
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_it_is_in_place_and_names_its_parameters():
    model = make("GPT2LMHeadModel")
    assert patch_model(model) is model
    assert is_patched(model)
    assert list(multimax_parameters(model)) == [
        f"transformer.h.{layer}.attn.multimax.{name}" for layer in (0, 1) for name in ("ranges", "ts")
    ]
    assert sum(p.numel() for p in multimax_parameters(model).values()) == 8 * 2
    assert type(model) is not GPT2LMHeadModel and type(model).__name__ == "GPT2LMHeadModel"
    assert isinstance(model, GPT2LMHeadModel)
    assert model.config.model_type == "gpt2"
    assert model.config.multimax == MultiMaxConfig().to_dict()
    assert repr(model).startswith("MultiMaxGPT2LMHeadModel(")
    assert not model.training
    assert not model.transformer.h[0].attn.multimax.training


@pytest.mark.parametrize("name", ALL)
def test_every_head_class_patches_and_unpatches(name):
    model = make(name)
    config, keys, batch = model.config, set(model.state_dict()), inputs_for(model)
    expected = {k: v for k, v in model(**batch).items() if torch.is_tensor(v)}
    before = config.to_json_string()
    randomised(patch_model(model))
    assert len(multimax_parameters(model)) == 2 * len(attention_layers(model))
    unpatch_model(model)
    assert type(model) is getattr(transformers, name)
    assert set(model.state_dict()) == keys
    assert model.config.to_json_string() == before
    assert {type(c) for c in configs_of(model)} == {type(c) for c in configs_of(make(name))}
    assert {c._attn_implementation for c in configs_of(model)} == {"eager"}
    outputs = model(**batch)
    assert all(torch.equal(outputs[key], value) for key, value in expected.items())


def configs_of(model):
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unpatching_restores_the_attention_implementation(implementation):
    model = T5 = transformers.T5ForConditionalGeneration._from_config(
        make("T5ForConditionalGeneration").config, attn_implementation=implementation
    )
    unpatch_model(patch_model(model))
    assert {c._attn_implementation for c in configs_of(T5)} == {implementation}


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ViTForImageClassification", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("stock_first", [True, False])
def test_a_stock_model_beside_a_patched_one_stays_stock(name, stock_first):
    stock, patched = None, None
    if stock_first:
        stock = make(name)
    patched = randomised(patch_model(make(name)))
    stock = stock or make(name)
    batch = inputs_for(stock)
    twin = make(name)
    assert type(stock) is getattr(transformers, name)
    assert stock.config._attn_implementation == "eager"
    assert torch.equal(logits(stock, batch), logits(twin, batch))
    assert not torch.equal(logits(patched, batch), logits(stock, batch))
    assert multimax_parameters(stock) == {}


def test_models_that_share_a_config_object_are_told_apart():
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    one, other = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    assert one.config is other.config
    ids = torch.arange(8)[None]
    expected = logits(other, {"input_ids": ids})
    randomised(patch_model(one))
    assert one.config is not other.config
    assert one.transformer.config is one.config
    assert type(other.config) is GPT2Config
    assert not hasattr(other.config, "multimax")
    assert torch.equal(logits(other, {"input_ids": ids}), expected)


# -- choosing layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("GPT2LMHeadModel", {"include": r"h\.1\."}, ["transformer.h.1.attn"]),
        ("GPT2ForSequenceClassification", {"include": r"^h\.1\."}, ["transformer.h.1.attn"]),
        ("GPT2Model", {"include": r"^h\.1\."}, ["h.1.attn"]),
        (
            "T5ForConditionalGeneration",
            {"include": "EncDecAttention"},
            [f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)],
        ),
        (
            "MarianMTModel",
            {"include": "decoder", "exclude": ["encoder_attn"]},
            [f"model.decoder.layers.{i}.self_attn" for i in (0, 1)],
        ),
    ],
)
def test_include_and_exclude(name, options, expected):
    model = patch_model(make(name), **options)
    assert [n.rpartition(".multimax.")[0] for n in multimax_parameters(model)][::2] == expected
    others = [m for n, m in attention_layers(model).items() if n not in expected]
    assert all(module.multimax is None for module in others)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "MarianMTModel"])
def test_layers_left_out_keep_softmax(name):
    stock, model = make(name), make(name)
    batch = inputs_for(stock)
    last = list(attention_layers(model))[-1]
    patch_model(model, include=last.split(".", 1)[1].replace(".", r"\."))
    with hf_multimax.backend("eager"):
        assert torch.equal(logits(model, batch), logits(stock, batch))
        assert not torch.equal(logits(randomised(model), batch), logits(stock, batch))


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    model = make("GPT2LMHeadModel")
    with pytest.raises(ValueError, match=rf"{option}.*nowhere.*gpt2.*h\.0\.attn"):
        patch_model(model, **{option: ["attn", "nowhere"]})
    assert_untouched(model)


def test_leaving_out_everything_is_refused():
    model = make("GPT2LMHeadModel")
    with pytest.raises(ValueError, match="no attention layer"):
        patch_model(model, exclude="attn")
    assert_untouched(model)


def test_per_head():
    model = patch_model(make("MarianMTModel"), per_head=True)
    assert {tuple(p.shape) for p in multimax_parameters(model).values()} == {(4, 4)}


# -- what is refused ---------------------------------------------------------------------------------------------------


def assert_untouched(model):
    assert not is_patched(model)
    assert type(model.config).__module__.startswith("transformers.")
    assert not any(hasattr(module, "multimax") for module in model.modules())
    assert model.config._attn_implementation == "eager"


def test_patching_twice_is_refused():
    model = patch_model(make("GPT2LMHeadModel"))
    for again in (model, model.transformer):
        with pytest.raises(ValueError, match="unpatch_model"):
            patch_model(again)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), "gpt2", None])
def test_something_else_than_a_model_is_refused(wrong):
    with pytest.raises(TypeError, match="Transformers model"):
        patch_model(wrong)


def test_wrong_options_leave_the_model_alone():
    model = make("GPT2LMHeadModel")
    for error, options in (
        (TypeError, {"typo": 1}),
        (ValueError, {"order": 0}),
        (ValueError, {"normalizer": "nonsense"}),
        (ValueError, {"normalizer_kwargs": {"a": 1}}),
        (ValueError, {"normalizer": "softmax", "output": True}),
    ):
        with pytest.raises(error, match="|".join(options)):
            patch_model(model, **options)
        assert_untouched(model)


def test_attention_outside_the_interface_is_named():
    config = transformers.BloomConfig(vocab_size=31, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"BloomForCausalLM.*'bloom'.*self_attention"):
        patch_model(transformers.BloomForCausalLM(config), outside="refuse")


def test_partly_outside_the_interface_needs_a_word():
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.SiglipVisionConfig(**vision, intermediate_size=16)
    model = transformers.SiglipVisionModel(config)
    with pytest.raises(ValueError, match=r"head\.attention.*exclude"):
        patch_model(model, outside="refuse")
    patch_model(model, exclude=r"head\.attention", outside="refuse")
    assert len(multimax_parameters(model)) == 2
    assert len(multimax_parameters(patch_model(unpatch_model(model)))) == 4


def test_an_attention_keyword_that_is_not_supported_is_named():
    class Attention(nn.Module):
        def forward(self, q, k, v, mask, **kwargs):
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
            return interface(self, q, k, v, mask, scaling=1.0, sparse_plan=None)

    model = make("GPT2LMHeadModel")
    model.transformer.h[1].attn = Attention()
    with pytest.raises(ValueError, match=r"h\.1\.attn.*sparse_plan"):
        patch_model(model)
    assert_untouched(model)


def test_unpatching_a_stock_model_is_refused():
    with pytest.raises(ValueError, match="not a MultiMax model"):
        unpatch_model(make("GPT2LMHeadModel"))


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "MarianMTModel", "ViTModel"])
def test_another_attention_implementation_is_refused_everywhere(name):
    model = patch_model(make(name))
    inner = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    for module in inner:
        for implementation in ("sdpa", "eager", {"": "sdpa"}):
            with pytest.raises(ValueError, match="unpatch_model"):
                module.set_attn_implementation(implementation)
    for config in configs_of(model):
        with pytest.raises(ValueError, match="unpatch_model"):
            config._attn_implementation = "sdpa"
    model.set_attn_implementation("multimax")
    batch = inputs_for(model)
    assert torch.equal(model(**batch)[0], patch_model(make(name))(**batch)[0])


def test_without_patched_attention_the_implementation_is_free():
    model = patch_model(make("GPT2LMHeadModel"), attention=False, output=True)
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_an_unpatched_model_told_to_use_multimax_raises():
    model = make("GPT2LMHeadModel")
    model.set_attn_implementation("multimax")
    with pytest.raises(ValueError, match="patch_model"):
        model(torch.tensor([[3, 4]]))


def test_attention_weights_are_returned():
    model = randomised(patch_model(make("T5ForConditionalGeneration")))
    batch = inputs_for(model)
    outputs = model(**batch, output_attentions=True)
    layers = (outputs.encoder_attentions, outputs.decoder_attentions, outputs.cross_attentions)
    assert [len(weights) for weights in layers] == [2, 2, 2]
    decoder = layers[1][0]
    torch.testing.assert_close(decoder.sum(-1), torch.ones_like(decoder.sum(-1)))
    assert decoder.triu(1).eq(0).all()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ViTForImageClassification", "MarianMTModel"])
def test_attention_weights_are_returned_when_the_config_says_so(name):
    model = randomised(patch_model(make(name)))
    batch = inputs_for(model)
    key = "encoder_attentions" if model.config.is_encoder_decoder else "attentions"
    asked = model(**batch, output_attentions=True)[key]
    for config in configs_of(model):
        config.output_attentions = True
    for one, other in zip(asked, model(**batch)[key]):
        assert torch.equal(one, other)


def test_continuous_batching_is_refused():
    model = patch_model(make("GPT2LMHeadModel"))
    with pytest.raises(ValueError, match="generate"):
        model.generate_batch([[3, 4, 5]])
    attention = model.transformer.h[0].attn
    q = torch.randn(1, 4, 3, 8)
    function = transformers.AttentionInterface()["multimax"]
    with pytest.raises(ValueError, match="generate"):
        function(attention, q, q, q, None, cache=object())


# -- helpers and copies ------------------------------------------------------------------------------------------------


def test_freeze_base():
    model = freeze_base(patch_model(make("GPT2LMHeadModel")))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(multimax_parameters(model))
    model(**inputs_for(model)).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in multimax_parameters(model).items() if "ts" in n
    )
    assert model.transformer.wte.weight.grad is None
    with pytest.raises(ValueError, match="patch_model"):
        freeze_base(make("GPT2LMHeadModel"))


def test_print_trainable_parameters(capsys):
    model = freeze_base(patch_model(make("GPT2LMHeadModel")))
    hf_multimax.print_trainable_parameters(model)
    everything = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: 16 || all params: {everything:,d} || trainable%: {1600 / everything:.4f} "
        "|| multimax params: 16\n"
    )


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("options", [{}, {"output": True}])
def test_copies_of_a_patched_model_work(copier, options):
    model = randomised(patch_model(make("T5ForConditionalGeneration"), **options))
    batch = inputs_for(model)
    other = copier(model)
    assert type(other) is type(model)
    assert other.config is not model.config
    assert torch.equal(logits(other, batch), logits(model, batch))
    with pytest.raises(ValueError, match="unpatch_model"):
        other.encoder.set_attn_implementation("sdpa")
    unpatch_model(other)
    assert is_patched(model)
    assert {c._attn_implementation for c in configs_of(other)} == {"eager"}
    assert torch.equal(logits(other, batch), logits(make("T5ForConditionalGeneration"), batch))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_a_patched_model_leaves_the_scalars_alone(cast):
    model = randomised(patch_model(make("GPT2LMHeadModel"), output=True))
    before = {name: value.clone() for name, value in multimax_parameters(model).items()}
    getattr(model, cast)()
    assert model.dtype == getattr(torch, {"half": "float16"}.get(cast, cast))
    assert all(torch.equal(value, before[name]) for name, value in multimax_parameters(model).items())
    assert logits(model, inputs_for(model)).isfinite().all()


def test_a_model_made_from_a_patched_models_config_leaves_that_model_alone():
    model = randomised(patch_model(make("GPT2LMHeadModel")))
    batch = inputs_for(model)
    expected = logits(model, batch)
    other = transformers.AutoModelForCausalLM.from_config(model.config)
    assert other.config is not model.config
    assert model.config._attn_implementation == "multimax"
    assert torch.equal(logits(model, batch), expected)


def test_a_layer_that_does_not_say_whether_it_is_causal_is_not():
    config = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.ClapTextConfig(**config, intermediate_size=16, max_position_embeddings=32)
    model = transformers.ClapTextModel._from_config(settings, attn_implementation="eager").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(ids)[0]
        patch_model(model)
        torch.testing.assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["eager", "tiled", "auto"])
@pytest.mark.parametrize(
    "options", [{"output": True}, {"normalizer": "rsoftmax", "normalizer_kwargs": {"learn": True}}]
)
def test_offloaded_parameters_are_brought_back(options, which):
    model = patch_model(make("GPT2LMHeadModel"), **options)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    batch = inputs_for(model)
    with torch.no_grad(), hf_multimax.backend(which):
        expected = model(**batch).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        assert all(p.is_meta for p in multimax_parameters(model).values())
        torch.testing.assert_close(model(**batch).logits, expected)


def test_patching_under_another_default_device():
    model = make("GPT2LMHeadModel")
    with torch.device("meta"):
        patch_model(model)
    assert {p.device.type for p in multimax_parameters(model).values()} == {"cpu"}


@pytest.mark.parametrize("helper", [freeze_base, multimax_parameters])
def test_helpers_refuse_what_is_no_model(helper):
    with pytest.raises(TypeError, match="NoneType"):
        helper(None)
