"""What the explorer shows is what the library computes when the model itself has the scalars; its page in a browser."""

import copy
import gc
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from browser import chromium
from models import make
from test_measured_models import randomised
from tolerances import RELATIVE, assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM, ViTImageProcessorPil
from zoo import zoo_model

import hf_multimax
from hf_multimax import MultiMax, normalize, patch_model, unpatch_model
from hf_multimax.command_line.data import image_batch, text_batch
from hf_multimax.command_line.loading import Loaded
from hf_multimax.diagnostics import attention_maps, entropy, exact_zeros, multi_modality, sparsity
from hf_multimax.explorer import page as explorer_page
from hf_multimax.explorer import pictures
from hf_multimax.explorer.app import serve
from hf_multimax.explorer.looks import AS_TRAINED, Choice, Explorer, Inputs
from hf_multimax.normalizers.base import named_normalizers
from recipes.shared.tokens import train_tokenizer

SAMPLE = Path(hf_multimax.__file__).parent / "command_line" / "sample.txt"
TEXT = Inputs("The river remembers what the mountain forgets.", "A bridge remembers both.")
#: None of them is what a trained one could be rounded to.
MOVED = {"b_1": 0.505, "t_b1": -1.255, "d_2": -0.405, "t_d2": 0.305}
TOLERANCE = 10 * RELATIVE[torch.float32]


