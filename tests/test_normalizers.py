"""Every normalizer against its definition in float64, and in patched models of each architecture."""

import copy
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from models import inputs_for, make
from safetensors.torch import load_file
from test_structured import oscar_reference, tv_reference
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import hf_multimax
from benchmarks.normalizers import timings
from hf_multimax import MultiMaxConfig, multimax_parameters, normalize, patch_model, register_normalizer
from hf_multimax.extension.library import load
from hf_multimax.normalizers import FunctionNormalizer, build_normalizer, get_normalizer, rowwise
from hf_multimax.normalizers.annealing import NormalizerAnnealing, SparsityAnnealing, set_share, set_sparsity
from hf_multimax.normalizers.registry import _REGISTRY
from recipes.max_retrieval import FUNCTIONS, main

# -- the definitions, for one row of unmasked scores in float64 --------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def bisected(mass, low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) > 1 else (low, middle)
    return (low + high) / 2


def entmax(x: np.ndarray, alpha: float = 1.5, learn: bool = False) -> np.ndarray:
    if alpha == 1:
        return softmax(x)

    def p(threshold: float) -> np.ndarray:
        return np.maximum((alpha - 1) * (x - x.max()) - threshold, 0) ** (1 / (alpha - 1))

    return p(bisected(lambda threshold: p(threshold).sum(), -1.0, 0.0))


def sparsemax(x: np.ndarray) -> np.ndarray:
    def p(threshold: float) -> np.ndarray:
        return np.maximum(x - x.max() - threshold, 0)

    return p(bisected(lambda threshold: p(threshold).sum(), -1.0, 0.0))


def tsoftmax(x: np.ndarray, t: float) -> np.ndarray:
    p = np.maximum(x - x.max() + t, 0) * np.exp(x - x.max())
    return p / p.sum()


def rsoftmax(x: np.ndarray, sparsity: float = 0.5, learn: bool = False) -> np.ndarray:
    z = x - x.max()
    gone = np.exp(z) == 0
    share = gone.mean()
    q = np.clip((sparsity - share) / (1 - share), 0, 1)
    return tsoftmax(x, 1e-8 - np.quantile(np.where(gone, 0, z), q))


def adaptive_temperature(x: np.ndarray) -> np.ndarray:
    p = softmax(x)
    entropy = -(p * np.log(p + 1e-9)).sum()
    beta = max(np.polyval([-0.037, 0.481, -2.3, 4.917, -1.791], entropy), 1.0) if entropy > 0.5 else 1.0
    return softmax(beta * x)


def evsoftmax(x: np.ndarray) -> np.ndarray:
    p = softmax(x) * ((x >= x.mean()) | (x == x.max()))
    return p / p.sum()


