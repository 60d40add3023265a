"""Converted checkpoints compute what the authors' models do, and come back with the same bits."""

import argparse
import copy

import authors
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tolerances import relative_error
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSeq2SeqLM

from hf_multimax import is_patched, multimax_parameters, patch_model, unpatch_model
from hf_multimax.convert import from_authors, to_authors

PAD, EOS, LENGTH = authors.PAD, 2, 12

VIT = {"layout": "timm-vit", "num_heads": 4}
LM = {"layout": "fairseq-lm", "num_heads": 4}
SINUSOIDAL_LM = {**LM, "max_positions": LENGTH}
TRANSLATION = {"layout": "fairseq-translation", "num_heads": 4, "max_positions": LENGTH}

#: reference model, its options, what from_authors must be told, the class that it becomes
CASES = {
    "vit": (authors.ViT, {}, VIT, "SiglipForImageClassification"),
    "vit-bias": (
        authors.ViT,
        {"qkv_bias": True, "eps": 1e-5},
        {**VIT, "layer_norm_eps": 1e-5},
        "SiglipForImageClassification",
    ),
    "lm": (authors.LanguageModel, {}, SINUSOIDAL_LM, "BioGptForCausalLM"),
    "lm-learned": (authors.LanguageModel, {"learned": LENGTH, "tied": False}, LM, "BioGptForCausalLM"),
    "lm-unscaled": (
        authors.LanguageModel,
        {"scaled": False},
        {**SINUSOIDAL_LM, "scale_embedding": False},
        "BioGptForCausalLM",
    ),
    "pre-norm": (
        authors.Translator,
        {"pre_norm": True, "embeddings": "shared"},
        TRANSLATION,
        "M2M100ForConditionalGeneration",
    ),
    "post-norm": (authors.Translator, {}, TRANSLATION, "MarianMTModel"),
    "post-norm-shared": (authors.Translator, {"embeddings": "shared"}, TRANSLATION, "MarianMTModel"),
    "post-norm-separate": (authors.Translator, {"embeddings": "separate"}, TRANSLATION, "MarianMTModel"),
}
ONE_EACH = ("vit", "lm", "pre-norm", "post-norm")


def reference(case: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    cls, options, _, _ = CASES[case]
    return authors.randomize(cls(**options))


def converted(case: str, checkpoint: dict | None = None):
    return from_authors(reference(case).state_dict() if checkpoint is None else checkpoint, **CASES[case][2])


def tokens(vocabulary: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """Random tokens, padded on the right."""
    ids = torch.randint(4, vocabulary, (len(lengths), max(lengths)))
    return ids.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], PAD)


