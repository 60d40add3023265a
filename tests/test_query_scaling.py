"""asentmax with ``scaling="adapt"``: factors of the scores from the queries, in attention and in patched models."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn.functional import softplus

from hf_multimax import MultiMaxConfig, backend, build_normalizer, multimax_parameters, normalize, patch_model
from hf_multimax.attention import choose
from hf_multimax.attention.call import make_call
from hf_multimax.attention.interface import scaled_dot_product_multimax
from hf_multimax.attention.scaled import visible_keys
from hf_multimax.diagnostics import measure_model
from hf_multimax.extension.library import load
from hf_multimax.normalizers.annealing import set_share
from tests.models import TRAINED, inputs_for, make
from tests.tolerances import RELATIVE, relative_error
from tests.zoo import OUTSIDE, ZOO, zoo_inputs, zoo_model

ADAPT = {"scaling": "adapt"}
#: architectures of which only the decoder's layers go through Transformers' AttentionInterface
DECODER_ALONE = tuple(f"{name}ForConditionalGeneration" for name in ("PegasusX", "BigBirdPegasus", "LongT5"))
BACKENDS = ("eager", "tiled", *(("native",) if load()[0] is not None else ()))


def module_of(heads: int, width: int, spread: float = 0.3, **options):
    config = MultiMaxConfig(normalizer="asentmax", normalizer_kwargs={**ADAPT, **options})
    module = build_normalizer(config, heads, width)
    for weight in (module.beta_weight, module.gamma_weight):
        torch.nn.init.normal_(weight, std=spread)
    return module


def by_definition(module, q, k, v, keep, bias=0.0, softcap=None):
    """Row by row of the score matrix, in the type of q."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    beta = softplus(torch.einsum("bhnd,hd->bhn", q, module.beta_weight.to(q.dtype)))[..., None]
    gamma = 2 * torch.einsum("bhnd,hd->bhn", q, module.gamma_weight.to(q.dtype)).tanh()[..., None]
    seen = keep.sum(-1, keepdim=True).clamp(min=1)
    factor = module.options["delta"] + beta * (seen + 1.0).to(q.dtype).log() ** gamma
    with backend("eager"):
        alpha = module.values()["alpha"]
        alpha = alpha.to(q.dtype)[:, None, None] if torch.is_tensor(alpha) else alpha
        return normalize("entmax", factor * (scores + bias), mask=keep.expand_as(scores), alpha=alpha) @ v


def tensors_of(rows: int, keys: int, dtype=torch.float32):
    q = torch.randn(2, 4, rows, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 2, keys, 8, dtype=dtype).unbind()
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def band(rows: int, keys: int, mask: str) -> tuple[dict, torch.Tensor]:
    """The features of a call, and what they keep."""
    keep = torch.ones(2, 1, rows, keys, dtype=torch.bool)
    if mask == "causal":
        return {"is_causal": True}, keep.tril()
    if mask == "boolean":
        keep = torch.rand(2, 1, rows, keys) < 0.6
        keep[:, :, 3] = False
        return {"attn_mask": keep}, keep
    if mask == "additive":
        keep = torch.rand(2, 1, rows, keys) < 0.6
        return {"attn_mask": torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)}, keep
    return {}, keep


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("learn", [False, True])
def test_equals_its_definition(chosen, mask, learn):
    """Values and every gradient, that of the queries through the factor, too."""
    if (chosen, mask) == ("tiled", "additive"):
        pytest.skip("tiles take no additive mask")
    module = module_of(4, 8, learn=learn)
    q, k, v = tensors_of(20, 20)
    features, keep = band(20, 20, mask)
    grad, names = torch.randn(2, 4, 20, 8), ["q", "k", "v", *(name for name, _ in module.named_parameters())]
    with backend(chosen):
        out = scaled_dot_product_multimax(module, q, k, v, **features, enable_gqa=True)
    found = torch.autograd.grad(out, (q, k, v, *module.parameters()), grad)
    exactly = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = by_definition(module, *exactly, keep)
    references = torch.autograd.grad(expected, (*exactly, *module.parameters()), grad.double())
    assert relative_error(out, expected) < 2 * RELATIVE[torch.float32]
    for name, x, reference in zip(names, found, references):
        assert relative_error(x, reference) < 2e-5, name


