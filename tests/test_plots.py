"""Every figure, from tiny models: what is drawn is what was measured."""

import json

import pytest
import torch
from models import inputs_for, make
from test_measured_models import randomised

pytest.importorskip("matplotlib")

from hf_multimax import multimax, patch_model, plots
from hf_multimax.diagnostics import attention_maps, measure_model
from hf_multimax.normalizers.registry import get_normalizer, registered_normalizers
from hf_multimax.plots.style import short_names


@pytest.fixture(scope="module")
def measured():
    """What JSON has of a tiny GPT-2, layers without a modulator among them."""
    model = randomised(patch_model(make("GPT2LMHeadModel", n_layer=5), per_head=True), 0.4)
    layers = measure_model(model, [inputs_for(model, seed=seed) for seed in (1, 2)])
    assert any(layer.falls for layer in layers.values())
    found = {name: layer.to_dict() for name, layer in layers.items()}
    text = json.dumps(found).replace("-Infinity", "null").replace("Infinity", "null")  # as the command line writes it
    return json.loads(text)


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def written(figure, folder):
    """The figure is drawn without a warning and saved, as pixels and as lines."""
    for ending in ("png", "svg"):
        path = folder / f"figure.{ending}"
        plots.save(figure, path)
        start = path.read_bytes()[:8]
        assert start.startswith(b"\x89PNG") if ending == "png" else b"<?xml" in start
        assert path.stat().st_size > 5000


@pytest.mark.filterwarnings("error")
def test_sigma_over_the_scores(measured, tmp_path):
    figure = plots.plot_modulators_on_scores(measured)
    layers = [name for name in measured if name != "output"]
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == layers
    for axes, name in zip(panels, layers):
        identity, *heads = axes.get_lines()
        assert len(heads) == 4 and (identity.get_xdata() == identity.get_ydata()).all()
        x = torch.tensor(identity.get_xdata())
        ranges, ts = (torch.tensor(measured[name][key]) for key in ("ranges", "ts"))
        sigma = x + sum(
            ts[2, 2 * n] * (ranges[2, 2 * n] - x).clamp_min(0) ** (n + 1)
            + ts[2, 2 * n + 1] * (x - ranges[2, 2 * n + 1]).clamp_min(0) ** (n + 1)
            for n in (0, 1)
        )
        torch.testing.assert_close(torch.tensor(heads[2].get_ydata()), sigma)
    assert "score x" in texts(figure) and "falls" in texts(figure)
    written(figure, tmp_path)
    with pytest.raises(ValueError, match="no layer has"):
        plots.plot_modulators_on_scores({"output": measured["output"]})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["transformer.h.0.attn", "transformer.h.1.attn"], ["transformer.h.0.attn", "transformer.h.1.attn"]),
        (["a" * 20 + ".model.layers.0.attn", "a" * 20 + ".model.layers.1.attn"], ["layers.0.attn", "layers.1.attn"]),
        (["a" * 30 + ".encoder.0", "b.encoder.0"], ["a" * 30 + ".encoder.0", "b.encoder.0"]),
        (["a" * 30 + ".h.0"], ["a" * 30 + ".h.0"]),
    ],
)
def test_long_names_of_layers_lose_what_they_share(names, shown):
    assert short_names(names) == shown


def test_sparsity_against_multi_modality(measured, tmp_path):
    figure = plots.plot_measures({"one": measured, "two": measured})
    (axes,) = figure.axes
    points = {tuple(line.get_xydata()[0]) for line in axes.get_lines() if len(line.get_xydata()) == 1}
    for values in measured.values():
        assert tuple(values["measures"][key]["value"] for key in ("sparsity", "multi_modality")) in points
        if values["softmax"]:
            assert tuple(values["softmax"][key] for key in ("sparsity", "multi_modality")) in points
    assert {"sparsity", "multi-modality"} <= {axes.get_xlabel(), axes.get_ylabel()}
    sizes = {line.get_markersize() for line in axes.get_lines() if line.get_markerfacecolor() != "white"}
    assert len(sizes) >= 2  # of two in one place both are seen
    assert len({line.get_marker() for line in axes.get_lines() if len(line.get_xydata()) == 1}) == 2
    written(figure, tmp_path)
    with pytest.raises(ValueError, match="between one and 7"):
        plots.plot_measures({})