@pytest.fixture
def collected():
    """Gradio leaves sockets for the garbage collector, whose warning is an error in other files' tests."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SAMPLE.read_text(), 300, 64)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("image") / "picture.png"
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).save(path)
    return str(path)


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])


def model_of(name: str, options: dict | None):
    vocabulary = {} if name.startswith(("ViT", "Llama", "Bloom", "GptOss")) else {"vocab_size": 300}
    model = make(name, **vocabulary) if not name.startswith(("Llama", "Bloom", "GptOss")) else zoo_model(name)
    return model if options is None else randomised(patch_model(model, **options), 0.4)


def explorer_of(model, tokenizer, processor) -> Explorer:
    takes_images = model.main_input_name == "pixel_values"
    return Explorer(Loaded("a/model", model, None if takes_images else tokenizer, processor if takes_images else None))


def batch_of(explorer: Explorer, inputs: Inputs):
    if explorer.loaded.takes_images:
        return image_batch(explorer.loaded, Path(inputs.image))
    text = f"{inputs.text}\t{inputs.target}" if explorer.is_encoder_decoder else inputs.text
    return text_batch(explorer.loaded, text)


def move(model, layer: str, head: int, values: dict[str, float]) -> None:
    """Put scalars into the model itself."""
    normalizer = dict(named_normalizers(model))[layer]
    with torch.no_grad():
        for name, value in values.items():
            n, tensor = int(name[-1]), normalizer.ts if name.startswith("t") else normalizer.ranges
            row = tensor if tensor.ndim == 1 else tensor[head]
            row[2 * (n - 1) + ("d" in name)] = value


def check(look, model, batch, arm: str) -> None:
    """Compare an arm with the maps and the output of a model that has that normalizer."""
    weights = attention_maps(model, batch)[look.layer]
    weights = weights.reshape(-1, *weights.shape[-2:])[look.head, :, : len(look.keys)]  # without a sink
    assert_close(look.weights[arm], weights, TOLERANCE, arm)
    x, p = look.scores, look.weights[arm]
    measured = {"sparsity": sparsity(x, p), "multi-modality": multi_modality(x, p)}
    measured |= {"entropy [nats]": entropy(p, mask=look.keep), "exact zeros": exact_zeros(p, mask=look.keep)}
    assert look.measures[arm] == pytest.approx({k: v.value for k, v in measured.items()}, nan_ok=True)
    with torch.no_grad():
        logits = getattr(model(**batch), "logits", None)
    if logits is None:
        assert look.output == []
        return
    rows = logits[0].reshape(-1, logits.shape[-1])
    p = rows[look.row if len(rows) == len(look.queries) else -1].double().softmax(-1)
    shown = sorted((values[arm] for _, values in look.output), reverse=True)
    if arm == "now":  # those that are most probable now
        assert shown == pytest.approx(p.topk(len(shown)).values.tolist(), rel=1e-4)
    assert sum(shown) <= 1 + 1e-6 and all(min(abs(p - value)) < 1e-4 for value in shown)


MODELS = {
    "GPT2LMHeadModel": {},
    "GPT2ForSequenceClassification": {"per_head": True},
    "T5ForConditionalGeneration": {"per_head": True},
    "MarianMTModel": {"order": 3},
    "ViTForImageClassification": {"per_head": True},
    "LlamaForCausalLM": {"output": True},
    "GptOssForCausalLM": {},  # attention sinks
    "BloomForCausalLM": {},  # outside the AttentionInterface
    "ViTModel": {},  # no logits
}


@pytest.mark.parametrize("name", MODELS)
def test_a_look_is_what_the_model_does_with_these_scalars(name, tokenizer, processor, picture):
    model = model_of(name, MODELS[name])
    before = copy.deepcopy(model.state_dict())
    explorer = explorer_of(model, tokenizer, processor)
    inputs = TEXT if not explorer.loaded.takes_images else Inputs(image=picture)
    if name in ("LlamaForCausalLM", "BloomForCausalLM", "GptOssForCausalLM"):  # their vocabulary is smaller
        explorer.loaded.tokenizer = Letters()
    batch = batch_of(explorer, inputs)
    for layer, head, row in ((explorer.layers[0], 1, 3), (explorer.layers[-1], 3, -1)):
        listed = {scalar.name for scalar in explorer.scalars(layer)}
        choice = Choice(scalars=tuple((key, value) for key, value in MOVED.items() if key in listed))
        look = explorer.look(inputs, layer, head, row, choice)
        assert look.row == (row if row >= 0 else len(look.queries) - 1)
        check(look, model, batch, "trained")
        moved = copy.deepcopy(model)
        move(moved, layer, head, dict(choice.scalars))
        check(look, moved, batch, "now")
        assert not torch.equal(look.weights["now"], look.weights["trained"])
        assert look.measures["SoftMax"] == pytest.approx(
            {
                "sparsity": sparsity(look.scores, look.scores.softmax(-1)).value,
                "multi-modality": multi_modality(look.scores, look.scores.softmax(-1)).value,
                "entropy [nats]": entropy(look.scores.softmax(-1), mask=look.keep).value,
                "exact zeros": 0.0,
            },
            rel=1e-4,
            nan_ok=True,
        ) or name.startswith("GptOss")  # there a sink takes its share
        assert (len(look.queries), len(look.keys)) == look.weights["now"].shape
        for draw in (pictures.sigma, pictures.measures, pictures.row, pictures.maps, pictures.output):
            assert "nan" not in draw(look)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(set(vars(module)) & {"modulate", "normalize"} for _, module in named_normalizers(model))


class Letters:
    """A tokenizer of letters, for models with few tokens."""

    pad_token = None

    def __call__(self, texts, **options):
        return {"input_ids": torch.tensor([[3 + ord(letter) % 57 for letter in texts[0]]])}

    def decode(self, ids):
        return f"<{ids[0]}>"


def test_a_stock_model_begins_as_softmax_and_all_functions_can_stand_in(tokenizer):
    model = model_of("GPT2LMHeadModel", None)
    explorer = explorer_of(model, tokenizer, None)
    layer = "transformer.h.1.attn"
    look = explorer.look(TEXT, layer)
    assert torch.equal(look.weights["now"], look.weights["SoftMax"]) and look.falls == []
    assert look.output[0][1]["now"] == look.output[0][1]["SoftMax"]
    for name in explorer.choices(layer):
        options = explorer.options(name)
        look = explorer.look(TEXT, layer, 2, 5, Choice(name, options=tuple(options.items())))
        if name not in ("multimax", "asentmax", "scalable_softmax"):  # of those the layer learns something
            p = normalize(name, look.scores, mask=look.keep, **options)
            assert_close(look.weights["now"], p, TOLERANCE, name)
        assert set(look.sigma) == ({"now", "trained"} if name == "multimax" else {"trained"})
    unpatch_model(model)


def test_a_layer_of_another_function_is_shown_as_trained_and_can_have_multimax(tokenizer):
    model = patch_model(model_of("GPT2LMHeadModel", None), normalizer="rsoftmax", normalizer_kwargs={"sparsity": 0.7})
    explorer = explorer_of(model, tokenizer, None)
    layer = explorer.layers[0]
    assert explorer.choices(layer)[:2] == [AS_TRAINED, "multimax"]
    look = explorer.look(TEXT, layer, choice=Choice("multimax", (("t_b1", 0.0),)))
    assert_close(look.weights["now"], look.weights["SoftMax"], TOLERANCE)
    assert look.measures["trained"]["exact zeros"] > 0.3
    assert torch.equal(explorer.look(TEXT, layer).weights["now"], look.weights["trained"])


def test_what_stands_in_for_a_function_of_the_queries_sees_the_scores_alone(tokenizer):
    options = {"normalizer": "asentmax", "normalizer_kwargs": {"scaling": "adapt"}}
    model = model_of("GPT2LMHeadModel", options)
    explorer = explorer_of(model, tokenizer, None)
    look = explorer.look(TEXT, explorer.layers[0])
    check(look, model, batch_of(explorer, TEXT), "trained")
    assert_close(look.weights["SoftMax"], look.scores.softmax(-1), TOLERANCE)


def test_scalars_that_were_not_moved_have_all_their_digits(tokenizer):
    model = model_of("GPT2LMHeadModel", {"per_head": True})
    explorer = explorer_of(model, tokenizer, None)
    layer = explorer.layers[0]
    shown = tuple((scalar.name, round(scalar.value, 2)) for scalar in explorer.scalars(layer, 1))
    look = explorer.look(TEXT, layer, 1, choice=Choice(scalars=shown))
    assert torch.equal(look.weights["now"], look.weights["trained"])
    normalizer = dict(named_normalizers(model))[layer]
    assert isinstance(normalizer, MultiMax)
    assert [scalar.value for scalar in explorer.scalars(layer, 1)][:2] == normalizer.ranges[1, :2].tolist()
    assert all(abs(scalar.value) < scalar.bound for scalar in explorer.scalars(layer, 1))


def test_affine_scalars_can_be_moved(tokenizer):
    explorer = explorer_of(model_of("GPT2LMHeadModel", {"affine": True}), tokenizer, None)
    layer = explorer.layers[0]
    choice = Choice(scalars=(("scale", 0.5), ("shift", 1.0), ("t_b1", 0.0), ("t_d1", 0.0)))
    look = explorer.look(TEXT, layer, 0, choice=choice)
    assert_close(look.weights["now"], (0.5 * look.scores).softmax(-1), TOLERANCE)
    assert_close(look.sigma["now"], 0.5 * look.points + 1.0, TOLERANCE)


@pytest.mark.parametrize(
    ("inputs", "place", "choice", "told"),
    [
        (Inputs(" "), {}, None, "give a text"),
        (Inputs("word " * 60), {}, None, r"the text has \d+ tokens, and at most 40 are taken"),
        (TEXT, {"layer": "h.9"}, None, "has no layer 'h.9': there are transformer.h.0.attn"),
        (TEXT, {"head": 4}, None, "has the heads 0 to 3, got 4"),
        (TEXT, {}, Choice(scalars=(("t_b1", math.nan),)), "t_b1 must be a finite number, got nan"),
        (TEXT, {}, Choice(scalars=(("d_2", math.inf),)), "d_2 must be a finite number, got inf"),
        (TEXT, {}, Choice(scalars=(("d_2", None),)), "d_2 must be a finite number, got None"),
        (TEXT, {}, Choice(scalars=(("t_b7", 1.0),)), "has no scalar 't_b7': there are b_1"),
        (TEXT, {}, Choice(scalars=(("t_d2", 3e38), ("b_1", 9.0))), "are not finite"),
        (TEXT, {}, Choice("rsoftmax", options=(("sparsity", 2),)), "sparsity of the normalizer 'rsoftmax' must be"),
        (TEXT, {}, Choice("no-such"), "unknown normalizer 'no-such'"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_sentence(inputs, place, choice, told, tokenizer):
    model = model_of("GPT2LMHeadModel", {})
    explorer = Explorer(Loaded("a/model", model, tokenizer), length=40)
    with pytest.raises(ValueError, match=told):
        explorer.look(inputs, **{"layer": explorer.layers[0], "choice": choice, **place})


def test_models_that_cannot_be_explored_are_refused(tokenizer, processor):
    with pytest.raises(ValueError, match="a/model has no tokenizer"):
        explorer_of(model_of("GPT2LMHeadModel", {}), None, None)
    with pytest.raises(ValueError, match="a/model has no image processor"):
        explorer_of(model_of("ViTForImageClassification", {}), tokenizer, None)
    with pytest.raises(ValueError, match="give an image"):
        explorer = explorer_of(model_of("ViTForImageClassification", {}), None, processor)
        explorer.look(TEXT, explorer.layers[0])
    with pytest.raises(ValueError, match="only its output is modulated"):
        explorer_of(model_of("GPT2LMHeadModel", {"attention": False, "output": True}), tokenizer, None)


def test_tokens_cannot_write_html(tokenizer, monkeypatch):
    explorer = explorer_of(model_of("GPT2LMHeadModel", {}), tokenizer, None)
    monkeypatch.setattr(explorer.loaded, "tokenizer", Letters())
    monkeypatch.setattr(Letters, "decode", lambda self, ids: "<img src=x>")
    look = explorer.look(TEXT, explorer.layers[0])
    assert "<img src=x" not in pictures.row(look) + pictures.output(look)
    assert "&lt;img src=x&gt;" in pictures.row(look)


def test_a_sigma_that_falls_is_shaded_and_named(tokenizer):
    explorer = explorer_of(model_of("GPT2LMHeadModel", {}), tokenizer, None)
    flat = tuple((scalar.name, 0.0) for scalar in explorer.scalars(explorer.layers[0]))
    look = explorer.look(TEXT, explorer.layers[0], choice=Choice(scalars=(*flat[:6], ("t_b2", 0.9), ("t_d2", 0.0))))
    assert [(fall.low, round(fall.high, 3)) for fall in look.falls] == [(-math.inf, -0.556)]
    drawn = pictures.sigma(look)
    assert 'class="falls"' in drawn and "rises again below -0.56" in drawn


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A checkpoint with scalars of each head, and another function in its second layer's place."""
    path = tmp_path_factory.mktemp("models") / "patched"
    model = model_of("GPT2LMHeadModel", {"per_head": True})
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_every_event_of_the_page_gives_what_it_moved(tokenizer):
    pytest.importorskip("gradio")
    explorer = explorer_of(model_of("GPT2LMHeadModel", {"per_head": True}), tokenizer, None)
    made = explorer_page._Page(explorer_page.gradio(), explorer, TEXT)
    everything = {made.text, made.target, made.image, made.layer, made.normalizer, made.head, made.row, made.options}
    given = {component: component.value for component in everything | set(made.sliders.values())}
    layer, other = explorer.layers
    panels = made.panels

    def drawn(changed, *place):
        look = explorer.look(TEXT, *place)
        assert {panel: changed[panel] for panel in panels} == {panel: draw(look) for panel, draw in panels.items()}

    moved = {**given, made.sliders["t_b1"]: -0.75, made.row: 2}
    choice = Choice(scalars=tuple((name, moved[slider]) for name, slider in made.sliders.items()))
    drawn(made.move(moved), layer, 0, 2, choice)
    changed = made.enter({**given, made.row: 2})
    drawn(changed, layer, 0, -1)
    assert changed[made.row]["value"] == changed[made.row]["maximum"] == given[made.row]
    changed = made.to_layer({**given, made.layer: other, made.head: 3})
    drawn(changed, other, 0, -1)
    trained = {scalar.name: round(scalar.value, 2) for scalar in explorer.scalars(other)}
    assert {name: changed[slider]["value"] for name, slider in made.sliders.items()} == trained
    changed = made.to_head({**moved, made.head: 3})
    drawn(changed, layer, 3, 2)
    assert changed[made.sliders["b_1"]]["value"] == round(explorer.scalars(layer, 3)[0].value, 2)
    changed = made.to_normalizer({**given, made.normalizer: "topk_softmax"})
    drawn(changed, layer, 0, -1, Choice("topk_softmax", options=(("k", 8),)))
    assert changed[made.options] == {**changed[made.options], "value": "k=8", "visible": True}
    assert not any(changed[slider]["visible"] for slider in made.sliders.values())
    changed = made.reset({**moved, made.normalizer: "softmax"})
    drawn(changed, layer, 0, 2)
    assert changed[made.normalizer]["value"] == "multimax" and changed[made.sliders["t_b1"]]["visible"]
    (listener, *_) = made.blocks.fns.values()
    assert "Query (row) must be a number" in listener.fn({**given, made.row: None})[made.error]
    assert (
        "is not of the form NAME=VALUE"
        in listener.fn({**given, made.normalizer: "topk_softmax", made.options: "k"})[made.error]
    )


