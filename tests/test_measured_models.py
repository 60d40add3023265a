"""Measures of whole models, streamed in tiles, against loops in float64 over full matrices."""

import gc
import math

import pytest
import torch
from models import inputs_for, make
from test_diagnostics import loop_multi_modality, loop_sparsity
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import zoo_model

import hf_multimax
from hf_multimax import MultiMax, backend, patch_model
from hf_multimax.attention.tiled import tiles
from hf_multimax.diagnostics import (
    MEASURES,
    ScoreHistogram,
    attention_maps,
    attention_rollout,
    falls,
    measure_model,
    measure_models,
    models,
    same_weight,
)
from hf_multimax.functional import masked_softmax
from hf_multimax.normalizers.base import named_normalizers


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of every axis."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 60)
    monkeypatch.setattr(tiles, "SMALLEST_HEIGHT", 3)
    monkeypatch.setattr(tiles, "CAUSAL_ROWS", 4)
    monkeypatch.setattr(models, "PIECE", 50)


def randomised(model, scale=0.3):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in hf_multimax.multimax_parameters(model).values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def loops(x, p, keep):
    """Every measure of rows ``[rows, keys]`` by loops over lists."""
    rows = [p_row[k].tolist() for p_row, k in zip(p, keep) if k.any()]
    full = [row for row in rows if sum(row) > 0]
    return {
        "sparsity": loop_sparsity(x, p, keep)[0],
        "multi_modality": loop_multi_modality(x, p, keep)[0],
        "entropy": sum(-sum(q * math.log(q) for q in row if q > 0) for row in full) / len(full),
        "topk_mass": sum(sum(sorted(row)[-8:]) for row in full) / len(full),
        "exact_zeros": sum(sum(q == 0 for q in row) / len(row) for row in rows) / len(rows),
        "entries_above": sum(sum(q > 0.01 for q in row) for row in full) / len(full),
    }


@torch.no_grad()
def whole_matrices(model, batches):
    """Scores, probabilities and masks of every layer, and the logits before their modulator, one list per batch."""
    seen = {}
    for name, normalizer in named_normalizers(model):
        original = type(normalizer)

        def modulate(x, name=name, normalizer=normalizer, original=original):
            seen.setdefault(name, []).append([x])
            return original.modulate(normalizer, x)

        def normalize(x, dim=-1, mask=None, name=name, normalizer=normalizer, original=original):
            p = original.normalize(normalizer, x, dim, mask)
            mask = torch.ones_like(p, dtype=torch.bool) if mask is None else mask.expand(p.shape)
            seen[name][-1] += [p, mask]
            return p

        normalizer.modulate, normalizer.normalize = modulate, normalize
    logits = []
    with backend("eager"):
        for batch in batches:
            logits.append(model(**batch).logits)
    for _, normalizer in named_normalizers(model):
        del normalizer.modulate, normalizer.normalize
    return seen, logits


