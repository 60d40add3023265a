"""Modulating the output logits: the stock loss at first, the definition's afterwards, and what is refused."""

import pytest
import reference
import torch
import transformers
from models import ALL, inputs_for, make
from tolerances import relative_error
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hf_multimax import backend, multimax_parameters, patch_model

SUPPORTED = (
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "SiglipForImageClassification",
    "T5ForConditionalGeneration",
    "T5ForSequenceClassification",
    "T5ForTokenClassification",
    "MT5ForConditionalGeneration",
    "MT5ForSequenceClassification",
    "MT5ForTokenClassification",
    "MarianMTModel",
    "MarianForCausalLM",
)


def stir(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.multimax_output.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", SUPPORTED)
def test_it_starts_as_the_stock_model(name):
    stock, model = make(name), patch_model(make(name), output=True)
    batch = inputs_for(stock)
    with backend("eager"):
        for _ in range(2):  # the first labelled call is checked against stock, later ones skip its loss
            ours, theirs = model(**batch), stock(**batch)
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
            assert set(ours) - {"past_key_values"} == set(theirs) - {"past_key_values"}


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_and_loss_are_those_of_the_definition(name):
    stock, model = make(name), stir(patch_model(make(name), output=True))
    batch = inputs_for(stock)
    logits = reference.sigma(stock(**batch).logits.double(), *(p.double() for p in model.multimax_output.parameters()))
    labels = batch["labels"]
    if name == "GPT2LMHeadModel":
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    else:
        flat = logits.reshape(-1, logits.shape[-1]), labels.flatten()
    for _ in range(2):
        outputs = model(**batch)
        torch.testing.assert_close(outputs.logits.double(), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs.loss.double(), cross_entropy(*flat), rtol=1e-5, atol=1e-5)
    outputs.loss.backward()
    gradients = [p.grad for p in multimax_parameters(model).values() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert model.multimax_output.ts.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "MarianMTModel"])
@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=type)
def test_num_items_in_batch_divides_the_sum(name, items):
    model = stir(patch_model(make(name), output=True))
    batch = inputs_for(model)
    labels = batch["labels"][:, 1:] if name == "GPT2LMHeadModel" else batch["labels"]
    kept = labels.ne(-100).sum()
    for _ in range(2):
        mean, scaled = model(**batch).loss, model(**batch, num_items_in_batch=items).loss
        torch.testing.assert_close(scaled * 7, mean * kept)


def test_marians_bias_is_added_before_sigma():
    model = stir(patch_model(make("MarianMTModel"), output=True))
    batch = inputs_for(model)
    plain = make("MarianMTModel")
    bias = torch.randn_like(plain.final_logits_bias)
    for twin in (model, plain):
        twin.final_logits_bias.copy_(bias)
    expected = model.multimax_output.modulate(plain(**batch).logits)
    with backend("eager"):
        assert torch.equal(model(**batch).logits, expected)


def test_soft_capped_logits_are_modulated_after_the_cap():
    config = transformers.Gemma2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        attn_logit_softcapping=0.3,
        query_pre_attn_scalar=8,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        stock = model(ids).logits
        with backend("eager"):
            patch_model(model, output=True)
            assert torch.equal(model(ids).logits, stock)
            stir(model)
            assert torch.equal(model(ids).logits, model.multimax_output.modulate(stock))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_tuples(name):
    model = stir(patch_model(make(name), output=True))
    batch = inputs_for(model)
    outputs = model(**batch, use_cache=False)
    for result in (model(**batch, use_cache=False, return_dict=False), outputs.to_tuple()):
        assert torch.equal(result[0], outputs.loss)
        assert torch.equal(result[1], outputs.logits)


def test_positional_arguments():
    model = stir(patch_model(make("GPT2LMHeadModel"), output=True))
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model(ids).logits, model(input_ids=ids).logits)


def test_bfloat16_loss_is_that_of_unrounded_modulated_logits():
    model = stir(patch_model(make("GPT2LMHeadModel"), output=True)).bfloat16()
    batch = inputs_for(model)
    stock = make("GPT2LMHeadModel").bfloat16()
    with backend("eager"):
        outputs = model(**batch)
        logits = stock(**batch).logits
    modulated = model.multimax_output.modulate(logits.float())
    expected = cross_entropy(modulated[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-2, atol=1e-2)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ALL) - set(SUPPORTED)))
