"""The measures against loops written from Definitions 3.2 and 3.3, and the measurement of whole models."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hf_multimax
from hf_multimax import MultiMax, patch_model
from hf_multimax.diagnostics import (
    Measure,
    attention_statistics,
    entropy,
    modulator_curve,
    multi_modality,
    sparsity,
    topk_mass,
)


def rows_of(x, p, keep):
    """Kept scores and probabilities of every row, as lists of floats."""
    for row_x, row_p, row_keep in zip(
        x.reshape(-1, x.shape[-1]), p.reshape(-1, x.shape[-1]), keep.reshape(x.shape).reshape(-1, x.shape[-1])
    ):
        yield row_x[row_keep].tolist(), row_p[row_keep].tolist()


def threshold(x, eps, prob_eps):
    if eps is not None:
        return eps
    top = max(x)
    return math.log(prob_eps or 1 / len(x)) + top + math.log(sum(math.exp(value - top) for value in x))


def loop_multi_modality(x, p, keep, eps=None, prob_eps=None):
    values, undefined = [], 0
    for xs, ps in rows_of(x, p, keep):
        chosen = [q for y, q in zip(xs, ps) if threshold(xs, eps, prob_eps) < y < max(xs)] if xs else []
        if chosen:
            values.append(1 - sum(max(ps) - q for q in chosen) / len(chosen))
        else:
            undefined += 1
    return sum(values) / len(values), undefined


def loop_sparsity(x, p, keep, eps=None, prob_eps=None, s=None):
    values, undefined, references = [], 0, []
    for xs, ps in rows_of(x, p, keep):
        reference = s or 1 / max(len(xs), 1)
        chosen = [q for y, q in zip(xs, ps) if y < threshold(xs, eps, prob_eps)] if xs else []
        if chosen:
            values.append(sum(math.exp((reference - q) / reference - 1) for q in chosen) / len(chosen))
            references.append(reference)
        else:
            undefined += 1
    return sum(values) / len(values), undefined, sum(references) / len(references)


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 4, 11, 17, generator=generator, dtype=torch.float64)
    keep = torch.rand(x.shape, generator=generator) < 0.7
    keep[0, 0, :3] = False  # rows that attend to nothing
    keep[0, 1, :2, 1:] = False
    keep[0, 1, :2, 0] = True  # rows of one entry
    p = hf_multimax.multimax(x, torch.tensor([-1.0, 0.5]), torch.tensor([0.4, 0.3]), mask=keep)
    return x, p, keep


@pytest.mark.parametrize("options", [{}, {"eps": -0.5}, {"prob_eps": 0.05}, {"eps": 100.0}, {"eps": 3.5}])
def test_measures_equal_loops_over_the_definitions(scores, options):
    x, p, keep = scores
    if options.get("eps") != 100.0:
        value, undefined = loop_multi_modality(x, p, keep, **options)
        got = multi_modality(x, p, mask=keep, **options)
        assert got.value == pytest.approx(value, rel=1e-12) and got.undefined == undefined and got.s is None
    for s in (None, 0.2):
        value, undefined, reference = loop_sparsity(x, p, keep, s=s, **options)
        got = sparsity(x, p, mask=keep, s=s, **options)
        assert got.value == pytest.approx(value, rel=1e-12) and got.undefined == undefined
        assert got.s == pytest.approx(reference, rel=1e-12)


def test_entropy_and_topk_mass_equal_loops(scores):
    x, p, keep = scores
    rows = [ps for _, ps in rows_of(x, p, keep) if ps]
    empty = x[..., 0].numel() - len(rows)
    expected = sum(-sum(q * math.log(q) for q in ps if q > 0) for ps in rows) / len(rows)
    assert entropy(p, mask=keep) == Measure(pytest.approx(expected, rel=1e-12), empty)
    for k in (1, 3, 1000):
        expected = sum(sum(sorted(ps)[-k:]) for ps in rows) / len(rows)
        assert topk_mass(p, k, mask=keep) == Measure(pytest.approx(expected, rel=1e-12), empty)


def test_known_values():
    # three entries of which one is top, one relevant and one irrelevant
    x, p = torch.tensor([2.0, 1.0, -5.0]), torch.tensor([0.6, 0.4, 0.0])
    assert multi_modality(x, p, eps=0.0).value == pytest.approx(0.8)
    assert sparsity(x, p, eps=0.0) == Measure(pytest.approx(1.0), 0, pytest.approx(1 / 3))
    assert sparsity(x, torch.tensor([0.5, 0.4, 0.1]), eps=0.0, s=0.1).value == pytest.approx(math.exp(-1))
    undefined = multi_modality(x, p, eps=1.5)
    assert math.isnan(undefined.value) and undefined.undefined == 1
    assert sparsity(x, p, eps=-6.0).undefined == 1


def test_a_mask_is_a_truncation_and_so_is_minus_infinity(scores):
    x, p, _ = scores
    keep = torch.arange(x.shape[-1]) < 9
    x_short = x[..., :9]
    p_short = x_short.softmax(-1)
    p_masked = hf_multimax.normalize("softmax", x, mask=keep)
    for measure in (multi_modality, sparsity):
        short = measure(x_short, p_short)
        masked = measure(x, p_masked, mask=keep)
        infinite = measure(x.masked_fill(~keep, float("-inf")), p_masked)
        assert masked == infinite == pytest.approx(tuple(short) if measure is sparsity else short[:2] + (None,))


def test_any_dimension_and_any_floating_type(scores):
    x, p, keep = scores
    for measure in (multi_modality, sparsity):
        moved = measure(x.transpose(1, 3), p.transpose(1, 3), dim=1, mask=keep.transpose(1, 3))
        assert moved.value == pytest.approx(measure(x, p, mask=keep).value, rel=1e-12)
        assert measure(x.bfloat16(), p.bfloat16()).value == pytest.approx(measure(x, p).value, abs=0.02)


def test_wrong_arguments_name_the_culprit():
    x, p = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3\] and \[3\]"):
        sparsity(x, p[0])
    with pytest.raises(ValueError, match="eps and prob_eps"):
        sparsity(x, p, eps=0.0, prob_eps=0.1)
    with pytest.raises(ValueError, match="s must be a probability"):
        sparsity(x, p, s=0.0)
    with pytest.raises(ValueError, match="prob_eps must be"):
        multi_modality(x, p, prob_eps=1.5)
    with pytest.raises(ValueError, match="k must be >= 1"):
        topk_mass(p, 0)
    with pytest.raises(TypeError, match="boolean"):
        entropy(p, mask=torch.ones(2, 3))


# -- models ----------------------------------------------------------------------------------------------------------


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def batches(sizes=(3, 1, 2)):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (size, 13), generator=generator)} for size in sizes]


def with_random_modulators(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in hf_multimax.multimax_parameters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def flat(statistics):
    return [
        tuple(-1.0 if part is None else part for part in m) for layer in statistics.values() for m in layer.values()
    ]


def recomputed(model, inputs):
    """Scores and probabilities of the first layer, computed from its weights."""
    block = model.transformer.h[0]
    hidden = model.transformer.wte(inputs) + model.transformer.wpe(torch.arange(inputs.shape[1]))
    q, k, _ = block.attn.c_attn(block.ln_1(hidden)).double().split(32, dim=-1)
    q, k = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k))
    x = q @ k.transpose(-1, -2) / math.sqrt(8)
    keep = torch.ones(x.shape[-2:], dtype=torch.bool).tril().expand_as(x)
    return x, keep


@torch.no_grad()
@pytest.mark.parametrize("patched", [False, True])
def test_a_model_is_measured_on_its_scores_and_probabilities(patched):
    model, data = tiny_gpt2(), batches()
    if patched:
        with_random_modulators(patch_model(model))
    statistics = attention_statistics(model, data, s=0.1, k=2)
    assert list(statistics) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    x, keep = recomputed(model, torch.cat([batch["input_ids"] for batch in data]))
    ranges = ts = torch.zeros(4)
    if patched:
        ranges, ts = model.transformer.h[0].attn.multimax.ranges, model.transformer.h[0].attn.multimax.ts
    p = hf_multimax.multimax(x, ranges, ts, mask=keep)
    layer = statistics["transformer.h.0.attn"]
    for name, expected in {
        "sparsity": sparsity(x, p, s=0.1, mask=keep),
        "multi_modality": multi_modality(x, p, mask=keep),
        "entropy": entropy(p, mask=keep),
        "topk_mass": topk_mass(p, 2, mask=keep),
    }.items():
        assert layer[name].value == pytest.approx(expected.value, rel=1e-5), name
        assert layer[name].undefined == expected.undefined, name


def test_streaming_equals_the_whole():
    model = with_random_modulators(patch_model(tiny_gpt2()))
    data = batches()
    whole = [{"input_ids": torch.cat([batch["input_ids"] for batch in data])}]
    assert flat(attention_statistics(model, data)) == [
        pytest.approx(m, rel=1e-6) for m in flat(attention_statistics(model, whole))
    ]
    as_tensors = attention_statistics(model, (batch["input_ids"] for batch in data))
    assert flat(as_tensors) == flat(attention_statistics(model, data))


@pytest.mark.parametrize("patched", [False, True])
def test_measuring_leaves_the_model_as_it_was(patched):
    model, data = tiny_gpt2(), batches()
    if patched:
        with_random_modulators(patch_model(model))
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    cls, config, implementation = type(model), model.config.to_dict(), model.config._attn_implementation
    names = [name for name, _ in model.named_modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    before = model(data[0]["input_ids"]).logits

    attention_statistics(model, data)
    with pytest.raises(IndexError):
        attention_statistics(model, [*data, {"input_ids": torch.tensor([[1000]])}])

    torch.manual_seed(5)
    assert torch.equal(model(data[0]["input_ids"]).logits, before)
    assert [module.training for module in model.modules()] == modes
    assert type(model) is cls and model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all("modulate" not in vars(module) for module in model.modules())
    assert torch.is_grad_enabled() and hf_multimax.attention.choose.current_backend() == "auto"


def test_only_patched_layers_are_measured_and_the_output_modulator_is_none():
    model = patch_model(tiny_gpt2(), include=r"h\.1\.", output=True)
    assert list(attention_statistics(model, batches())) == ["transformer.h.1.attn"]


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        attention_statistics(tiny_gpt2(), [])
    with pytest.raises(TypeError, match="patch_model needs a Transformers model"):
        attention_statistics(torch.nn.Linear(2, 2), batches())


def test_modulator_curve():
    x = torch.linspace(-3, 3, 7)
    module = MultiMax(num_heads=2)
    with torch.no_grad():
        module.ts[1, 0] = 0.5
    curve = modulator_curve(module, x)
    assert curve.shape == (2, 7) and not curve.requires_grad
    assert torch.equal(curve[0], x)
    torch.testing.assert_close(curve[1], x + 0.5 * (-x).clamp_min(0))
    assert torch.equal(modulator_curve(MultiMax(), x), x)