def topk_softmax(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.argsort(-x, kind="stable")[:k]
    p = np.zeros_like(x)
    p[kept] = softmax(x[kept])
    return p


def multimax(x: np.ndarray, ranges: torch.Tensor, ts: torch.Tensor) -> np.ndarray:
    (b1, d1, b2, d2), (tb1, td1, tb2, td2) = ranges.double().tolist(), ts.double().tolist()
    below = tb1 * np.maximum(b1 - x, 0) + tb2 * np.maximum(b2 - x, 0) ** 2
    return softmax(x + below + td1 * np.maximum(x - d1, 0) + td2 * np.maximum(x - d2, 0) ** 2)


def asentmax(x, alpha=1.5, beta=0.55, gamma=0.0, delta=1.0):
    return entmax((delta + beta * math.log(len(x) + 1) ** gamma) * x, alpha)


def softpick(x, eps=1e-8):
    m = max(x.max(), 0.0)
    excess = np.where(np.abs(x) < 1, np.expm1(x) * np.exp(-m), np.exp(x - m) - np.exp(-m))
    return np.maximum(excess, 0) / (np.abs(excess).sum() + eps)


def softmax1(x):
    return softmax(np.append(x, 0.0))[:-1]


def sigmoid(x, b=None):
    return 1 / (1 + np.exp(-(x - math.log(len(x)) if b is None else x + b)))


REFERENCES = {
    "multimax": multimax,
    "softmax": lambda x, temperature=1.0: softmax(x / temperature),
    "sparsemax": sparsemax,
    "entmax15": entmax,
    "entmax": entmax,
    "fusedmax": lambda x, lam=1.0: sparsemax(tv_reference(x, lam)),
    "oscarmax": lambda x, alpha=0.0, beta=None: sparsemax(oscar_reference(x, alpha, beta)),
    "rsoftmax": rsoftmax,
    "tsoftmax": tsoftmax,
    "adaptive_temperature": adaptive_temperature,
    "evsoftmax": evsoftmax,
    "topk_softmax": topk_softmax,
    "scalable_softmax": lambda x, s=0.43, base=0.0: softmax((base + s * math.log(len(x))) * x),
    "asentmax": asentmax,
    "softpick": softpick,
    "softmax1": softmax1,
    "sigmoid": sigmoid,
}
_MODULATOR = {"ranges": torch.tensor([0.1, 0.4, -0.5, 0.7]), "ts": torch.tensor([-0.3, 0.2, -0.05, 0.03])}
#: What is tested everywhere: names with options that reach every branch.
CASES = [
    ("multimax", _MODULATOR),
    ("softmax", {"temperature": 0.7}),
    ("sparsemax", {}),
    ("entmax15", {}),
    ("entmax", {"alpha": 1.0}),
    ("entmax", {"alpha": 1.01}),
    ("entmax", {"alpha": 1.3}),
    ("entmax", {"alpha": 2.0}),
    ("entmax", {"alpha": 2.5}),
    ("fusedmax", {"lam": 0.3}),
    ("fusedmax", {}),
    ("oscarmax", {}),
    ("oscarmax", {"alpha": 0.1, "beta": 0.02}),
    ("rsoftmax", {}),
    ("rsoftmax", {"sparsity": 0.0}),
    ("rsoftmax", {"sparsity": 0.83}),
    ("rsoftmax", {"sparsity": 1.0}),
    ("tsoftmax", {"t": 1.5}),
    ("adaptive_temperature", {}),
    ("evsoftmax", {}),
    ("topk_softmax", {"k": 3}),
    ("scalable_softmax", {}),
    ("scalable_softmax", {"s": 0.2, "base": 1.0}),
    ("asentmax", {}),
    ("asentmax", {"alpha": 1.2, "beta": 0.3, "gamma": -0.7}),
    ("softpick", {}),
    ("softmax1", {}),
    ("sigmoid", {}),
    ("sigmoid", {"b": -1.0}),
]
#: whose weights need not sum to one
FREE = ("softpick", "softmax1", "sigmoid")
IDS = [f"{name}-{'-'.join(str(v) for v in options.values() if not torch.is_tensor(v))}" for name, options in CASES]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
#: One per name, as models are patched with them.
PATCHES = {
    "multimax": {"normalizer": "multimax"},
    "affine": {"normalizer": "multimax", "affine": True},
    "per-head": {"normalizer": "multimax", "order": 3, "per_head": True},
    "tsoftmax": {"normalizer": "tsoftmax", "normalizer_kwargs": {"t": 3.0}},
    "topk_softmax": {"normalizer": "topk_softmax", "normalizer_kwargs": {"k": 4}},
    "entmax-learned": {"normalizer": "entmax", "normalizer_kwargs": {"learn": True}},
    "entmax-heads": {"normalizer": "entmax", "normalizer_kwargs": {"learn": True, "alpha": 1.2}, "per_head": True},
    "rsoftmax-learned": {"normalizer": "rsoftmax", "normalizer_kwargs": {"learn": True, "sparsity": 0.3}},
    "scalable-heads": {"normalizer": "scalable_softmax", "per_head": True},
    "entmax-identity": {"normalizer": "entmax", "normalizer_kwargs": {"init": "identity"}},
    "scalable-identity": {"normalizer": "scalable_softmax", "normalizer_kwargs": {"init": "identity"}},
    "asentmax-identity": {"normalizer": "asentmax", "normalizer_kwargs": {"init": "identity"}},
    "asentmax-alpha": {"normalizer": "asentmax", "normalizer_kwargs": {"learn": True, "beta": 0.2, "gamma": 0.1}},
    "half-sparsemax": {"normalizer": "sparsemax", "normalizer_kwargs": {"share": 0.5}},
    **{
        name: {"normalizer": name}
        for name in REFERENCES
        if name not in ("multimax", "tsoftmax", "topk_softmax", "scalable_softmax")
    },
}
SPARSE = ("sparsemax", "entmax15", "entmax", "fusedmax", "oscarmax", "rsoftmax", "evsoftmax", "topk_softmax")


def random_mask(x: torch.Tensor) -> torch.Tensor:
    """Random, with one row that keeps nothing, one that keeps one entry and one that keeps all."""
    mask = torch.rand(x.shape) < 0.7
    mask[0], mask[1], mask[2] = False, False, True
    mask[1, -1] = True
    return mask


# -- values ----------------------------------------------------------------------------------------------------------


def test_every_name_is_tested():
    # what a test registers itself is called test_*
    assert {name for name in _REGISTRY if not name.startswith("test_")} == set(REFERENCES)
    assert {patch["normalizer"] for patch in PATCHES.values()} == set(REFERENCES)
    assert all(get_normalizer(name).citation for name in REFERENCES)


@every_case
def test_equals_definition(name, options):
    for n in (1, 2, 9, 40):
        for spread in (0.3, 3.0, 30.0):
            x = spread * torch.randn(4, n, dtype=torch.float64)
            p = normalize(name, x, **options)
            expected = np.stack([REFERENCES[name](row, **options) for row in x.numpy()])
            np.testing.assert_allclose(p.numpy(), expected, atol=1e-9)


@every_case
def test_equals_definition_in_float32(name, options):
    x = 3 * torch.randn(4, 40)
    expected = normalize(name, x.double(), **options)
    # where entries count as zero the functions jump, and rounding may put one entry on the other side
    torch.testing.assert_close(normalize(name, x, **options).double(), expected, atol=1e-6, rtol=1e-5)


@every_case
def test_sums_to_one(name, options):
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 2e-6),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2e-3),
    ):
        p = normalize(name, (3 * torch.randn(5, 300)).to(dtype), **options)
        assert p.dtype == dtype and (p >= 0).all()
        if name in FREE:
            assert (p <= 1).all()
            continue
        torch.testing.assert_close(p.double().sum(-1), torch.ones(5, dtype=torch.float64), atol=tolerance, rtol=0)


