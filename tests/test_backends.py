"""The choice of a backend: the same results whichever runs, no silent fallback, and graphs without breaks."""

import pytest
import torch
from models import TRAINED, inputs_for, make
from test_equivalence import run
from tolerances import relative_error
from torch import nn

from hf_multimax import MultiMax, backend, multimax_attention, multimax_parameters, patch_model
from hf_multimax.attention.call import make_call
from hf_multimax.attention.choose import choose_kernel
from hf_multimax.attention.native import backend as native
from hf_multimax.attention.tiled import backend as tiled

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "compiled")


def stirred(name, **options):
    model = patch_model(make(name), **options)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("which", ["tiled", pytest.param("native", marks=needs_native), "auto"])
@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"affine": True}], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_every_backend_gives_the_models_results_and_gradients(name, options, which):
    model = stirred(name, **options)
    batch = inputs_for(model)
    with backend("eager"):
        outputs, gradients = run(model, batch)
    with backend(which):
        other_outputs, other_gradients = run(model, batch)
    assert outputs.keys() == other_outputs.keys()
    assert gradients.keys() == other_gradients.keys()
    for key, value in (outputs | gradients).items():
        assert relative_error((other_outputs | other_gradients)[key], value) < 1e-3, key


@pytest.mark.parametrize("which", ["tiled", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_bfloat16_models_run_in_every_backend(name, which):
    model = stirred(name).bfloat16()
    batch = inputs_for(model)
    with backend("eager"):
        expected = model(**batch).logits
    with backend(which):
        logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, expected) < 0.1


@pytest.mark.parametrize("normalizer", ["entmax15", "softmax", "scalable_softmax"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_other_normalizers_run_in_tiles(name, normalizer):
    model = patch_model(make(name), normalizer=normalizer)
    batch = inputs_for(model)
    with backend("eager"):
        outputs, gradients = run(model, batch)
    with backend("tiled"):
        other_outputs, other_gradients = run(model, batch)
    for key, value in (outputs | gradients).items():
        assert relative_error((other_outputs | other_gradients)[key], value) < 1e-3, key


def arguments(dtype=torch.float32, length=700, **tensors):
    q, k, v = (torch.randn(1, 2, length, 16, dtype=dtype) for _ in range(3))
    return {"q": q, "k": k, "v": v, "ranges": torch.randn(4), "ts": torch.zeros(4), **tensors}


@needs_native
def test_auto_takes_what_supports_the_call():
    assert choose_kernel(make_call(**arguments())) is native
    assert choose_kernel(make_call(**arguments(torch.float64))) is tiled
    assert choose_kernel(make_call(**arguments(torch.float64, length=8))) is None
    assert choose_kernel(make_call(**arguments()), weights=True) is None
    learned_mask = torch.zeros(1, 1, 700, 700, requires_grad=True)
    assert choose_kernel(make_call(**arguments(), mask=learned_mask)) is tiled


def test_without_a_compiler_auto_takes_tiles(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert choose_kernel(make_call(**arguments())) is tiled
    assert choose_kernel(make_call(**arguments(length=8))) is None


@pytest.mark.parametrize(
    ("which", "text", "call"),
    [
        ("native", "float64", lambda: multimax_attention(**arguments(torch.float64))),
        ("triton", "CPU|cpu|Triton", lambda: multimax_attention(**arguments())),
    ],
)
def test_an_explicit_choice_never_falls_back(which, text, call):
    with backend(which), pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("which", ["tiled", "native"])
def test_attention_weights_are_refused_by_an_explicit_kernel(which):
    model = stirred("GPT2LMHeadModel")
    with backend(which), pytest.raises(ValueError, match=f"{which}.*weights"):
        model(**inputs_for(model), output_attentions=True)


def test_a_normalizer_without_kernels_is_refused_by_an_explicit_kernel():
    model = patch_model(make("GPT2LMHeadModel"), normalizer="sparsemax", normalizer_kwargs={"share": 0.5})
    with backend("native"), pytest.raises(ValueError, match="native.*does not support sparsemax"):
        model(**inputs_for(model))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.multimax = MultiMax(init="paper", init_std=0.5)

    def forward(self, q, k, v):
        return multimax_attention(q, k, v, self.multimax.ranges, self.multimax.ts, is_causal=True)


@pytest.mark.parametrize("which", ["tiled", pytest.param("native", marks=needs_native), "auto", "eager"])
def test_compile_and_export_without_graph_breaks(which):
    torch._dynamo.reset()
    module = Attention()
    inputs = tuple(torch.randn(1, 2, 40, 16) for _ in range(3))
    with backend(which):
        expected = module(*inputs)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
        compiled.sum().backward()
        exported = torch.export.export(module, inputs).module()(*inputs)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(exported, expected)
    assert module.multimax.ts.grad.abs().sum() > 0


@pytest.mark.parametrize("which", ["tiled", pytest.param("native", marks=needs_native)])
def test_second_derivatives_are_refused(which):
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    ranges, ts = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    with backend(which), pytest.raises(RuntimeError, match="eager"):
        torch.autograd.grad(multimax_attention(q, k, v, ranges, ts).sum(), q, create_graph=True)
    with backend("eager"):
        (grad,) = torch.autograd.grad(multimax_attention(q, k, v, ranges, ts).sum(), q, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), ts)[0].abs().sum() > 0


def test_forward_derivatives_are_eagers():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    ranges, ts = torch.randn(4), torch.randn(4)
    tangent = torch.randn_like(q)

    def attend(queries):
        return multimax_attention(queries, k, v, ranges, ts)

    _, derivative = torch.func.jvp(attend, (q,), (tangent,))
    step = 1e-2 * tangent
    torch.testing.assert_close(derivative, (attend(q + step) - attend(q - step)) / 2e-2, rtol=0.05, atol=0.02)