@pytest.mark.parametrize("chosen", ["eager", "auto"])
def test_a_bias_is_scaled_with_the_scores(chosen, monkeypatch):
    monkeypatch.setattr(choose, "SMALL", 0)
    module, (q, k, v), bias = module_of(4, 8), tensors_of(9, 9), torch.randn(1, 4, 9, 9)
    with backend(chosen):
        out = scaled_dot_product_multimax(module, q, k, v, bias=bias)
    expected = by_definition(module, q.double(), k.double(), v.double(), torch.ones(9, 9, dtype=torch.bool), bias)
    assert relative_error(out, expected) < 2 * RELATIVE[torch.float32]
    for name in BACKENDS[1:]:
        with backend(name), pytest.raises(ValueError, match="asentmax with factors of the queries under a bias"):
            scaled_dot_product_multimax(module, q, k, v, bias=bias)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_factor_in_float32(chosen, dtype):
    module, tensors = module_of(4, 8), tensors_of(30, 30, dtype)
    with backend(chosen):
        out = scaled_dot_product_multimax(module, *tensors, is_causal=True)
    assert out.dtype == dtype
    keep = torch.ones(30, 30, dtype=torch.bool).tril()
    expected = by_definition(module, *(x.double() for x in tensors), keep)
    # eager multiplies in half precision, as it does for all functions
    assert relative_error(out, expected) < (8 if chosen == "eager" else 2) * RELATIVE[dtype]


@pytest.mark.parametrize("chosen", BACKENDS)
def test_identity_begins_as_softmax_and_leaves_it(chosen):
    module = module_of(4, 8, spread=0.0, init="identity")
    q, k, v = tensors_of(20, 20)
    assert (module.row_factor(q, lambda: torch.arange(20)[:, None]) == 1.0).all()
    with backend(chosen):
        out = scaled_dot_product_multimax(module, q, k, v, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative_error(out, expected) < RELATIVE[torch.float32]
    grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    assert len(grads) == 3 and all(grad.abs().amax(-1).min() > 0 for grad in grads)


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_begins_as_the_stock_one(name):
    stock = make(name)
    batch = inputs_for(stock)
    model = patch_model(make(name), normalizer="asentmax", normalizer_kwargs={**ADAPT, "init": "identity"})
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
        for parameter in multimax_parameters(model).values():
            parameter.normal_(std=0.3)
        left = model(**batch).logits
        assert not torch.allclose(left, stock(**batch).logits, atol=1e-4)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(**batch).logits, left)


@pytest.mark.parametrize("name", TRAINED)
def test_patched_models_learn_it(name, tmp_path):
    """Of every architecture: weights as wide as its queries, gradients to all of them, saved and loaded."""
    model = patch_model(make(name), normalizer="asentmax", normalizer_kwargs={**ADAPT, "learn": True})
    parameters = multimax_parameters(model)
    assert {key.rpartition(".")[2] for key in parameters} == {"alpha", "beta_weight", "gamma_weight"}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.3)
    batch = inputs_for(model)
    model(**batch).loss.backward()
    assert all(parameter.grad.any() for parameter in parameters.values())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.multimax["normalizer_kwargs"] == {**ADAPT, "learn": True}
    for key, parameter in multimax_parameters(again).items():
        assert torch.equal(parameter, parameters[key]), key
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("name", ZOO)
def test_layers_tell_the_width_of_their_queries(name):
    model, own = zoo_model(name), None
    if name in DECODER_ALONE:
        own = "^decoder"
        with pytest.raises(ValueError, match=r"queries are not seen.*exclude"):
            patch_model(model, normalizer="asentmax", normalizer_kwargs=ADAPT)
    patch_model(model, normalizer="asentmax", normalizer_kwargs=ADAPT, include=own)
    with torch.no_grad():
        model(**zoo_inputs(name))


def test_compiled_code_calls_it():
    torch._dynamo.reset()
    module, (q, k, v) = module_of(4, 8), tensors_of(20, 20)
    leaves, weights = (q, k, v, *module.parameters()), torch.randn(2, 4, 20, 8)

    def loss(q, k, v):
        return (scaled_dot_product_multimax(module, q, k, v, is_causal=True) * weights).sum()

    expected = torch.autograd.grad(loss(q, k, v), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k, v), leaves)
    for actual, reference in zip(found, expected):
        torch.testing.assert_close(actual, reference)


def test_a_cache_sees_the_same_number_of_keys():
    model = patch_model(make("GPT2LMHeadModel"), normalizer="asentmax", normalizer_kwargs=ADAPT).eval()
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.normal_(std=0.3)
        ids = torch.randint(3, 60, (2, 9))
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        rest = [first.logits]
        for i in range(5, 9):
            first = model(ids[:, i : i + 1], past_key_values=first.past_key_values, use_cache=True)
            rest.append(first.logits)
    torch.testing.assert_close(torch.cat(rest, 1), whole, rtol=1e-4, atol=1e-5)


def test_autocast_computes_the_factor_in_float32():
    model = patch_model(make("GPT2LMHeadModel"), normalizer="asentmax", normalizer_kwargs=ADAPT)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.normal_(std=0.3)
    batch = inputs_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch).loss
    rounded.backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in multimax_parameters(model).values())
    assert relative_error(rounded, model(**batch).loss) < 0.03
    model.half()
    assert all(p.dtype == torch.float32 for p in multimax_parameters(model).values())