@every_case
def test_half_precision_is_rounded_float32(name, options):
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 20).to(dtype)
        assert torch.equal(normalize(name, x, **options), normalize(name, x.float(), **options).to(dtype))


@every_case
def test_any_dimension(name, options):
    x = torch.randn(3, 4, 5)
    mask = torch.rand(3, 4, 5) < 0.8
    for dim in range(-3, 3):
        p = normalize(name, x, dim, mask, **options)
        expected = normalize(name, x.movedim(dim, -1), -1, mask.movedim(dim, -1), **options).movedim(-1, dim)
        torch.testing.assert_close(p, expected, atol=1e-6, rtol=0)


@every_case
def test_masked_means_removed(name, options):
    x = 2 * torch.randn(6, 12, dtype=torch.float64)
    mask = random_mask(x)
    p = normalize(name, x, mask=mask, **options)
    assert (p[~mask] == 0).all()
    for row, kept, out in zip(x, mask, p):
        if kept.any():
            torch.testing.assert_close(out[kept], normalize(name, row[kept], **options), atol=1e-12, rtol=0)
    assert torch.equal(p, normalize(name, x.masked_fill(~mask, -math.inf), **options))
    assert torch.equal(p, normalize(name, x.masked_fill(~mask, math.nan), mask=mask, **options))


@every_case
def test_broadcast_mask(name, options):
    x, mask = torch.randn(2, 3, 4, 6), torch.rand(2, 1, 4, 6) < 0.8
    assert torch.equal(normalize(name, x, mask=mask, **options), normalize(name, x, mask=mask.expand_as(x), **options))


@every_case
def test_empty_rows(name, options):
    x = torch.randn(3, 5).index_fill(0, torch.tensor(1), -math.inf).requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[2] = False
    p = normalize(name, x, mask=mask, **options)
    assert (p[1:] == 0).all() and p.isfinite().all()
    p.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad[1:] == 0).all()
    assert normalize(name, torch.zeros(2, 0), **options).shape == (2, 0)
    assert normalize(name, torch.zeros(0, 3), **options).shape == (0, 3)


@every_case
def test_nan_and_infinity_stay_in_their_row(name, options):
    x = torch.randn(4, 6)
    x[1, 2], x[2, 0] = math.nan, math.inf
    p = normalize(name, x, **options)
    assert p[1].isnan().all() and p[2].isnan().any()
    torch.testing.assert_close(p[[0, 3]], normalize(name, x[[0, 3]], **options))


@every_case
def test_permutation(name, options):
    x, order = torch.randn(4, 15, dtype=torch.float64), torch.randperm(15)
    same = torch.allclose(normalize(name, x, **options)[:, order], normalize(name, x[:, order], **options), atol=1e-10)
    assert same == (name != "fusedmax")


@every_case
def test_gradient(name, options):
    if name == "rsoftmax":
        pytest.skip("its t is a constant in the backward pass: test_rsoftmax_gradient")
    x = 0.7 * torch.randn(4, 6, dtype=torch.float64)
    mask = random_mask(x)
    x[3, 4] = -math.inf
    assert torch.autograd.gradcheck(
        lambda y: normalize(name, torch.where(x == -math.inf, x, y), mask=mask, **options),
        torch.where(x == -math.inf, 0.0, x).requires_grad_(),
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 1.0])
def test_rsoftmax_gradient(sparsity):
    """As the t-softmax of the same, fixed t."""
    x = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    t = 1e-8 - np.quantile((x - x.max()).detach().numpy(), sparsity)
    weights = torch.randn(9, dtype=torch.float64)
    (normalize("rsoftmax", x, sparsity=sparsity) * weights).sum().backward()
    actual, x.grad = x.grad, None
    (normalize("tsoftmax", x, t=t) * weights).sum().backward()
    torch.testing.assert_close(actual, x.grad, atol=1e-9, rtol=1e-9)