@pytest.mark.usefixtures("collected")
def test_the_page_is_served_here_and_names_no_other_host(tokenizer):
    pytest.importorskip("gradio")
    model = model_of("GPT2LMHeadModel", {})
    page, address = serve(Loaded("a/model", model, tokenizer), TEXT, prevent_thread_lock=True)
    try:
        assert address.startswith("http://127.0.0.1:")
        text = urllib.request.urlopen(address, timeout=30).read().decode()
        assert not re.search(r"""(?:src|href)=["'](?:https?:)?//(?!127\.0\.0\.1)""", text)
        assert "GPT2LMHeadModel, model" in text and not page.analytics_enabled
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    finally:
        page.close()


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-multimax\[app\]'"):
        explorer_page.gradio()


@pytest.mark.usefixtures("collected")
def test_the_command_says_in_a_line_what_it_cannot_do(folder, tokenizer, tmp_path, picture):
    pytest.importorskip("gradio")
    pytest.importorskip("typer")
    from test_command_line import error

    settings = MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(settings).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    model_of("GPT2LMHeadModel", None).save_pretrained(tmp_path / "bare")
    assert "no such folder" in error("explore", tmp_path / "nowhere")
    assert "has no attention layer" in error("explore", tmp_path / "mamba")
    assert "save one with" in error("explore", tmp_path / "bare")  # Transformers may have made up an empty tokenizer
    assert "no such file" in error("explore", folder, "--image", tmp_path / "no.png")
    assert "takes text, not images" in error("explore", folder, "--image", picture)
    assert "at most 20 are taken" in error("explore", folder, "--text", "word " * 30, "--length", 20)
    assert "give a text" in error("explore", folder, "--text", "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "port" in error("explore", folder, "--port", taken.getsockname()[1])


@pytest.mark.slow
def test_in_a_browser_the_numbers_are_those_of_the_library(folder):
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entry = "from hf_multimax.command_line.main import main; main()"
    command = [
        sys.executable,
        "-c",
        entry,
        "explore",
        str(folder),
        "--text",
        "The river remembers.",
        "--port",
        str(port),
    ]
    root = Path(hf_multimax.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with chromium() as browser, subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout.readline() == f"http://127.0.0.1:{port}/ (Ctrl+C ends it)\n"
            use(browser, port, folder)
        finally:
            server.terminate()


def use(browser, port: int, folder: Path) -> None:
    """Load the page, type, move, choose, err; on a phone nothing is wider than the screen."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    explorer = Explorer(Loaded(str(folder), model, tokenizer))
    view, asked, broken = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    view.on("request", lambda request: asked.append(request.url))
    view.on("pageerror", lambda error: broken.append(str(error)))
    view.goto(f"http://127.0.0.1:{port}/")

    def shows(*place) -> None:
        """The page comes to show what the library computes: sigma's points, and the numbers of all tables."""
        look, deadline = explorer.look(*place), time.monotonic() + 20
        tables = {"measures": pictures.measures, "row": pictures.row, "output": pictures.output}
        wanted = {name: cells(draw(look)) for name, draw in tables.items()}
        wanted["sigma"] = re.findall(r'class="line now" points="([^"]+)"', pictures.sigma(look))
        shown = None
        while shown != wanted and time.monotonic() < deadline:
            view.wait_for_timeout(50)
            shown = {name: view.locator(f"#mm-{name} td").all_inner_texts() for name in tables}
            shown["sigma"] = view.evaluate(
                "[...document.querySelectorAll('#mm-sigma .now')].map(line => line.getAttribute('points'))"
            )
        assert shown == wanted

    layer, other = explorer.layers
    first = Inputs("The river remembers.")
    shows(first, layer)
    view.locator("#mm-text textarea").fill(TEXT.text)
    view.locator("#mm-text textarea").press("Enter")
    shows(Inputs(TEXT.text), layer)
    trained = {scalar.name: round(scalar.value, 2) for scalar in explorer.scalars(layer)}
    slider = view.locator("#mm-t_b1 input[type=range]")
    for key, change in (("ArrowRight", 0.01), ("ArrowRight", 0.01), ("End", 9.0)):  # by keyboard
        slider.focus()
        view.keyboard.press(key)
        trained["t_b1"] = min(round(trained["t_b1"] + change, 2), 2.0)
        assert float(slider.input_value()) == trained["t_b1"]
        shows(Inputs(TEXT.text), layer, 0, -1, Choice(scalars=tuple(trained.items())))
    view.locator("#mm-head input[type=range]").fill("2")
    shows(Inputs(TEXT.text), layer, 2)
    view.locator("#mm-query input[type=range]").fill("4")
    shows(Inputs(TEXT.text), layer, 2, 4)
    view.locator("#mm-layer input").click()
    view.get_by_role("option", name=other).click()
    shows(Inputs(TEXT.text), other, 0, 4)
    view.locator("#mm-normalizer input").click()
    view.get_by_role("option", name="sparsemax").click()
    shows(Inputs(TEXT.text), other, 0, 4, Choice("sparsemax"))
    assert view.locator("#mm-t_b1").count() == 0 or not view.locator("#mm-t_b1").is_visible()
    view.locator("#mm-reset").click()
    shows(Inputs(TEXT.text), other, 0, 4)
    view.locator("#mm-text textarea").fill("word " * 300)
    view.locator("#mm-text textarea").press("Enter")
    view.wait_for_selector("text=tokens, and at most 64 are taken")
    shows(Inputs(TEXT.text), other, 0, 4)  # what was there stays
    view.set_viewport_size({"width": 390, "height": 844})
    assert view.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    outside = [url for url in asked if not url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))]
    assert outside == [] and broken == []


def cells(drawn: str) -> list[str]:
    """The numbers in a panel's table."""
    return [re.sub(r"<.*", "", cell) for cell in re.findall(r"<td>(.*?)</td>", drawn)]