CASES = {
    "GPT2LMHeadModel": {},
    "GPT2LMHeadModel, output": {"output": True, "per_head": True},
    "GPT2LMHeadModel, affine": {"affine": True},
    "GPT2LMHeadModel, sparsemax": {"normalizer": "sparsemax"},
    "ViTForImageClassification": {"output": True},
    "MarianMTModel": {},
    "T5ForConditionalGeneration": {"output": True},
    "GptOssForCausalLM": {},  # attention sinks
    "MistralForCausalLM": {},  # sliding windows, grouped heads
    "BloomForCausalLM": {},  # outside the attention interface
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_measure_equals_loops_over_full_matrices(case, padded):
    name = case.split(",")[0]
    model = (make(name) if name.startswith(("GPT2", "ViT", "Marian", "T5")) else zoo_model(name)).double()
    if name == "GptOssForCausalLM":  # its experts know no float64
        model.float()
    randomised(patch_model(model, **CASES[case]))
    if name.startswith(("GPT2", "ViT", "Marian", "T5")):
        batches = [inputs_for(model, padded=padded, seed=seed) for seed in (1, 2)]
    else:
        ids = torch.randint(3, 30, (2, 11), generator=torch.Generator().manual_seed(1))
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
        if padded:
            batches[0]["attention_mask"][1, 8:] = 0
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]

    measured = measure_model(model, iter(batches))

    rel = 1e-6 if name in ("GptOssForCausalLM", "BloomForCausalLM") else 1e-9  # these two compute scores in float32
    seen, logits = whole_matrices(model, batches)
    layers = [layer for layer, _ in named_normalizers(model) if layer != "multimax_output"]
    assert list(measured) == [*layers, "output"]
    for layer in layers:
        normalizer = dict(named_normalizers(model))[layer]
        heads = []
        for batch, (x, p, keep) in zip(batches, seen[layer], strict=True):
            real = None if "pixel_values" in batch else batch.get("attention_mask")
            if "decoder" in layer:
                real = batch["labels"] != -100
            x, p, keep = x, p[..., : x.shape[-1]], keep[..., : x.shape[-1]].clone()
            real = torch.ones(x.shape[0], x.shape[2]) if real is None else real
            for head in range(x.shape[1]):
                chosen = real.bool()
                heads.append((head, x[:, head][chosen], p[:, head][chosen], keep[:, head][chosen]))
        width = max(part[1].shape[-1] for part in heads)
        assert all(part[1].shape[-1] == width for part in heads)

        def joined(*chosen, heads=heads):
            return [torch.cat([part[i] for part in heads if part[0] in chosen]) for i in (1, 2, 3)]

        every = range(len(measured[layer].heads))
        compare(measured[layer].measures, loops(*joined(*every)), rel)
        compare(measured[layer].heads[1], loops(*joined(1)), rel)
        x, _, keep = joined(*every)
        if measured[layer].softmax:
            compare(measured[layer].softmax, loops(x, masked_softmax(x, -1, keep), keep), rel)
        check_scores(measured[layer], normalizer, x[keep], [joined(head)[0][joined(head)[2]] for head in every])
    x, modulator = torch.cat([part.reshape(-1, part.shape[-1]) for part in logits]), None
    if "multimax_output" in seen:
        modulator = model.multimax_output
        x = torch.cat([part[0].reshape(-1, part[0].shape[-1]) for part in seen["multimax_output"]])
    rows = [torch.ones(part.shape[:-1], dtype=torch.bool).flatten() for part in logits]
    if logits[0].ndim == 3:
        key = "labels" if model.config.is_encoder_decoder else "attention_mask"
        rows = [(b[key] != -100 if key == "labels" else b[key].bool()).flatten() for b in batches if key in b] or rows
    x = x[torch.cat(rows)].double()
    with torch.no_grad():
        p = x.softmax(-1) if modulator is None else modulator.modulate(x).softmax(-1)
    compare(measured["output"].measures, loops(x, p, torch.ones_like(x, dtype=torch.bool)), rel)


def compare(measures, expected, rel):
    assert set(measures) == set(MEASURES)
    for name, measure in measures.items():
        assert measure.value == pytest.approx(expected[name], rel=rel, abs=1e-9), name


def check_scores(layer, normalizer, x, of_heads):
    """The histogram and the shares of falls of all kept scores ``x``, and of those of each head."""
    histogram = layer.scores
    assert float(x.abs().max()) < histogram.reach <= max(1.0, 2 * float(x.abs().max()))
    edges = torch.linspace(-histogram.reach, histogram.reach, histogram.BINS + 1, dtype=torch.float64)
    expected = torch.histogram(x.detach().double(), edges).hist.long()
    assert torch.equal(histogram.counts.sum(0), expected)
    for at, found in zip((0.05, 0.5, 0.95), histogram.quantiles((0.05, 0.5, 0.95))):
        low, high = (torch.quantile(x.double(), at, interpolation=kind).item() for kind in ("lower", "higher"))
        assert low - histogram.width <= found <= high + histogram.width
    if isinstance(normalizer, MultiMax):
        assert [fall for fall, _ in layer.falls] == falls(normalizer)
    for fall, share in layer.falls:
        scores = x if fall.head is None else of_heads[fall.head]
        assert share == pytest.approx(((scores > fall.low) & (scores < fall.high)).double().mean().item())


def test_a_histogram_does_not_depend_on_the_pieces():
    x = 40 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.8
    whole, pieces = ScoreHistogram(3), ScoreHistogram(3)
    whole.add(x, keep)
    for row in torch.randperm(5, generator=torch.Generator().manual_seed(2)).tolist():
        pieces.add(x[:, :, row : row + 1] * 1.0, keep[:, :, row : row + 1])
    assert whole.reach == pieces.reach and torch.equal(whole.counts, pieces.counts)
    assert int(whole.counts.sum()) == 3 * int(keep.sum())
    edges, counts = whole.coarse(20)
    assert len(counts) <= 20 and sum(counts) == int(whole.counts.sum()) and len(edges) == len(counts) + 1
    assert edges[0] <= x[keep.expand_as(x)].min() and edges[-1] >= x[keep.expand_as(x)].max()


