"""What is exported is plain PyTorch: it runs without this package, for any length, and in onnxruntime."""

import subprocess
import sys
import textwrap

import pytest
import torch
from models import make
from test_architectures import randomised
from torch import nn
from torch.export import Dim
from zoo import zoo_inputs, zoo_model

from hf_multimax import backend, patch_model

TEXT = {
    "gpt2": lambda: make("GPT2LMHeadModel"), "t5": lambda: make("T5ForConditionalGeneration"),
    "marian": lambda: make("MarianMTModel"), "bert": lambda: zoo_model("BertForSequenceClassification"),
    "llama": lambda: zoo_model("LlamaForCausalLM"), "gemma2": lambda: zoo_model("Gemma2ForCausalLM"),
    "bloom": lambda: zoo_model("BloomForCausalLM"),
}  # fmt: skip
OPTIONS = [
    {},
    {"output": True},
    {"per_head": True},
    {"normalizer": "rsoftmax"},
    {"normalizer": "entmax15"},
    {"normalizer": "scalable_softmax"},
    {"normalizer": "topk_softmax", "normalizer_kwargs": {"k": 3}},
]


class Logits(nn.Module):
    """A text model as a function of two tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        config = self.model.config
        more = {"decoder_input_ids": input_ids} if config.is_encoder_decoder else {}
        if hasattr(config, "use_cache"):
            more["use_cache"] = False
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **more).logits


def wrapped(name, **options):
    return Logits(randomised(patch_model(TEXT[name](), **options), 0.2)).eval()


def batch(rows, length):
    ids = torch.randint(3, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return ids, mask


def exported(model, arguments):
    shape = {0: Dim("batch", max=8), 1: Dim("length", min=5, max=32)}
    return torch.export.export(model, arguments, dynamic_shapes=(shape, shape), strict=False)


def call(model, arguments):
    with torch.no_grad():
        return model(*arguments)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_export_is_made_of_pytorchs_operators(name, options):
    if options and name not in ("gpt2", "llama") or (name == "bloom" and "per_head" in options):
        pytest.skip("options do not depend on the architecture")
    model = wrapped(name, **options)
    program = exported(model, batch(2, 9))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators and not [operator for operator in operators if "multimax" in operator]
    for size in ((2, 9), (3, 14)):
        _same(program.module(), model, batch(*size))


def _same(found, model, arguments):
    torch.testing.assert_close(call(found, arguments), call(model, arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_saved_program_runs_where_the_package_is_not(name, tmp_path):
    model, arguments = wrapped(name, output=True), batch(3, 14)
    torch.export.save(exported(model, batch(2, 9)), tmp_path / "model.pt2")
    torch.save([*arguments, call(model, arguments)], tmp_path / "data.pt")
    code = f"""
    import sys
    sys.modules["hf_multimax"] = None  # importing it raises
    import torch
    program = torch.export.load({str(tmp_path / "model.pt2")!r})
    *arguments, expected = torch.load({str(tmp_path / "data.pt")!r})
    torch.testing.assert_close(program.module()(*arguments), expected, rtol=1e-4, atol=1e-5)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "llama"])
def test_tracing(name, options):
    if options and name != "gpt2":
        pytest.skip("options do not depend on the architecture")
    model = wrapped(name, **options)
    traced = torch.jit.trace(model, batch(2, 9), check_trace=False)
    assert "multimax_" not in str(traced.inlined_graph).replace("multimax_output", "")
    for size in ((2, 9), (3, 14)):
        _same(traced, model, batch(*size))


def test_an_image_model():
    model = randomised(patch_model(zoo_model("ViTForImageClassification"), output=True), 0.2)
    pixels = zoo_inputs("ViTForImageClassification")["pixel_values"]
    program = torch.export.export(
        model, (pixels,), dynamic_shapes={"pixel_values": {0: Dim("batch", max=8)}}, strict=False
    )
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-5)


def test_who_insists_on_a_kernel_gets_it():
    model = wrapped("gpt2")
    with backend("tiled"):
        program = exported(model, batch(2, 9))
    assert any("multimax" in str(node.target) for node in program.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "llama"])
def test_onnx(name, options, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if options and (name != "llama" or (not dynamo and "normalizer" in options)):
        pytest.skip("options do not depend on the architecture; the legacy exporter lacks operators")
    model, file = wrapped(name, **options), str(tmp_path / "model.onnx")
    names = ["input_ids", "attention_mask"]
    if dynamo:
        shape = {0: Dim("batch", max=8), 1: Dim("length", min=5, max=32)}
        torch.onnx.export(model, batch(2, 9), file, dynamo=True, dynamic_shapes=(shape, shape), input_names=names)
    else:
        axes = {key: {0: "batch", 1: "length"} for key in names}
        torch.onnx.export(model, batch(2, 9), file, dynamo=False, dynamic_axes=axes, input_names=names)
    session = onnxruntime.InferenceSession(file)
    for size in ((2, 9), (3, 14)):
        arguments = batch(*size)
        found = session.run(None, dict(zip(names, (x.numpy() for x in arguments))))[0]
        torch.testing.assert_close(torch.from_numpy(found), call(model, arguments), rtol=1e-3, atol=1e-4)