def test_adapters_have_weights_of_their_own(tmp_path):
    peft = pytest.importorskip("peft")
    from hf_multimax.peft import MultiMaxAdapterConfig

    model = make("GPT2LMHeadModel")
    batch = inputs_for(model)
    before = model(**batch).loss
    options = {**ADAPT, "init": "identity"}
    adapted = peft.get_peft_model(model, MultiMaxAdapterConfig(normalizer="asentmax", normalizer_kwargs=options))
    torch.testing.assert_close(adapted(**batch).loss, before)
    own = multimax_parameters(adapted)
    with torch.no_grad():
        for parameter in own.values():
            parameter.normal_(std=0.1)
    adapted(**batch).loss.backward()
    assert own and all(parameter.grad.any() for parameter in own.values() if parameter.ndim == 2)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("GPT2LMHeadModel"), tmp_path)
    torch.testing.assert_close(again(**batch).loss, adapted(**batch).loss)


def test_what_is_measured_has_the_factor():
    """In tiles that an observer asked for, as in the whole score matrix."""
    model = patch_model(make("GPT2LMHeadModel"), normalizer="asentmax", normalizer_kwargs=ADAPT)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.normal_(std=0.5)
        batch = {"input_ids": torch.randint(3, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
        weights = model(**batch, output_attentions=True).attentions
    visible, measured = torch.ones(9, 9, dtype=torch.bool).tril(), measure_model(model, [batch])
    for layer, weight in zip(measured.values(), weights):
        zeros = ((weight == 0) & visible).sum(-1) / visible.sum(-1)
        assert layer.measures["exact_zeros"].value == pytest.approx(zeros.mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "adaptive"}, "scaling .* must be 'learn' or 'adapt'"),
        ({**ADAPT, "beta": 0.3}, "beta of 'asentmax' come from the queries"),
        ({**ADAPT, "delta": 0.0}, "delta .* must be > 0"),
        ({**ADAPT, "share": 0.5}, "not mixed with SoftMax.*identity"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        patch_model(make("GPT2LMHeadModel"), normalizer="asentmax", normalizer_kwargs=options)


def test_without_queries_it_is_refused():
    with pytest.raises(ValueError, match="reads the queries"):
        normalize("asentmax", torch.randn(3, 4), scaling="adapt")
    with pytest.raises(ValueError, match="reads the queries"):
        module_of(4, 8)(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"weights \[2, 8\] for queries of 4 heads of width 8"):
        scaled_dot_product_multimax(module_of(2, 8), *tensors_of(3, 3))
    model = patch_model(make("GPT2LMHeadModel"), normalizer="asentmax", normalizer_kwargs=ADAPT)
    with pytest.raises(ValueError, match="not mixed with SoftMax"):
        set_share(model, 0.5)
    name = next(name for name in OUTSIDE if name.endswith("ForCausalLM"))
    with pytest.raises(ValueError, match=r"outside Transformers' AttentionInterface.*exclude"):
        patch_model(zoo_model(name), normalizer="asentmax", normalizer_kwargs=ADAPT)


@pytest.mark.parametrize("features", [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 3}])
@pytest.mark.parametrize("keys", [7, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_every_query_counts_the_keys_that_it_sees(features, keys, masked):
    keep = torch.rand(2, 1, 1, keys) < 0.7 if masked else torch.ones(1, dtype=torch.bool)
    tensors = torch.randn(2, 4, 7, 8), *torch.randn(2, 2, 4, keys, 8)
    call = make_call(*tensors, None, None, mask=keep if masked else None, **features)
    ahead = torch.arange(keys) - torch.arange(keys - 7, keys)[:, None]
    near = (ahead.abs() < features.get("window", keys)) & (ahead <= 0 if features.get("causal") else ahead < keys)
    expected = (near & keep).sum(-1, keepdim=True)
    assert torch.equal(visible_keys(call).expand(2, 4, 7, 1), expected.expand(2, 4, 7, 1))


def test_its_factor_grows_with_the_number_of_keys():
    """As in the paper: scores of more keys are multiplied by more where gamma is positive, by less where it is not."""
    module, q = module_of(1, 4, spread=0.0), torch.ones(1, 1, 3, 4)
    torch.nn.init.constant_(module.gamma_weight, 0.25)
    seen = torch.tensor([2, 20, 200])[:, None]
    factor = module.row_factor(q, lambda: seen).flatten()
    expected = [1 + math.log(2) * math.log(n + 1) ** (2 * math.tanh(1.0)) for n in (2, 20, 200)]
    torch.testing.assert_close(factor, torch.tensor(expected))