def logits(case: str, theirs: torch.nn.Module, ours) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both models for the same inputs, where the target is no padding."""
    torch.manual_seed(1)
    dtype = next(theirs.parameters()).dtype
    with torch.no_grad():
        if case.startswith("vit"):
            images = torch.randn(3, 2, 16, 16, dtype=dtype)
            return theirs(images), ours(images).logits
        target = tokens(23, (9, 5))
        inputs = {"input_ids": target, "attention_mask": target != PAD}
        if case.startswith("lm"):
            expected = theirs(target)
        else:
            source = tokens(19, (7, 4))
            expected = theirs(source, target)
            inputs = {f"decoder_{name}": value for name, value in inputs.items()}
            inputs |= {"input_ids": source, "attention_mask": source != PAD}
        return expected[target != PAD], ours(**inputs).logits[target != PAD]


def assert_equal(case: str, theirs: torch.nn.Module, ours, tolerance: float = 1e-5) -> None:
    expected, actual = logits(case, theirs, ours)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert relative_error(actual, expected) <= tolerance


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        scalar = key.rpartition(".")[2] in ("ranges", "ts")
        torch.testing.assert_close(actual[key], value.float() if scalar else value, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_reference(case):
    theirs, ours = reference(case), converted(case)
    assert type(ours).stock_class.__name__ == CASES[case][3] and not ours.training
    assert_equal(case, theirs, ours)


@pytest.mark.parametrize("case", CASES)
def test_outputs_in_double_precision(case):
    theirs = reference(case).double()
    # fairseq computes its sinusoids in float32, whatever the model's type
    exact = case.startswith("vit") or case == "lm-learned"
    assert_equal(case, theirs, converted(case, theirs.state_dict()), 1e-12 if exact else 1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_with_the_same_bits(case):
    checkpoint = reference(case).state_dict()
    assert_same_bits(to_authors(converted(case), CASES[case][2]["layout"]), checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_a_trained_model_goes_back_to_the_reference(case):
    ours = converted(case)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    cls, options, _, _ = CASES[case]
    theirs = cls(**({"qkv_bias": True} if case == "vit" else options)).eval()
    theirs.load_state_dict(to_authors(ours, CASES[case][2]["layout"]))
    assert_equal(case, theirs, ours)


@pytest.mark.parametrize("case", ONE_EACH)
def test_every_modulator_matters(case):
    ours = converted(case)
    before = logits(case, reference(case), ours)[1]
    for name, parameter in multimax_parameters(ours).items():
        value = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(value.flip(0))  # no wrong order goes unseen
        assert relative_error(logits(case, reference(case), ours)[1], before) > 1e-4, name
        with torch.no_grad():
            parameter.copy_(value)


@pytest.mark.parametrize("order", [1, 3])
def test_other_orders(order):
    torch.manual_seed(0)
    theirs = authors.randomize(authors.ViT(order=order))
    ours = from_authors(theirs.state_dict(), **VIT)
    assert ours.config.multimax["order"] == order
    assert_equal("vit", theirs, ours)
    assert_same_bits(to_authors(ours, "timm-vit"), theirs.state_dict())


@pytest.mark.parametrize("case", ONE_EACH)
@pytest.mark.parametrize("kept", ["attention", "output", "one layer"])
def test_modulators_in_some_places_only(case, kept):
    theirs = reference(case)
    checkpoint = theirs.state_dict()
    output = ("ranges", "ts", "decoder.ranges", "decoder.ts")
    for key in [key for key in checkpoint if key.rpartition(".")[2] in ("ranges", "ts")]:
        keep = {"attention": key not in output, "output": key in output, "one layer": ".1." in key and "decoder" in key}
        if case == "vit":
            keep["one layer"] = ".1." in key
        if not keep[kept]:
            checkpoint.pop(key)
            theirs.get_parameter(key).data.zero_()  # softmax
    ours = converted(case, checkpoint)
    assert ours.config.multimax["output"] is (kept == "output")
    assert_equal(case, theirs, ours)
    assert_same_bits(to_authors(ours, CASES[case][2]["layout"]), checkpoint)


@pytest.mark.parametrize("case", ONE_EACH)
def test_half_precision_keeps_its_bits_and_float32_scalars(case):
    checkpoint = reference(case).bfloat16().state_dict()
    ours = converted(case, checkpoint)
    assert ours.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in multimax_parameters(ours).values()} == {torch.float32}
    assert_same_bits(to_authors(ours, CASES[case][2]["layout"]), checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_is_saved_and_loaded(case, tmp_path):
    ours = converted(case)
    ours.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if "norm" in case else AutoModelForCausalLM
    loaded = (AutoModelForImageClassification if "vit" in case else auto).from_pretrained(tmp_path)
    assert_equal(case, reference(case), loaded)
    assert_same_bits(to_authors(loaded, CASES[case][2]["layout"]), reference(case).state_dict())


@pytest.mark.parametrize("case", [*ONE_EACH[:3], "post-norm"])
def test_a_loaded_model_is_saved_and_loaded_again(case, tmp_path):
    ours = converted(case)
    cls = type(ours)
    ours.save_pretrained(tmp_path / "first")
    cls.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_equal(case, reference(case), cls.from_pretrained(tmp_path / "second"))


@pytest.mark.parametrize("case", ["lm", "lm-learned", "pre-norm", "post-norm"])
def test_generation_with_a_cache_follows_the_reference(case):
    theirs, ours = reference(case), converted(case)
    torch.manual_seed(2)
    source = tokens(19, (6, 6) if case.startswith("lm") else (6, 4))
    expected = source if case.startswith("lm") else torch.full((2, 1), EOS)
    for _ in range(5):
        with torch.no_grad():
            scores = theirs(expected) if case.startswith("lm") else theirs(source, expected)
        scores[:, -1, EOS] = -torch.inf
        expected = torch.cat([expected, scores[:, -1].argmax(-1, keepdim=True)], 1)
    generated = ours.generate(source, attention_mask=source != PAD, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_converted_model_trains_and_its_checkpoint_stays_as_it_was(case):
    checkpoint = reference(case).state_dict()
    before = copy.deepcopy(checkpoint)
    ours = converted(case, checkpoint).train()
    if case == "vit":
        batch = {"pixel_values": torch.randn(3, 2, 16, 16), "labels": torch.tensor([0, 2, 4])}
    else:
        batch = {"input_ids": tokens(19, (9, 9)), "labels": tokens(19, (9, 9))}
    ours(**batch).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in multimax_parameters(ours).values())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert_same_bits(checkpoint, before)


def test_sinusoidal_positions_stay_what_they_are_and_learned_ones_are_trained():
    assert not converted("lm").biogpt.embed_positions.weight.requires_grad
    assert converted("lm-learned").biogpt.embed_positions.weight.requires_grad


def test_positions_that_were_trained_come_back_as_learned_ones():
    ours = converted("lm")
    with torch.no_grad():
        ours.biogpt.embed_positions.weight[3:].add_(0.1)
    checkpoint = to_authors(ours, "fairseq-lm")
    assert "decoder.embed_positions._float_tensor" not in checkpoint
    theirs = authors.LanguageModel(learned=LENGTH).eval()
    theirs.load_state_dict(checkpoint)
    assert_equal("lm", theirs, ours)


def test_constants_and_a_tied_output_layer_may_be_left_out():
    checkpoint = reference("post-norm").state_dict()
    for key in ("encoder.version", "decoder.version", "decoder.output_projection.weight"):
        del checkpoint[key]
    for stack in ("encoder", "decoder"):
        del checkpoint[f"{stack}.embed_positions._float_tensor"]
    ours = converted("post-norm", checkpoint)
    assert_same_bits(to_authors(ours, "fairseq-translation"), reference("post-norm").state_dict())


def test_encoder_and_decoder_may_differ_in_their_heads():
    theirs = reference("post-norm")
    for layer in theirs.decoder.layers:
        layer.self_attn.heads = layer.encoder_attn.heads = 2
    ours = from_authors(theirs.state_dict(), **{**TRANSLATION, "num_heads": (4, 2)})
    assert_equal("post-norm", theirs, ours)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_safetensors_file(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(reference("vit").state_dict(), path)
    assert_equal("vit", reference("vit"), from_authors(path, **VIT))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_file_of_tensors(tmp_path, wrapped):
    path, checkpoint = tmp_path / "checkpoint_best.pt", reference("vit").state_dict()
    torch.save({"model": checkpoint, "args": argparse.Namespace(lr=0.1), "epoch": 3} if wrapped else checkpoint, path)
    assert_equal("vit", reference("vit"), from_authors(str(path), **VIT))


class Payload:
    ran = False

    def __reduce__(self):
        return (Payload.run, ())

    @staticmethod
    def run():
        Payload.ran = True


def test_code_in_a_file_does_not_run(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": reference("vit").state_dict(), "cfg": Payload()}, path)
    with pytest.raises(
        ValueError, match=r"checkpoint.pt cannot be read without running code(.|\n)*save the weights alone"
    ):
        from_authors(path, **VIT)
    assert not Payload.ran


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.pt is no file"):
        from_authors(tmp_path / "nowhere.pt", **VIT)
    cut = tmp_path / "cut.safetensors"
    save_file(reference("vit").state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read"):
        from_authors(cut, **VIT)
    cut = tmp_path / "cut.pt"
    torch.save(reference("vit").state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.pt cannot be read: "):
        from_authors(cut, **VIT)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text.pt cannot be read"):
        from_authors(tmp_path / "text.pt", **VIT)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"tensor.pt holds no state dict but Tensor"):
        from_authors(tmp_path / "tensor.pt", **VIT)


# -- what is refused ---------------------------------------------------------------------------------------------------


def drop(key):
    return lambda weights: weights.pop(key)


def put(key, *shape):
    return lambda weights: weights.update({key: torch.ones(shape)})


REFUSED = [
    ("vit", put("fc_norm.weight", 32), r"'fc_norm.weight': the norm comes after the pooling"),
    ("vit", put("cls_token", 1, 1, 32), r"'cls_token': .* patch tokens only"),
    ("vit", put("blocks.1.ls1.gamma", 32), r"'blocks.1.ls1.gamma': SigLIP has no layer scale"),
    ("vit", put("blocks.0.attn.q_norm.weight", 8), r"'blocks.0.attn.q_norm.weight': SigLIP does not normalise"),
    ("vit", put("head_dist.weight", 5, 32), r"no place for: 'head_dist.weight'"),
    ("vit", drop("norm.bias"), r"no 'norm.bias', which this layout needs"),
    ("vit", drop("pos_embed"), r"no 'pos_embed'"),
    ("vit", drop("blocks.1.attn.ts"), r"no 'blocks.1.attn.ts'"),
    ("vit", drop("blocks.1.attn.qkv.weight"), r"no 'blocks.1.attn.qkv.weight'"),
    ("vit", put("blocks.3.norm1.weight", 32), r"no 'blocks.2.attn.qkv.weight'"),
    ("vit", put("blocks.1.attn.qkv.weight", 64, 32), r"'blocks.1.attn.qkv.weight' has the shape \[64, 32\]"),
    ("vit", put("blocks.1.attn.qkv.bias", 64), r"'blocks.1.attn.qkv.bias' has the shape \[64\]"),
    ("vit", put("blocks.1.norm1.weight", 31), r"'blocks.1.norm1.weight' has the shape \[31\] instead of \[32\]"),
    ("vit", put("patch_embed.proj.weight", 32, 2, 4, 5), r"square .*patches of 4 x 5"),
    ("vit", put("pos_embed", 1, 15, 32), r"square .*'pos_embed' 15 of them"),
    ("vit", put("pos_embed", 15, 32), r"'pos_embed' must have 3 dimensions, got shape \[15, 32\]"),
    ("vit", put("blocks.1.attn.ranges", 3), r"'blocks.1.attn.ranges' must have the shape \[2 \* order\].*got \[3\]"),
    ("vit", put("ts", 6), r"'ts' must have the shape .*the same for all.*got \[6\]"),
    ("vit", put("blocks.0.attn.ts", 4, 4), r"'blocks.0.attn.ts' must have .*got \[4, 4\]"),
    ("vit", lambda w: w.update(head=w["head.bias"].half()), r"no place for: 'head'"),
    ("vit", lambda w: w.update({"head.bias": w["head.bias"].half()}), r"several types: .*'head.bias' is torch.float16"),
    ("lm", put("decoder.adaptive_softmax.head.word_proj.weight", 9, 32), r"adaptive_softmax.*no single output layer"),
    ("lm", put("decoder.embed_tokens.embeddings.0.0.weight", 9, 32), r"embeddings.0.0.weight': adaptive inputs"),
    ("lm", put("decoder.layernorm_embedding.weight", 32), r"layernorm_embedding.weight'.* no norm after its embedding"),
    ("lm", put("decoder.layers.0.self_attn.bias_k", 1, 1, 32), r"bias_k'.*no extra key and value"),
    ("lm", put("decoder.embed_out", 23, 32), r"'decoder.embed_out': an old name"),
    ("lm", drop("decoder.layer_norm.weight"), r"no 'decoder.layer_norm.weight': .*norms after the layers"),
    ("lm", drop("decoder.version"), r"'decoder.version' is missing or below 3"),
    ("lm", lambda w: w["decoder.version"].fill_(2), r"'decoder.version' is missing or below 3"),
    ("lm", put("decoder.embed_positions.weight", 14, 32), r"'decoder.embed_positions.weight' holds learned .*leave"),
    ("lm", put("decoder.layers.0.encoder_attn.ts", 4), r"no place for: 'decoder.layers.0.encoder_attn.ts'"),
    ("lm-learned", drop("decoder.embed_positions.weight"), r"sinusoidal: give their number as max_positions"),
    ("pre-norm", drop("encoder.layer_norm.weight"), r"only one of 'encoder.layer_norm.weight' and 'decoder.layer"),
    ("pre-norm", put("encoder.embed_tokens.weight", 23, 32), r"'encoder.embed_tokens.weight', .* differ: M2M100"),
    ("pre-norm", drop("decoder.layers.0.encoder_attn.k_proj.bias"), r"no 'decoder.layers.0.encoder_attn.k_proj.bias'"),
    ("post-norm", put("encoder.embed_positions.weight", 14, 32), r"encoder.embed_positions.weight'.* sinusoidal"),
    ("post-norm", drop("decoder.layers.1.final_layer_norm.bias"), r"no 'decoder.layers.1.final_layer_norm.bias'"),
]


@pytest.mark.parametrize(
    ("case", "change", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_checkpoint_that_does_not_fit_is_refused(case, change, message):
    checkpoint = reference(case).state_dict()
    change(checkpoint)
    with pytest.raises(ValueError, match=message):
        converted(case, checkpoint)


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_softmax_checkpoint_is_refused(case):
    checkpoint = reference(case).state_dict()
    softmax = {key: value for key, value in checkpoint.items() if key.rpartition(".")[2] not in ("ranges", "ts")}
    with pytest.raises(ValueError, match="has no modulator"):
        converted(case, softmax)


def test_wrong_arguments():
    checkpoint = reference("vit").state_dict()
    with pytest.raises(ValueError, match="unknown layout 'timm': it is one of timm-vit, fairseq-lm"):
        from_authors(checkpoint, "timm", num_heads=4)
    with pytest.raises(TypeError, match="num_heads"):
        from_authors(checkpoint, "timm-vit")
    with pytest.raises(TypeError, match="max_positions"):
        from_authors(checkpoint, **VIT, max_positions=3)
    with pytest.raises(ValueError, match="num_heads must be an integer >= 1, got 0"):
        from_authors(checkpoint, "timm-vit", num_heads=0)
    with pytest.raises(ValueError, match="activation='gelu_fast_one' is none of Transformers' activations: .*relu"):
        from_authors(checkpoint, **VIT, activation="gelu_fast_one")
    with pytest.raises(ValueError, match="max_positions must be an integer >= 1, got -1"):
        from_authors(reference("lm").state_dict(), **{**SINUSOIDAL_LM, "max_positions": -1})
    with pytest.raises(ValueError, match="decoder_heads must be an integer >= 1, got 0"):
        from_authors(reference("post-norm").state_dict(), **{**TRANSLATION, "num_heads": (4, 0)})
    with pytest.raises(TypeError, match=r"'epoch' of the checkpoint is no tensor but int"):
        from_authors({**checkpoint, "epoch": 3}, **VIT)
    with pytest.raises(ValueError, match="no layer: no key begins with 'blocks.0.'"):
        from_authors({}, **VIT)


def test_models_that_a_layout_cannot_hold():
    with pytest.raises(ValueError, match="is not a MultiMax model"):
        to_authors(transformers.GPT2LMHeadModel(TINY_GPT2), "lm-head")
    with pytest.raises(ValueError, match="unknown layout 'vit'"):
        to_authors(converted("vit"), "vit")
    with pytest.raises(ValueError, match="'fairseq-lm' is that of BioGptForCausalLM, not of SiglipForImageClass"):
        to_authors(converted("vit"), "fairseq-lm")
    with pytest.raises(ValueError, match="no causal language model for a SiglipConfig"):
        to_authors(converted("vit"), "lm-head")
    with pytest.raises(ValueError, match="'lm-head' is that of causal language models, not of GPT2Model"):
        to_authors(patch_model(transformers.GPT2Model(TINY_GPT2)), "lm-head")
    for options, message in [
        ({"normalizer": "sparsemax"}, "normalizer='sparsemax'"),
        ({"per_head": True}, "per_head=True"),
        ({"affine": True}, "affine=True"),
    ]:
        with pytest.raises(ValueError, match=f"no place for {message}"):
            to_authors(patch_model(transformers.GPT2LMHeadModel(TINY_GPT2), **options), "lm-head")


def test_parameters_that_a_layout_has_no_place_for():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.SiglipConfig(vision_config={**vision, "image_size": 16, "patch_size": 4}, num_labels=3)
    model = patch_model(transformers.SiglipForImageClassification(config))
    with pytest.raises(ValueError, match=r"no place for: 'vision_model.head.attention.in_proj_bias'"):
        to_authors(model, "timm-vit")
    ours = converted("post-norm")
    ours.final_logits_bias[0, 3] = 1.0
    with pytest.raises(ValueError, match="'final_logits_bias' is not zero"):
        to_authors(ours, "fairseq-translation")
    ours = converted("post-norm")
    ours.model.encoder.embed_positions.weight.data.copy_(ours.model.encoder.embed_positions.create_weight())
    with pytest.raises(ValueError, match=r"'model.encoder.embed_positions.weight' does not hold fairseq's"):
        to_authors(ours, "fairseq-translation")


# -- any causal language model -----------------------------------------------------------------------------------------

_TOKENS = {"vocab_size": 23, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY_GPT2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **_TOKENS)
TINY_LLAMA = transformers.LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    **_TOKENS,
)


def stock(config):
    """A model, and its weights with an output modulator."""
    torch.manual_seed(0)
    model = authors.randomize(AutoModelForCausalLM.from_config(config))
    scalars = {"multimax_ranges": 0.5 * torch.randn(4), "multimax_ts": 0.2 * torch.randn(4)}
    return model, {key: value.clone() for key, value in model.state_dict().items()}, scalars


@pytest.mark.parametrize("prefix", ["lm_head.", "model.lm_head.", ""])
@pytest.mark.parametrize("config", [TINY_GPT2, TINY_LLAMA], ids=["gpt2", "llama"])
def test_an_output_modulator_beside_a_stock_model(config, prefix):
    model, weights, scalars = stock(config)
    ours = from_authors(
        {**weights, **{prefix + key: value for key, value in scalars.items()}}, "lm-head", config=config
    )
    ids = tokens(23, (9, 9))
    with torch.no_grad():
        expected, actual = authors.sigma(model(ids).logits, *scalars.values()), ours(ids).logits
    assert relative_error(actual, expected) <= 1e-6
    assert not ours.config.multimax["attention"] and not is_patched(model) and "multimax" not in vars(config)
    assert_same_bits(
        to_authors(ours, "lm-head"), {**weights, **{f"lm_head.{key}": value for key, value in scalars.items()}}
    )


def test_a_tied_head_may_be_left_out():
    _, weights, scalars = stock(TINY_GPT2)
    del weights["lm_head.weight"]
    ours = from_authors({**weights, **scalars}, "lm-head", config=TINY_GPT2)
    assert ours.lm_head.weight is ours.transformer.wte.weight


def test_a_head_that_is_not_tied_after_all_is_kept(tmp_path):
    _, weights, scalars = stock(TINY_GPT2)
    weights["lm_head.weight"] += 1
    ours = from_authors({**weights, **scalars}, "lm-head", config=TINY_GPT2)
    ours.save_pretrained(tmp_path)
    for model in (ours, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
        assert torch.equal(model.transformer.wte.weight, weights["transformer.wte.weight"])


@pytest.mark.parametrize("kept", ["all", "attention", "one layer"])
def test_modulators_in_attention_beside_a_stock_model(kept):
    theirs, model = reference("lm"), converted("lm")
    weights = to_authors(model, "lm-head")
    assert "output_projection.multimax_ts" in weights and "biogpt.layers.0.self_attn.multimax_ts" in weights
    dropped = {"all": (), "attention": ("decoder.",), "one layer": ("decoder.", "decoder.layers.0.self_attn.")}[kept]
    for prefix in dropped:
        owner = prefix.replace("decoder.", "biogpt.", 1) if "layers" in prefix else "output_projection."
        for scalar in ("ranges", "ts"):
            del weights[f"{owner}multimax_{scalar}"]
            theirs.get_parameter(prefix + scalar).data.zero_()  # softmax
    again = from_authors(weights, "lm-head", config=unpatch_model(model).config)
    assert again.config.multimax["output"] is (kept == "all")
    assert_equal("lm", theirs, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("multimax_ts"), r"no 'multimax_ts'"),
        (lambda w: [w.pop(key) for key in ("multimax_ranges", "multimax_ts")], r"no modulator, such as 'lm_head.multi"),
        (put("lm_head.multimax_ranges", 4), r"both '(lm_head.)?multimax_ranges' and '(lm_head.)?multimax_ranges'"),
        (put("transformer.h.0.mlp.multimax_ts", 4), r"'transformer.h.0.mlp.multimax_ts': .* nor one of its attention"),
        (put("transformer.h.0.attn.multimax_ts", 4), r"no 'transformer.h.0.attn.multimax_ranges'"),
        (put("extra.weight", 4), r"no place for: 'extra.weight'"),
        (drop("transformer.h.1.mlp.c_fc.bias"), r"lacks keys: 'transformer.h.1.mlp.c_fc.bias'"),
        (put("transformer.h.1.mlp.c_fc.bias", 7), r"'transformer.h.1.mlp.c_fc.bias' has the shape \[7\] instead of"),
    ],
)
def test_what_a_stock_model_does_not_fit(change, message):
    _, weights, scalars = stock(TINY_GPT2)
    weights |= scalars
    change(weights)
    with pytest.raises(ValueError, match=message):
        from_authors(weights, "lm-head", config=TINY_GPT2)


def test_a_config_of_no_language_model():
    with pytest.raises(ValueError, match="no causal language model for a ViTConfig"):
        from_authors({}, "lm-head", config=transformers.ViTConfig())
