"""Attention through the compiled functions of rows: random calls against float64, edges, where it runs."""

import pytest
import torch

from benchmarks.fuzz_attention import FUNCTIONS, check, eager, gradients, native
from hf_multimax import MultiMaxConfig, backend, build_normalizer, patch_model
from hf_multimax.attention import choose
from hf_multimax.attention.call import make_call
from hf_multimax.attention.interface import scaled_dot_product_multimax
from hf_multimax.attention.native import backend as native_backend
from hf_multimax.attention.native import rows
from hf_multimax.attention.tiled import backend as tiled
from hf_multimax.extension.library import load
from hf_multimax.rows.call import KINDS
from hf_multimax.rows.function import Rowwise
from tests.models import inputs_for, make
from tests.tolerances import RELATIVE, relative_error

pytestmark = pytest.mark.skipif(load()[0] is None, reason="no compiler")

#: those without zeros, with zeros, with groups, with options that are tensors, with weights that do not sum to one,
#: with gradients for zeros
SOME = ("scalable_softmax", "sparsemax", "fusedmax", "oscarmax", "asentmax", "sigmoid", "softpick")


def tensors_of(*shape: int, keys: int | None = None, kv_heads: int | None = None, dim: int = 16) -> dict:
    batch, heads, length = shape
    k, v = torch.randn(2, batch, kv_heads or heads, keys or length, dim).unbind()
    return {"q": torch.randn(batch, heads, length, dim), "k": k, "v": v}


def both(name: str, tensors: dict, features: dict, **options) -> tuple[dict, dict]:
    """Result and gradients of the kernel, and of eager attention in float64."""
    grad = torch.randn_like(tensors["q"])
    found = gradients(native, name, options, tensors, features, grad)
    doubled = {key: x.double() for key, x in tensors.items()}
    return found, gradients(eager, name, options, doubled, features, grad.double())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_calls(name):
    for seed in range(14):
        check(seed, name)


@pytest.mark.parametrize("seed", [2934])
def test_random_calls_that_failed(seed):
    check(seed)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("shape", [(1, 2, 1, 3000), (1, 1, 70, 3000), (1, 1, 700, 700), (1, 2, 1, 1), (2, 2, 5, 1)])
def test_shapes(name, shape):
    """One query over many keys, blocks that many keys make flat, blocks of all sizes, a single key."""
    *shape, keys = shape
    tensors = tensors_of(*shape, keys=keys)
    tensors["q"] *= 3
    found, exact = both(name, tensors, {"causal": keys >= shape[-1]}, **({"lam": 0.1} if name == "fusedmax" else {}))
    most = 1e-2 if name == "softpick" and keys == 1 else 2e-5  # whose gradients cancel but for eps
    for what, x in found.items():
        assert relative_error(x, exact[what]) < most, what


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("length", [2, 15, 33, 49, 54, 55, 97])
def test_short_rows_whose_thresholds_are_found_together(name, length):
    """The last few queries of a head join a block or not; keys fill whole vectors or not, to the longest short row."""
    for keys, causal in ((1, False), (17, False), (128, False), (length, True)):
        tensors = tensors_of(2, 2, length, keys=keys)
        tensors["q"] *= torch.logspace(-3, 1, length)[:, None]
        found, exact = both(name, tensors, {"causal": causal})
        for what, x in found.items():
            assert relative_error(x, exact[what]) < 2e-5, (what, keys)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("keys", [20, 300])
def test_the_backward_pass_has_the_weights_of_the_forward(name, keys):
    """With the identity for v the result is the weights, as is the gradient of v where that of the result is one."""
    options = {"k": 3} if name == "topk_softmax" else {"t": 2.0} if name == "tsoftmax" else {}
    tensors = {**tensors_of(1, 2, keys, dim=keys), "v": torch.eye(keys).expand(1, 2, keys, keys).clone()}
    tensors["k"][:, :, 1] = tensors["k"][:, :, 0]  # ties
    found = gradients(native, name, options, tensors, {"causal": True}, torch.eye(keys).expand(1, 2, keys, keys))
    torch.testing.assert_close(found["v"].mT, found["out"], rtol=1e-6, atol=1e-7)
    assert torch.equal(found["v"].mT == 0, found["out"] == 0)