def test_rsoftmax_gradient_at_full_sparsity_is_zero():
    x = torch.randn(4, 50, requires_grad=True)
    (normalize("rsoftmax", x, sparsity=1.0) * torch.randn(50)).sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("entmax", "alpha", [1.05, 1.5, 1.95]),
        ("rsoftmax", "sparsity", [0.21, 0.5, 0.77]),
        ("scalable_softmax", "s", [0.1, 1, 3]),
        ("asentmax", "alpha", [1.1, 1.5, 1.9]),
        ("asentmax", "beta", [0.1, 0.5, 1.0]),
        ("asentmax", "gamma", [-0.5, 0.0, 0.9]),
    ],
)
def test_gradient_of_learned_option(name, option, values):
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=name != "rsoftmax")
    mask = torch.rand(1, 1, 2, 6) < 0.8
    value = torch.tensor(values, dtype=torch.float64).view(3, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: normalize(name, x, mask=mask, **{option: v}), (x, value))
    p = normalize(name, x, mask=mask, **{option: value})
    for head, number in enumerate(values):
        torch.testing.assert_close(p[:, head], normalize(name, x[:, head], mask=mask[:, 0], **{option: number}))
    moved = normalize(name, x.movedim(-1, 1), 1, mask.movedim(-1, 1), **{option: value.movedim(-1, 0)[:, :, :]})
    torch.testing.assert_close(moved.movedim(1, -1), p)


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.01])
def test_entmax_alpha_gradient_near_softmax(alpha):
    """Accurate in float32, where the usual formula divides rounding errors by (alpha - 1) ** 2."""
    x, weights = 3 * torch.randn(16, 100), torch.randn(16, 100)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        value = torch.full((16, 1), alpha, dtype=torch.float64).to(dtype).requires_grad_()
        (normalize("entmax", x.to(dtype), alpha=value) * weights).sum().backward()
        gradients.append(value.grad.double())
    step = 1e-4
    x = x.double()
    raised, lowered = (normalize("entmax", x, alpha=alpha + step * k) for k in (2, 1))
    forward = (4 * lowered - raised - 3 * normalize("entmax", x, alpha=alpha)) / (2 * step)
    expected = (forward * weights).sum(-1, keepdim=True)
    torch.testing.assert_close(gradients[1], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_special_cases_agree():
    x = 2 * torch.randn(6, 20, dtype=torch.float64)
    plain, sparse = normalize("softmax", x), normalize("sparsemax", x)

    def check(actual, expected, tolerance=1e-9):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)

    check(normalize("softmax", x), x.softmax(-1))
    check(normalize("multimax", x), plain)
    check(normalize("entmax", x, alpha=1), plain)
    check(normalize("entmax", x, alpha=1 + 1e-7), plain, 1e-5)
    check(normalize("entmax", x, alpha=2), sparse)
    check(normalize("entmax", x), normalize("entmax15", x))
    check(normalize("fusedmax", x, lam=0), sparse)
    check(normalize("oscarmax", x, alpha=0, beta=0), sparse)
    argmax = torch.nn.functional.one_hot(x.argmax(-1), 20).double()
    check(normalize("rsoftmax", x, sparsity=1.0), argmax)
    check(normalize("rsoftmax", x, sparsity=0.99), argmax, 1e-2)
    check(normalize("tsoftmax", x, t=1e9), plain, 1e-7)
    check(normalize("topk_softmax", x, k=20), plain)
    check(normalize("topk_softmax", x, k=1), argmax)
    check(normalize("scalable_softmax", x, s=1 / math.log(20)), plain)
    check(normalize("adaptive_temperature", x, training=True), plain)
    assert (normalize("rsoftmax", x, sparsity=0.5) == 0).sum(-1).eq(10).all()


def test_training_mode():
    x = torch.randn(3, 10, dtype=torch.float64)
    sharp = normalize("adaptive_temperature", x)
    assert torch.equal(normalize("adaptive_temperature", x, training=True, apply_in_training=True), sharp)
    assert not torch.allclose(normalize("adaptive_temperature", x, training=True), sharp)
    kept = normalize("evsoftmax", x) > 0
    training = normalize("evsoftmax", x, training=True)
    weights = x.softmax(-1) * torch.where(kept, 1.0, 1e-6)
    torch.testing.assert_close(training, weights / weights.sum(-1, keepdim=True))


def test_equal_scores():
    x = torch.full((2, 7), 0.1)
    for name, options in CASES:
        if name != "topk_softmax" and name not in FREE:
            torch.testing.assert_close(normalize(name, x, **options), torch.full((2, 7), 1 / 7), msg=name)
    assert normalize("topk_softmax", x, k=3).gt(0).tolist() == [[True] * 3 + [False] * 4] * 2