def modulator(ranges, ts, **options):
    module = MultiMax(order=len(ranges[0] if isinstance(ranges[0], list) else ranges) // 2, **options)
    with torch.no_grad():
        module.ranges.copy_(torch.tensor(ranges))
        module.ts.copy_(torch.tensor(ts))
    return module


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("affine", [None, (1.5, 0.4), (-0.7, 0.2)])
def test_falls_are_where_the_curve_falls(order, affine):
    generator = torch.Generator().manual_seed(order)
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    some = 0
    for _ in range(30):
        if affine and order > 1:
            return
        module = MultiMax(order=None if affine else order, affine=affine is not None)
        with torch.no_grad():
            module.ranges.copy_(torch.randn(2 * order, generator=generator))
            module.ts.copy_(torch.randn(2 * order, generator=generator))
            if affine:
                module.scale.fill_(affine[0])
                module.shift.fill_(affine[1])
            y = module.modulate(x)
        falling = y.diff() < -1e-9
        inside = torch.zeros_like(falling)
        for fall in falls(module):
            inside |= (x[:-1] >= fall.low) & (x[1:] <= fall.high)
        some += int(falling.any())
        assert int((falling ^ inside).sum()) <= 2 * 2 * len(falls(module)) + 2
    assert some > 5


def test_a_sigma_that_rises_again_is_named():
    # sigma(x) = x + 0.4 (-x)^2 for x < 0: lowest at -1.25, and -2.5 weighs as 0
    module = modulator([0.0, 5.0, 0.0, 5.0], [0.0, 0.0, 0.4, 0.0])
    (fall,) = falls(module)
    assert fall.low == -math.inf and fall.high == pytest.approx(-1.25) and fall.head is None
    assert same_weight(module, -2.5) == pytest.approx(0.0, abs=1e-5)
    assert same_weight(module, -1.0) is None
    assert same_weight(module, -2.0) == pytest.approx(-0.5, abs=1e-5)
    heads = modulator([[0.0, 5.0], [0.0, 1.0]], [[0.5, 0.0], [0.0, -2.0]], num_heads=2)
    (fall,) = falls(heads)
    assert (fall.low, fall.high, fall.head) == (1.0, math.inf, 1)
    assert same_weight(heads, 2.0, head=1) is None
    assert falls(MultiMax()) == []


def test_models_are_measured_on_the_same_batches():
    first, second = randomised(patch_model(make("GPT2LMHeadModel"))), make("GPT2LMHeadModel", seed=3)
    batches = [inputs_for(first, seed=seed) for seed in (1, 2)]
    both = measure_models({"a": first, "b": second}, iter(batches), s=0.1, prob_eps=0.05)
    for name, model in (("a", first), ("b", second)):
        alone = measure_model(model, batches, s=0.1, prob_eps=0.05)
        assert {k: v.to_dict() for k, v in both[name].items()} == {k: v.to_dict() for k, v in alone.items()}
        references = [layer.measures["sparsity"].s for layer in both[name].values()]
        assert references[0] is not None and all(s is None or s == pytest.approx(0.1) for s in references)
    assert not hf_multimax.is_patched(second)
    with pytest.raises(ValueError, match="given twice"):
        measure_models({"a": first, "b": first}, batches)
    with pytest.raises(TypeError, match="no option 'epsilon'"):
        measure_models({"a": first}, batches, epsilon=1)


def test_broken_scores_are_an_error():
    model = make("GPT2LMHeadModel")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"transformer.h.1.attn has scores that are NaN or infinite"):
        measure_model(model, [inputs_for(model)])
    assert not hf_multimax.is_patched(model)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_grows_neither_with_batches_nor_with_a_score_matrix(monkeypatch):
    for module, name in ((tiles, "TILE_ELEMENTS"), (models, "PIECE")):
        monkeypatch.setattr(module, name, 4096)
    model = patch_model(make("GPT2LMHeadModel", n_positions=512))
    live = []

    def batches(length, count):
        for _ in range(count):
            # other tests' symbolic tensors have no number of elements
            real = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
            live.append(sum(x.numel() for x in real))
            yield {"input_ids": torch.randint(3, 60, (2, length))}

    for length in (64, 512):
        with Largest() as mode:
            measure_model(model, batches(length, 1))
        # the widest layer of the model, the histogram, or a tile of the fewest rows; never [length, length]
        assert mode.elements <= max(2 * length * 128, ScoreHistogram.BINS * 4 + 1, 4 * 3 * length)
    live.clear()
    measure_model(model, batches(64, 6))
    assert max(live[2:]) <= live[1] * 1.01


def test_maps_are_the_weights_and_rollout_their_product():
    model = randomised(patch_model(make("GPT2LMHeadModel").double()))
    batch = inputs_for(model, labels=False)
    maps = attention_maps(model, batch)
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
    assert list(maps) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    for found, weights in zip(maps.values(), expected, strict=True):
        assert torch.allclose(found, weights)
    total = attention_rollout(list(maps.values()))
    eye = torch.eye(11, dtype=torch.float64)
    by_hand = (eye + expected[1][0].mean(0)) / 2 @ ((eye + expected[0][0].mean(0)) / 2)
    assert torch.allclose(total[0], by_hand)
    assert torch.allclose(total.sum(-1), torch.ones(2, 11, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"number 1 is \[1, 2, 3, 4\]"):
        attention_rollout([torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4)])
    with pytest.raises(ValueError, match="residual must be"):
        attention_rollout([torch.ones(1, 2, 3, 3)], residual=1.5)