@pytest.mark.filterwarnings("error")
def test_the_simplex_of_every_function(tmp_path):
    modulator = {"ranges": [0.2, 0.7], "ts": [-1.0, -0.5]}
    figure = plots.plot_simplex(modulator=modulator)
    built_in = [name for name in registered_normalizers() if get_normalizer(name).citation]
    panels = {axes.get_title().split(",")[0].split("\n")[0]: axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == built_in
    (points,) = panels["multimax"].collections
    scores = torch.cartesian_prod(torch.linspace(-2.5, 2.5, 21), torch.linspace(-2.5, 2.5, 21), torch.zeros(1))
    p = multimax(scores, torch.tensor(modulator["ranges"]), torch.tensor(modulator["ts"]))
    at = torch.stack([p[:, 1] + p[:, 2] / 2, p[:, 2] * 0.75**0.5], dim=1)
    torch.testing.assert_close(torch.tensor(points.get_offsets().data, dtype=torch.float32), at)
    written(figure, tmp_path)
    with pytest.raises(ValueError, match="unknown normalizer"):
        plots.plot_simplex({"softmaxx": {}})


@pytest.mark.filterwarnings("error")
def test_maps_of_a_text(tmp_path):
    model = patch_model(make("GPT2LMHeadModel"), normalizer="sparsemax")
    batch = inputs_for(model, labels=False, padded=False)
    sparse, dense = (attention_maps(m, batch)["transformer.h.1.attn"][0] for m in (model, make("GPT2LMHeadModel")))
    tokens = [f"t{i}$" for i in range(11)]
    figure = plots.plot_text_maps({"sparsemax": sparse, "softmax": dense}, tokens)
    for axes, weights in zip(figure.axes, (sparse, dense)):
        drawn = axes.images[0].get_array()
        torch.testing.assert_close(torch.tensor(drawn.filled(0.0)), weights.mean(0))
        assert axes.images[0].get_clim() == figure.axes[0].images[0].get_clim()
    assert figure.axes[1].get_title().endswith("\n0% of what it could look at is exactly 0")
    written(figure, tmp_path)
    one = plots.plot_text_maps({"sparsemax": sparse}, tokens, head=2)
    torch.testing.assert_close(torch.tensor(one.axes[0].images[0].get_array().filled(0.0)), sparse[2])
    with pytest.raises(ValueError, match="there are 3 tokens"):
        plots.plot_text_maps({"a": sparse}, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"head must be in \[0, 3\]"):
        plots.plot_text_maps({"a": sparse}, tokens, head=4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ViTForImageClassification", "SiglipForImageClassification"])
def test_maps_of_an_image(name, tmp_path):
    model = make(name)  # Siglip's has no class token
    batch = {"pixel_values": inputs_for(model)["pixel_values"][:1]}
    weights = list(attention_maps(model, batch).values())[0][0]
    figure = plots.plot_image_maps({"stock": weights, "again": weights}, batch["pixel_values"][0])
    drawn = torch.tensor(figure.axes[1].images[1].get_array().filled())
    mean = weights.mean(0)
    expected = mean[0, 1:] if weights.shape[-1] == 17 else mean.mean(0)
    torch.testing.assert_close(drawn, expected.reshape(4, 4))
    written(figure, tmp_path)
    with pytest.raises(ValueError, match="no square"):
        plots.plot_image_maps({"a": torch.ones(2, 24, 24)}, batch["pixel_values"][0])


@pytest.mark.filterwarnings("error")
def test_training_curves(tmp_path):
    history = [{"loss": 1.0, "step": 5}]
    for step in (10, 20, 30):
        logs = {f"multimax/h.{layer}.attn/ts_b1": 0.1 * layer * step for layer in range(3)}
        logs |= {f"multimax/h.{layer}.attn/ranges_d1_head{head}": head + step for layer in range(3) for head in (0, 1)}
        history.append({**logs, "multimax/h.0.attn/sparsity": 0.5, "epoch": 1.0, "step": step})
    figure = plots.plot_training(history)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["ranges_d1", "ts_b1", "sparsity"]
    assert [list(line.get_ydata()) for line in panels["ranges_d1"].get_lines()] == 3 * [[10.5, 20.5, 30.5]]
    assert list(panels["ts_b1"].get_lines()[2].get_ydata()) == [2.0, 4.0, 6.0]
    widths = [line.get_linewidth() for line in panels["ranges_d1"].get_lines()]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3  # one over the other, all are seen
    written(figure, tmp_path)
    with pytest.raises(ValueError, match="nothing of MultiMax"):
        plots.plot_training(history[:1])