def test_sparse_functions_give_exact_zeros():
    x = 3 * torch.randn(50, 64)
    for name in SPARSE:
        share = (normalize(name, x, **({"k": 8} if name == "topk_softmax" else {})) == 0).float().mean()
        assert share > 0.3, name


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("nonsense", {}, ValueError, "registered are"),
        ("entmax", {"aplha": 1.5}, TypeError, "no option 'aplha'.*alpha"),
        ("tsoftmax", {}, TypeError, "needs the option 't'"),
        ("topk_softmax", {}, TypeError, "needs the option 'k'"),
        ("topk_softmax", {"k": 0}, ValueError, "k of the normalizer 'topk_softmax' must be an integer >= 1, got 0"),
        ("topk_softmax", {"k": 2.5}, ValueError, "integer"),
        ("entmax", {"alpha": 0.9}, ValueError, "alpha .* a number >= 1"),
        ("entmax", {"alpha": "1.5"}, ValueError, "alpha .* a number >= 1"),
        ("entmax", {"learn": 1}, ValueError, "learn .* true or false"),
        ("entmax", {"learn": True, "alpha": 1.0}, ValueError, "strictly between 1 and 2"),
        ("entmax", {"learn": True, "alpha": 2.0}, ValueError, "strictly between 1 and 2"),
        ("rsoftmax", {"sparsity": 1.5}, ValueError, r"sparsity .* \[0, 1\]"),
        ("rsoftmax", {"learn": True, "sparsity": 0}, ValueError, "strictly between 0 and 1"),
        ("fusedmax", {"lam": -1}, ValueError, "lam .* >= 0"),
        ("oscarmax", {"beta": -1}, ValueError, "beta .* or null"),
        ("softmax", {"temperature": 0}, ValueError, "temperature .* > 0"),
        ("tsoftmax", {"t": 0}, ValueError, "t of .* > 0"),
        ("scalable_softmax", {"s": True}, ValueError, "s of .* > 0"),
        ("sparsemax", {"k": 3}, TypeError, "Its options: none"),
    ],
)
def test_mistakes(name, options, error, text):
    if not options.get("learn"):
        with pytest.raises(error, match=text):
            normalize(name, torch.randn(3), **options)
    with pytest.raises(ValueError, match=text):
        build_normalizer(MultiMaxConfig(normalizer=name, normalizer_kwargs=options), None)


def test_mistakes_of_type():
    for name, options in CASES:
        with pytest.raises(TypeError, match="floating point"):
            normalize(name, torch.arange(3), **options)
        with pytest.raises(TypeError, match="floating point tensor, got list"):
            normalize(name, [1.0, 2.0], **options)
        with pytest.raises(ValueError, match="a single number"):
            normalize(name, torch.tensor(1.0), **options)
        with pytest.raises(TypeError, match="boolean"):
            normalize(name, torch.randn(3), mask=torch.ones(3), **options)
        for mask in (torch.ones(2, dtype=torch.bool), torch.ones(2, 1, 3, dtype=torch.bool)):
            with pytest.raises(ValueError, match=r"does not broadcast to scores \[2, 3\]"):
                normalize(name, torch.randn(2, 3), mask=mask, **options)
    with pytest.raises(ValueError, match="patched models"):
        normalize("entmax", torch.randn(3), learn=True)
    with pytest.raises(ValueError, match="must be empty for 'multimax'"):
        build_normalizer(MultiMaxConfig(normalizer_kwargs={"order": 2}), None)
    with pytest.raises(ValueError, match="no output loss"):
        patch_model(make("GPT2LMHeadModel"), normalizer="sparsemax", output=True)


@every_case
def test_without_the_entmax_package_a_normalizer_works_or_says_what_to_install(name, options, monkeypatch):
    x = torch.randn(3, 5, dtype=torch.float64)  # in float32 compiled functions run, which need no package
    expected = normalize(name, x, **options)
    monkeypatch.setitem(sys.modules, "entmax", None)
    if load()[0] is not None:
        torch.testing.assert_close(normalize(name, x.float(), **options), expected.float())
    if name in ("sparsemax", "entmax15", "fusedmax", "oscarmax"):
        with pytest.raises(ImportError, match=f"normalizer '{name}' needs the entmax package: pip install entmax"):
            normalize(name, x, **options)
    else:
        assert torch.equal(normalize(name, x, **options), expected)


