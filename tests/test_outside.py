"""Attention outside Transformers' AttentionInterface: its softmax is answered, or the layer is refused by name."""

import copy
import pickle

import pytest
import torch
import transformers
from test_architectures import randomised
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from zoo import OUTSIDE, zoo_inputs, zoo_model

import hf_multimax.diagnostics
from hf_multimax import MultiMax, backend, multimax_parameters, patch_model, unpatch_model
from hf_multimax.functional import modulate
from hf_multimax.models.discovery import find_layers
from hf_multimax.models.outside import outside_class
from tests.tolerances import RELATIVE, relative_error

CAUSAL = [name for name in OUTSIDE if name.endswith("CausalLM")]


def run(model, batch):
    with torch.no_grad():
        return model(**batch)


def logits(model, batch):
    return run(model, batch).logits


@pytest.mark.parametrize("name", OUTSIDE)
def test_identity_effect_gradients_and_the_way_back(name, tmp_path):
    model, batch = zoo_model(name), zoo_inputs(name, padded=False)
    stock, layers = logits(model, batch), find_layers(model).outside
    patch_model(model)
    assert len(multimax_parameters(model)) == 2 * len(layers) >= 4
    assert type(next(iter(layers.values()))).__name__ == type(next(iter(layers.values()))).stock_class.__name__
    assert torch.equal(logits(model, batch), stock)
    with backend("eager"):
        assert torch.equal(logits(model, batch), stock)
    changed = logits(randomised(model, 0.3), batch)
    assert relative_error(changed, stock) > 1e-5
    model.train()(**batch).loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in multimax_parameters(model).values()
    )
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, batch), changed)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, name).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), changed)
    unpatch_model(model)
    assert torch.equal(logits(model, batch), stock)
    assert [type(m) for m in model.modules()] == [type(m) for m in zoo_model(name).modules()]


@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_the_future_and_caches_agree(name):
    model, batch = randomised(patch_model(zoo_model(name)), 0.3), zoo_inputs(name, padded=False)
    ids = batch["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 5) % 50 + 3
    torch.testing.assert_close(logits(model, {"input_ids": ids})[:, :-1], logits(model, {"input_ids": other})[:, :-1])
    torch.testing.assert_close(logits(model, {"input_ids": ids[:, :5]}), logits(model, {"input_ids": ids})[:, :5])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", OUTSIDE)
def test_padding_counts_for_nothing(name):
    if "input_ids" not in zoo_inputs(name) or "Longformer" in name or "XLNet" in name:
        pytest.skip("no padding on the right, or one that moves windows")
    model = randomised(patch_model(zoo_model(name)), 0.3)
    batch = zoo_inputs(name)
    batch.pop("labels")
    if OUTSIDE[name].seq2seq:
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][1, -3:] = 7
    torch.testing.assert_close(logits(model, changed)[1, :4], logits(model, batch)[1, :4])


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_with_checkpointing(name, dtype):
    batch = zoo_inputs(name, padded=False)
    exact = logits(zoo_model(name), batch)
    stock, patched = zoo_model(name).to(dtype), patch_model(zoo_model(name)).to(dtype)
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    errors = [relative_error(logits(m, cast), exact) for m in (patched, stock)]
    assert errors[0] <= 2 * errors[1] + 4 * RELATIVE[dtype]
    assert all(p.dtype == torch.float32 for p in multimax_parameters(patched).values())
    model = patch_model(zoo_model(name)).train()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", dtype):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in multimax_parameters(model).values())