@pytest.mark.parametrize("name", SOME)
def test_dropout_is_the_same_in_both_passes_and_fair(name):
    tensors, grad, identity = tensors_of(2, 2, 50, keys=60, dim=60), torch.randn(2, 2, 50, 60), torch.eye(60)
    shown = {**tensors, "v": identity.expand(2, 2, 60, 60)}  # the result is what is left of the weights
    torch.manual_seed(7)
    left = gradients(native, name, {}, shown, {"dropout_p": 0.3}, grad)["out"]
    weights = gradients(native, name, {}, shown, {}, grad)["out"]
    factors = torch.where(left != 0, 1 / 0.7, 0.0)
    assert abs((factors[weights > 0] == 0).double().mean() - 0.3) < 0.05
    torch.testing.assert_close(left, weights * factors)

    def dropping(call, name, options):
        return eager(call._replace(v=identity.double().expand_as(call.v)), name, options) * factors.double() @ call.v

    torch.manual_seed(7)
    found = gradients(native, name, {}, tensors, {"dropout_p": 0.3}, grad)
    exact = gradients(dropping, name, {}, {key: x.double() for key, x in tensors.items()}, {}, grad.double())
    for what, x in found.items():
        assert relative_error(x, exact[what]) < 2e-5, what


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_that_see_nothing_or_what_is_broken(name):
    """Zeros without a gradient; NaN in its own row alone."""
    options = {"k": 3} if name == "topk_softmax" else {"t": 2.0} if name == "tsoftmax" else {}
    tensors, keep = tensors_of(1, 2, 40), torch.rand(40, 40) < 0.7
    keep[[3, 17]] = False
    tensors["bias"] = torch.zeros(1, 2, 40, 40)
    tensors["bias"][..., 9, 5] = float("nan")
    keep[9, 5], keep[9, 6] = True, True
    found = gradients(native, name, options, tensors, {"mask": keep}, torch.randn(1, 2, 40, 16))
    assert not found["out"][:, :, [3, 17]].any() and not found["q"][:, :, [3, 17]].any()
    assert found["out"][:, :, 9].isnan().all()
    others = [i for i in range(40) if i != 9]
    assert found["out"][:, :, others].isfinite().all() and found["q"][:, :, others].isfinite().all()
    keep[9, 5] = False  # a masked entry does not count, whatever it holds
    again = gradients(native, name, options, tensors, {"mask": keep}, torch.randn(1, 2, 40, 16))
    assert all(x.isfinite().all() for x in again.values())