# -- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize(
    "architecture",
    [
        "GPT2LMHeadModel",
        "ViTForImageClassification",
        pytest.param("T5ForConditionalGeneration", marks=pytest.mark.slow),
        pytest.param("MarianMTModel", marks=pytest.mark.slow),
    ],
)
def test_trains_saves_and_loads(architecture, patch, tmp_path):
    model = patch_model(make(architecture), **PATCHES[patch])
    batch = inputs_for(model)
    before = {name: parameter.detach().clone() for name, parameter in multimax_parameters(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    if patch not in ("multimax", "affine", "per-head"):  # those start at the identity
        assert not any(torch.equal(before[name], p) for name, p in multimax_parameters(model).items())

    model.eval()
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / part / "model.safetensors") for part in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize("patch", PATCHES)
def test_no_future_leak_and_same_with_a_cache(patch):
    model = patch_model(make("GPT2LMHeadModel"), **PATCHES[patch])
    x = inputs_for(model, labels=False, padded=False)["input_ids"]
    changed = x.clone()
    changed[:, 6:] = 5
    with torch.no_grad():
        full, other = model(x).logits, model(changed).logits
        torch.testing.assert_close(full[:, :6], other[:, :6], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(full[:, 6:], other[:, 6:])
        cache = model(x[:, :4], use_cache=True).past_key_values
        rest = [model(x[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(4, x.shape[1])]
        torch.testing.assert_close(torch.cat(rest, 1), full[:, 4:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("patch", PATCHES)
def test_padding_does_not_count(patch):
    model = patch_model(make("GPT2LMHeadModel"), **PATCHES[patch])
    x = inputs_for(model, labels=False, padded=False)["input_ids"]
    padded = torch.cat([torch.zeros(2, 3, dtype=x.dtype), x], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(2, -1)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        actual = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(actual, model(x).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("patch", PATCHES)
def test_half_precision_and_autocast(patch):
    model = patch_model(make("GPT2LMHeadModel"), **PATCHES[patch])
    batch = inputs_for(model)
    expected = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert abs(model(**batch).loss - expected) < 0.2
    for dtype in (torch.bfloat16, torch.float16):
        outputs = model.to(dtype)(**batch, output_attentions=True)
        assert abs(outputs.loss - expected) < 0.2 and outputs.attentions[0].dtype == dtype
        visible = outputs.attentions[0][0].float().sum(-1)
        if patch not in FREE:
            torch.testing.assert_close(visible, torch.ones_like(visible), atol=2e-2, rtol=0)
        outputs.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad()


@pytest.mark.parametrize("name", SPARSE)
def test_attention_has_exact_zeros(name):
    options = {"k": 8} if name == "topk_softmax" else {}
    model = patch_model(make("GPT2LMHeadModel", n_positions=64), normalizer=name, normalizer_kwargs=options)
    attention = model.transformer.h[0].attn
    seen = []
    with pytest.MonkeyPatch.context() as patcher, torch.no_grad():
        x = torch.randint(3, 61, (2, 48))
        modulate = attention.multimax.modulate
        patcher.setattr(attention.multimax, "modulate", lambda scores: seen.append(scores) or modulate(scores))
        model(x, output_attentions=True)
        attention.c_attn.weight[:, :32] *= 3 / seen[0].std()
        attention.c_attn.bias[:32] *= 3 / seen[0].std()
        weights = model(x, output_attentions=True).attentions[0]
    torch.testing.assert_close(seen[1].std(), torch.tensor(3.0))
    visible = torch.ones(48, 48, dtype=torch.bool).tril()
    assert (weights[..., visible] == 0).float().mean() > 0.2
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 48))


@pytest.mark.parametrize("patch", ["entmax-learned", "entmax-heads", "rsoftmax-learned", "scalable-heads"])
def test_learned_parameters(patch, tmp_path):
    model = patch_model(make("GPT2LMHeadModel"), **PATCHES[patch])
    heads = (4,) if PATCHES[patch].get("per_head") else ()
    option = {"entmax": "alpha", "rsoftmax": "sparsity", "scalable_softmax": "s"}[PATCHES[patch]["normalizer"]]
    ours = multimax_parameters(model)
    assert list(ours) == [f"transformer.h.{i}.attn.multimax.{option}" for i in range(2)]
    assert all(p.shape == heads and p.dtype == torch.float32 for p in ours.values())
    initial = PATCHES[patch].get("normalizer_kwargs", {}).get(option, {"alpha": 1.5, "s": 0.43}.get(option))
    layer = model.transformer.h[0].attn.multimax
    torch.testing.assert_close(layer.values()[option], torch.full(heads, initial))
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    assert not set(ours) & set(trainer.get_decay_parameter_names(model))
    assert all(p.dtype == torch.float32 for p in multimax_parameters(copy.deepcopy(model).bfloat16()).values())
    model.bfloat16()
    assert model(**inputs_for(model)).loss.isfinite()


def test_modules_can_be_copied_and_pickled():
    x = torch.randn(2, 4, 3, 5)
    for patch in PATCHES.values():
        normalizer = build_normalizer(MultiMaxConfig(**patch), 4 if patch.get("per_head") else None)
        for other in (copy.deepcopy(normalizer), pickle.loads(pickle.dumps(normalizer))):
            assert torch.equal(other(x), normalizer(x)) and repr(other) == repr(normalizer)


def test_learned_entmax_survives_saturation():
    model = patch_model(make("GPT2LMHeadModel"), **PATCHES["entmax-learned"])
    for parameter, value in zip(multimax_parameters(model).values(), (-200.0, 200.0)):
        torch.nn.init.constant_(parameter, value)
    model(**inputs_for(model)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_mode_follows_the_model():
    model = patch_model(make("GPT2LMHeadModel"), normalizer="adaptive_temperature")
    x = inputs_for(model, labels=False)["input_ids"]
    with torch.no_grad():
        sharp, plain = model(x).logits, model.train()(x).logits
        assert torch.allclose(plain, make("GPT2LMHeadModel")(x).logits, atol=1e-6)
        assert not torch.allclose(sharp, plain, atol=1e-6)


# -- a normalizer of one's own -----------------------------------------------------------------------------------------


@rowwise
def _power(x, keep, exponent=2.0):
    weight = (x - x.masked_fill(~keep, math.inf).amin(-1, keepdim=True)).masked_fill(~keep, 0.0) ** exponent + 1e-6
    weight = weight.masked_fill(~keep, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def _written_out(x, dim=-1, mask=None, temperature=1.0):
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
    return (x / temperature).masked_fill(~keep, -1e9).softmax(dim).masked_fill(~keep, 0.0)


def test_own_normalizer(tmp_path):
    if "test_power" not in _REGISTRY:
        register_normalizer("test_power", _power)
        register_normalizer("test_written_out", _written_out)
    torch.testing.assert_close(normalize("test_power", torch.randn(3, 4), exponent=1.5).sum(-1), torch.ones(3))
    for name, options in (("test_power", {"exponent": 3.0}), ("test_written_out", {"temperature": 2.0})):
        model = patch_model(make("GPT2LMHeadModel"), normalizer=name, normalizer_kwargs=options)
        batch = inputs_for(model)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(10):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.eval().save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.transformer.h[0].attn.multimax.options == options
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    with pytest.raises(ValueError, match="registered already"):
        register_normalizer("test_power", _power)
    with pytest.raises(ValueError, match="no option 'power'.*exponent"):
        patch_model(make("GPT2LMHeadModel"), normalizer="test_power", normalizer_kwargs={"power": 1})
    with pytest.raises(ValueError, match="must take"):
        register_normalizer("test_bad", lambda x, keep: x)
    config = json.loads((tmp_path / "config.json").read_text())
    config["multimax"]["normalizer"] = "test_unknown"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="test_unknown.*register_normalizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- annealing ---------------------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        tokens = torch.randint(3, 61, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer_for(model, path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=Texts(), callbacks=[SparsityAnnealing(0.1, 0.7, 6)])


def sparsities(model) -> set[float]:
    layers = {m.options["sparsity"] for m in model.modules() if isinstance(m, FunctionNormalizer)}
    return {round(value, 6) for value in layers | {model.config.multimax["normalizer_kwargs"]["sparsity"]}}


def test_annealing_saves_loads_and_resumes(tmp_path):
    model = patch_model(make("GPT2LMHeadModel"), normalizer="rsoftmax")
    trainer_for(model, tmp_path, 4).train()
    assert sparsities(model) == {0.5}  # 0.1 + 4/6 * 0.6
    assert AutoConfig.from_pretrained(tmp_path / "checkpoint-2").multimax["normalizer_kwargs"][
        "sparsity"
    ] == pytest.approx(0.3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert sparsities(loaded) == {0.5}
    batch = inputs_for(model)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)

    fresh = patch_model(make("GPT2LMHeadModel"), normalizer="rsoftmax")
    trainer_for(fresh, tmp_path, 8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sparsities(fresh) == {0.7}  # past the last step of the annealing


@pytest.mark.parametrize("normalizer", sorted(REFERENCES.keys() - {"multimax", "softmax"}))
def test_annealing_from_softmax(normalizer, tmp_path):
    """Any function: the first step computes the stock model, the last one the function; checkpoints hold the share."""
    options = {"tsoftmax": {"t": 3.0}, "topk_softmax": {"k": 4}}.get(normalizer, {})
    stock = make("GPT2LMHeadModel")
    model = patch_model(copy.deepcopy(stock), normalizer=normalizer, normalizer_kwargs=options).eval()
    batch = inputs_for(model)
    with torch.no_grad():
        whole = model(**batch).logits
        set_share(model, 0.0)
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
        set_share(model, 0.3)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        set_share(model, 1.0)
        assert torch.equal(model(**batch).logits, whole)


def test_annealing_from_softmax_while_training(tmp_path):
    model = patch_model(make("GPT2LMHeadModel"), normalizer="sparsemax")
    trainer = trainer_for(model, tmp_path, 4)
    trainer.pop_callback(SparsityAnnealing)
    trainer.add_callback(NormalizerAnnealing(8))
    trainer.train()
    layers = [m for m in model.modules() if isinstance(m, FunctionNormalizer)]
    assert {layer.share for layer in layers} == {0.5}
    assert AutoConfig.from_pretrained(tmp_path / "checkpoint-2").multimax["normalizer_kwargs"] == {"share": 0.25}
    with pytest.raises(ValueError, match="no layer to anneal"):
        set_share(patch_model(make("GPT2LMHeadModel")), 0.5)
    for share in (-0.1, 1.5, True, "all"):
        with pytest.raises(ValueError, match="share of the normalizer 'sparsemax'"):
            build_normalizer(MultiMaxConfig(normalizer="sparsemax", normalizer_kwargs={"share": share}), None)


@pytest.mark.parametrize("patch", ["entmax-identity", "scalable-identity", "asentmax-identity"])
def test_identity_starts_as_softmax_and_leaves_it(patch):
    model, stock = patch_model(make("GPT2LMHeadModel"), **PATCHES[patch]).eval(), make("GPT2LMHeadModel").eval()
    batch = inputs_for(model)
    torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
    model(**batch).loss.backward()
    grads = {name.rpartition(".")[2]: p.grad for name, p in multimax_parameters(model).items()}
    assert all(grads[name].abs().sum() > 0 for name in grads if name != "gamma")  # beta = 0 silences gamma at first
    layer = next(m for m in model.modules() if isinstance(m, FunctionNormalizer))
    if "alpha" in layer.learned:  # beyond its borders alpha stays there, and comes back
        torch.nn.init.constant_(layer.alpha, -0.5)
        assert (layer.values()["alpha"] == 1.0).all()
        layer.values()["alpha"].sum().backward()
        assert layer.alpha.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="init of .* 'default' or 'identity'"):
        build_normalizer(MultiMaxConfig(normalizer=layer.name, normalizer_kwargs={"init": "softmax"}), None)
    with pytest.raises(ValueError, match="patched models start"):
        normalize(layer.name, torch.randn(3), init="identity")


def test_asentmax_starts_where_its_authors_do():
    layer = build_normalizer(MultiMaxConfig(normalizer="asentmax"), 4000)
    assert layer.beta.min() >= 0.1 and layer.beta.max() <= 1.0 and layer.beta.std() > 0.2
    assert layer.gamma.std().item() == pytest.approx(0.1, rel=0.1) and "alpha" not in layer.learned
    fixed = build_normalizer(MultiMaxConfig(normalizer="asentmax", normalizer_kwargs={"beta": 0.3, "gamma": 0.0}), 2)
    assert torch.equal(fixed.beta, torch.full((2,), 0.3)) and torch.equal(fixed.gamma, torch.zeros(2))


def test_annealing_needs_fixed_rsoftmax(tmp_path):
    for patch, text in ((PATCHES["rsoftmax-learned"], "learned"), ({}, "no r-softmax")):
        model = patch_model(make("GPT2LMHeadModel"), **patch)
        with pytest.raises(ValueError, match=text):
            set_sparsity(model, 0.5)
        with pytest.raises(ValueError, match=text):
            trainer_for(model, tmp_path, 1).train()
    for arguments in ((-0.1, 0.5, 3), (0.1, 1.5, 3), (0.1, 0.5, 0)):
        with pytest.raises(ValueError, match="SparsityAnnealing"):
            SparsityAnnealing(*arguments)


def test_max_retrieval_recipe(tmp_path):
    main(["--tiny", "--no-figure", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["function"] for row in rows} == set(FUNCTIONS) and {row["items"] for row in rows} == {16, 64}
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["weight_of_maximum"] <= 1 for row in rows)
    assert {fields["normalizer"] for fields in FUNCTIONS.values()} == set(REFERENCES)
    assert "adaptive_temperature" in (tmp_path / "table.md").read_text()


def test_benchmark_times():
    for label, name, options in (
        ("fusedmax", "fusedmax", {}),
        ("multimax", "multimax", {}),
        ("entmax15", "entmax15", {}),
    ):
        timed = timings(label, name, options, 2, 8, "cpu", 0.01)
        assert len(timed) == (6 if label == "entmax15" else 4) and all(value > 0 for value in timed.values())


def test_public_names():
    assert hf_multimax.normalize is normalize and hf_multimax.register_normalizer is register_normalizer