@pytest.mark.parametrize("name", ["BloomForCausalLM", "GPTNeoForCausalLM", "DebertaV2ForMaskedLM"])
def test_it_compiles(name):
    model, batch = randomised(patch_model(zoo_model(name)), 0.3), zoo_inputs(name, padded=False)
    expected = run(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(run(compiled, batch).logits, expected.logits)


def test_attention_weights_are_the_normalizers():
    model, batch = patch_model(zoo_model("BloomForCausalLM"), normalizer="topk_softmax", normalizer_kwargs={"k": 2}), {}
    batch = {"input_ids": zoo_inputs("BloomForCausalLM")["input_ids"]}
    for weights in run(model, {**batch, "output_attentions": True}).attentions:
        assert (weights > 0).sum(-1).max() == 2
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    statistics = hf_multimax.diagnostics.attention_statistics(model, [batch])
    assert len(statistics) == 2


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_pytorchs_multihead_attention(training, masked, weights):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    q, kv = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    options = {"key_padding_mask": torch.arange(7) > torch.tensor([[6], [3], [4]])} if masked else {}
    expected = layer(q, kv, kv, need_weights=weights, **options)
    layer.multimax = MultiMax()
    layer.__class__ = outside_class(nn.MultiheadAttention)
    for found, value in zip(layer(q, kv, kv, need_weights=weights, **options), expected):
        assert (found is None and value is None) or torch.testing.assert_close(found, value) is None
    with torch.no_grad():
        layer.multimax.ts.fill_(0.5)
    assert not torch.allclose(layer(q, kv, kv, need_weights=weights, **options)[0], expected[0], atol=1e-3)
    layer(q, kv, kv, need_weights=weights, **options)[0].sum().backward()
    assert layer.multimax.ts.grad.abs().sum() > 0


SHAPES = {"4": (2, 4, 5, 7), "3": (4, 5, 7), "2": (5, 7), "5": (2, 3, 4, 5, 7), "square": (2, 4, 6, 6)}


@pytest.mark.parametrize("kind", [None, "boolean", "additive", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_direct_calls_of_sdpa(shape, kind):
    *lead, rows, keys = SHAPES[shape]
    torch.manual_seed(0)
    q, k, v = (torch.randn(*lead, n, 8, dtype=torch.float64) for n in (rows, keys, keys))
    keep = torch.rand(rows, keys) > 0.3
    keep[:, 0] = True
    additive = torch.zeros(rows, keys, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float64).min)
    options = {"boolean": {"attn_mask": keep}, "additive": {"attn_mask": additive}, "causal": {"is_causal": True}}
    options = options.get(kind, {})

    class Attention(nn.Module):
        def forward(self):
            return F.scaled_dot_product_attention(q, k, v, **options)

    layer = Attention()
    stock = layer()
    layer.multimax = MultiMax()
    layer.__class__ = outside_class(Attention)
    torch.testing.assert_close(layer(), stock)
    with torch.no_grad():
        layer.multimax.ts.fill_(0.3)
    scores = modulate(q @ k.mT * 8**-0.5, layer.multimax.ranges, layer.multimax.ts)
    mask = torch.ones(rows, keys, dtype=torch.bool).tril() if kind == "causal" else keep if options else None
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(layer(), scores.softmax(-1) @ v)


class Odd(nn.Module):
    """Attention by a name only."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return {"exp": lambda: x.exp() / x.exp().sum(-1, keepdim=True), "dim": lambda: x.softmax(1)}[self.way]()


@pytest.mark.parametrize(("way", "text"), [("exp", "without softmax"), ("dim", "softmax over dimension 1 of 3")])
def test_a_layer_that_would_stay_at_softmax_raises_when_it_runs(way, text):
    layer = Odd(way)
    layer.multimax = MultiMax()
    layer.__class__ = outside_class(Odd)
    with pytest.raises(ValueError, match=f"this Odd .*{text}.*exclude="):
        layer(torch.randn(2, 3, 4))


def test_what_cannot_be_served_is_refused_with_its_place():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=4,
    )  # fmt: skip
    model = transformers.DeformableDetrModel(config)
    with pytest.raises(ValueError, match="sampling points, not keys.*exclude=") as caught:
        patch_model(model)
    exclude = eval(str(caught.value).partition("exclude=")[2])  # the advice works as it is written
    assert len(multimax_parameters(patch_model(model, exclude=exclude))) == 2


@pytest.mark.parametrize(("make", "text"), [
    (lambda: transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)),
     "ResNetModel.*has no attention layer: none of its modules computes a softmax"),
    (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)),
     "MambaForCausalLM.*has no attention layer"),
])  # fmt: skip
def test_a_model_without_attention_is_told_apart(make, text):
    with pytest.raises(ValueError, match=text):
        patch_model(make())


def test_encoder_layers_of_pytorch_are_refused():
    class Model(transformers.PreTrainedModel):
        config_class = transformers.BertConfig
        base_model_prefix = "model"

        def __init__(self, config):
            super().__init__(config)
            self.encoder = nn.TransformerEncoderLayer(16, 2, batch_first=True)
            self.post_init()

    with pytest.raises(ValueError, match="encoder.self_attn: a TransformerEncoderLayer of PyTorch"):
        patch_model(Model(transformers.BertConfig()))


def test_a_checkpoint_says_that_its_softmax_is_answered(tmp_path):
    patch_model(zoo_model("BloomForCausalLM")).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "outside" not in loaded.config.multimax  # older versions know every key
    with pytest.raises(ValueError, match="AttentionInterface"):
        patch_model(zoo_model("BloomForCausalLM"), outside="refuse")
    patch_model(zoo_model("LlamaForCausalLM"), outside="refuse").save_pretrained(tmp_path / "refuse")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "refuse").config.multimax["outside"] == "refuse"