def test_models_without_one_tensor_of_logits_are_refused(name):
    model = make(name)
    with pytest.raises(ValueError, match=f"output=True.*{name}"):
        patch_model(model, output=True)
    assert type(model) is getattr(transformers, name)


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("GPT2ForSequenceClassification", {"problem_type": "multi_label_classification"}, "multi_label"),
        ("GPT2ForSequenceClassification", {"num_labels": 1}, "regression"),
        ("ViTForImageClassification", {"problem_type": "regression"}, "regression"),
    ],
)
def test_heads_without_a_cross_entropy_are_refused(name, config, text):
    with pytest.raises(ValueError, match=text):
        patch_model(make(name, **config), output=True)


def test_labels_that_are_no_classes_are_refused():
    model = patch_model(make("GPT2ForSequenceClassification"), output=True)
    batch = inputs_for(model)
    batch["labels"] = torch.rand(2, 3)
    with pytest.raises(ValueError, match="float32"):
        model(**batch)


def test_a_loss_with_something_added_is_refused():
    class WithPenalty(transformers.GPT2LMHeadModel):
        def forward(self, input_ids=None, labels=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            if outputs.loss is not None:
                outputs.loss = outputs.loss + 1.0
            return outputs

    model = WithPenalty(make("GPT2LMHeadModel").config)
    patch_model(model, output=True)
    with pytest.raises(ValueError, match="WithPenalty"):
        model(**inputs_for(make("GPT2LMHeadModel")))


def test_only_the_output():
    stock, model = make("GPT2LMHeadModel"), patch_model(make("GPT2LMHeadModel"), attention=False, output=True)
    assert list(multimax_parameters(model)) == ["multimax_output.ranges", "multimax_output.ts"]
    batch = inputs_for(stock)
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert model.config._attn_implementation == "eager"


# -- the fused loss ----------------------------------------------------------------------------------------------------

FUSED = (
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "MarianMTModel",
    "MarianForCausalLM",
)


def losses_and_gradients(model, batch, fused):
    model.fused_output_loss = fused
    results = []
    for _ in range(2):
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        results.append((outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    return results


@pytest.mark.parametrize("options", [{}, {"affine": True}], ids=str)
@pytest.mark.parametrize("items", [None, 9])
@pytest.mark.parametrize("name", FUSED)
def test_in_training_the_loss_comes_without_logits(name, items, options):
    model = stir(patch_model(make(name), output=True, **options)).train()
    batch = {**inputs_for(model), **({} if items is None else {"num_items_in_batch": items})}
    (plain, expected), _ = losses_and_gradients(model, batch, fused=False)
    assert plain.logits is not None
    for outputs, gradients in losses_and_gradients(model, batch, fused=True):
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, plain.loss, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for key, value in expected.items():
            assert relative_error(gradients[key], value) < 1e-3, key
    with torch.no_grad():
        assert model(**batch).logits is not None
    assert model.eval()(**batch).logits is not None
    if name == "GPT2LMHeadModel":
        del batch["labels"]
        assert model.train()(**batch).logits is not None


def test_the_fused_loss_includes_marians_bias_and_a_soft_cap():
    marian = stir(patch_model(make("MarianMTModel"), output=True)).train()
    marian.final_logits_bias.copy_(torch.randn_like(marian.final_logits_bias))
    config = transformers.Gemma2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        query_pre_attn_scalar=8,
    )
    gemma = stir(patch_model(transformers.Gemma2ForCausalLM(config), output=True)).train()
    ids = torch.arange(3, 12)[None]
    for model, batch in ((marian, inputs_for(marian)), (gemma, {"input_ids": ids, "labels": ids})):
        (plain, _), _ = losses_and_gradients(model, batch, fused=False)
        for outputs, _ in losses_and_gradients(model, batch, fused=True):
            assert outputs.logits is None
            torch.testing.assert_close(outputs.loss, plain.loss, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_not_all_that_makes_the_logits_is_not_fused():
    class Scaled(transformers.GPT2LMHeadModel):
        def forward(self, input_ids=None, labels=None, **kwargs):
            outputs = self.transformer(input_ids)
            logits = 0.5 * self.lm_head(outputs[0])
            loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
            return transformers.modeling_outputs.CausalLMOutputWithCrossAttentions(loss=loss, logits=logits)

    model = stir(patch_model(Scaled(make("GPT2LMHeadModel").config), output=True)).train()
    ids = torch.arange(3, 12)[None]
    for _ in range(2):
        outputs = model(ids, labels=ids)
        assert outputs.logits is not None
        torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits[0], ids[0]))


def test_an_adapted_head_is_not_fused():
    from peft import LoraConfig, get_peft_model

    model = patch_model(make("GPT2LMHeadModel"), output=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"])).train()
    assert adapted(**inputs_for(model)).logits is not None