@pytest.mark.parametrize(("length", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(length, keys):
    tensors = {"q": torch.randn(2, 4, length, 8), **dict.fromkeys("kv", torch.randn(2, 2, keys, 8))}
    found = gradients(native, "sparsemax", {}, tensors, {}, torch.randn(2, 4, length, 8))
    assert all(found[what].shape == x.shape and not found[what].any() for what, x in tensors.items())
    assert found["out"].shape == (2, 4, length, 8) and not found["out"].any()


@pytest.mark.parametrize("name", SOME)
def test_any_number_of_threads(name):
    """Rows are computed the same; the sums over them may be split."""
    tensors, grad = tensors_of(1, 2, 300, kv_heads=1), torch.randn(1, 2, 300, 16)
    tensors["bias"] = torch.randn(1, 1, 300, 300)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)  # set back by a fixture
        results.append(gradients(native, name, {}, tensors, {"causal": True}, grad))
    assert all(torch.equal(*(result[what] for result in results)) for what in ("out", "q"))
    for what in ("k", "v", "bias"):
        torch.testing.assert_close(*(result[what] for result in results), rtol=1e-5, atol=1e-5)


def test_heads_of_a_broadcast_bias_with_rows_in_common():
    tensors = tensors_of(2, 4, 200, kv_heads=2)
    tensors["bias"] = torch.randn(1, 1, 1, 200)
    torch.set_num_threads(3)
    found, exact = both("entmax15", tensors, {})
    assert relative_error(found["bias"], exact["bias"]) < 1e-5


def attention_of(name: str, **options):
    heads = 4 if name in ("scalable_softmax", "asentmax") else None
    return build_normalizer(MultiMaxConfig(normalizer=name, normalizer_kwargs=options), heads)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("chosen", ["auto", "native", "tiled"])
def test_softmax_with_a_temperature_is_a_modulator(temperature, chosen):
    """Bias within, additive mask without it, as in plain PyTorch."""
    module = attention_of("softmax", temperature=temperature)
    q, k, v = (x.requires_grad_() for x in tensors_of(2, 4, 40, keys=50).values())
    mask = torch.randn(40, 50).masked_fill(torch.rand(40, 50) < 0.3, torch.finfo(torch.float32).min)
    grad, results = torch.randn(2, 4, 40, 16), []
    for name in (chosen, "eager"):
        with backend(name):
            out = scaled_dot_product_multimax(module, q, k, v, mask, bias=torch.arange(50) / 10)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for found, expected in zip(*results):
        assert relative_error(found, expected) < 4 * RELATIVE[torch.float32]


@pytest.mark.parametrize(
    ("features", "kernel"),
    [
        ({}, "native"),
        ({"mask": torch.ones(40, 40, dtype=torch.bool)}, "native"),
        ({"mask": torch.zeros(40, 40)}, "native"),
        ({"dropout_p": 0.1, "causal": True, "softcap": 2.0, "bias": torch.zeros(40, requires_grad=True)}, "native"),
        ({"bias": torch.zeros(40, 1, requires_grad=True)}, "tiled"),
        ({"mask": torch.zeros(40, 40, requires_grad=True)}, None),
        ({"sinks": torch.zeros(4)}, None),
        ({"share": 0.5}, "tiled"),
        ({"dtype": torch.float64}, "tiled"),
    ],
)
def test_where_it_runs(features, kernel, monkeypatch):
    monkeypatch.setattr(choose, "SMALL", 0)
    features = dict(features)
    module = attention_of("sparsemax", **{key: features.pop(key) for key in ("share",) if key in features})
    q, k, v = (x.to(features.get("dtype", torch.float32)) for x in tensors_of(1, 4, 40).values())
    features.pop("dtype", None)
    row_function = Rowwise("sparsemax", lambda: None, module.compiled())
    chosen = choose.choose_kernel(make_call(q, k, v, None, None, **features), other=row_function)
    assert chosen is {"native": native_backend, "tiled": tiled, None: None}[kernel]


def test_an_explicit_choice_names_what_is_missing():
    module, (q, k, v) = attention_of("sparsemax", share=0.5), tensors_of(1, 4, 8).values()
    with backend("native"), pytest.raises(ValueError, match="native.*does not support sparsemax"):
        scaled_dot_product_multimax(module, q, k, v)
    with pytest.raises(ValueError, match="do not fit"):
        scaled_dot_product_multimax(attention_of("sparsemax"), q, k[:, :3], v[:, :3])


@pytest.mark.parametrize(
    ("name", "options"),
    [("entmax", {"learn": True, "alpha": 1.3}), ("entmax", {"init": "identity"}), ("rsoftmax", {"learn": True}),
     ("scalable_softmax", {}), ("asentmax", {"learn": True}), ("evsoftmax", {}), ("adaptive_temperature", {})],
)  # fmt: skip
@pytest.mark.parametrize("per_head", [False, True])
def test_patched_models_learn_the_same(name, options, per_head):
    """Learned options, and those that act in training alone."""
    per_head = per_head and bool(options)
    model = patch_model(make("GPT2LMHeadModel"), normalizer=name, normalizer_kwargs=options, per_head=per_head)
    batch, grads = inputs_for(model), []
    for chosen in ("native", "eager"):
        model.zero_grad()
        with backend(chosen):
            model(**batch).loss.backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert relative_error(grad, grads[1][key]) < (5e-3 if "multimax" in key else 1e-4), key


@pytest.mark.parametrize("name", ["entmax15", "scalable_softmax", "asentmax", "fusedmax"])
def test_compiled_code_calls_it(name):
    torch._dynamo.reset()
    module, (q, k, v) = attention_of(name), (x.requires_grad_() for x in tensors_of(1, 4, 20).values())
    leaves, weights = (q, k, v, *module.parameters()), torch.randn(1, 4, 20, 16)

    def loss(q, k, v):
        return (scaled_dot_product_multimax(module, q, k, v, is_causal=True) * weights).sum()

    expected = torch.autograd.grad(loss(q, k, v), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k, v), leaves)
    for actual, reference in zip(found, expected):
        torch.testing.assert_close(actual, reference)


def test_the_operator_is_what_it_claims(monkeypatch):
    tensors = tensors_of(1, 4, 9, keys=12, kv_heads=2)
    alpha, beta, gamma = ((torch.rand(4) + 1).requires_grad_() for _ in range(3))
    call = make_call(*(x.requires_grad_() for x in tensors.values()), None, None, causal=True, window=5)
    arguments = (alpha, beta, gamma, KINDS.index("asentmax"), 0.0, 1.0, *call)
    torch.library.opcheck(torch.ops.hf_multimax.native_row_attention_training.default, arguments)
    grad, results = torch.randn(1, 4, 9, 16), []
    for direct in (True, False):
        monkeypatch.setattr(rows, "unseen", lambda *_, direct=direct: direct)
        results.append(gradients(native, "entmax15", {}, tensors, {"causal": True}, grad))
    assert all(torch.equal(results[0][what], results[1][what]) for what in results[0])
    out = native(make_call(*tensors.values(), None, None), "entmax15", {})
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), tensors["q"], create_graph=True)
