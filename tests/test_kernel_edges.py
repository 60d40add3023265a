"""Calls at the edge of what the kernels take: other devices, nothing to attend to, the strides that fakes promise."""

import statistics

import pytest
import torch
from attention_cases import reference, through
from models import make
from torch.autograd import forward_ad

from hf_multimax import backend, multimax_attention, multimax_linear_cross_entropy, multimax_parameters, patch_model
from hf_multimax.attention.native import backend as native
from hf_multimax.attention.tiled import backend as tiled
from tests.tolerances import relative_error

BACKENDS = ["eager", "tiled", "native"]


@pytest.fixture(params=BACKENDS)
def chosen(request):
    if request.param == "native" and not native.available():
        pytest.skip("no native kernels here")
    with backend(request.param):
        yield request.param


def call(heads=2, kv_heads=2, rows=5, keys=5, order=2, per_head=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, rows, 8), (1, kv_heads, keys, 8), (1, kv_heads, keys, 8)]
    shapes += [(heads, 2 * order) if per_head else (2 * order,)] * 2
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_are_contiguous_and_share_no_storage(chosen, heads, per_head):
    tensors = call(heads, heads, per_head=per_head)
    grads = torch.autograd.grad(multimax_attention(*tensors).sum(), tensors)
    if chosen != "eager":
        assert all(grad.is_contiguous() for grad in grads)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["tiled", "native"], indirect=True)
def test_compiled_training_with_parameters_per_head(chosen):
    tensors = call()
    expected = torch.autograd.grad(multimax_attention(*tensors).square().sum(), tensors)
    compiled = torch.compile(multimax_attention, fullgraph=True)
    actual = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["k", "v", "ranges", "ts", "attn_mask"])
def test_tensors_on_several_devices_are_refused(chosen, name):
    query, key, value, ranges, ts = call()
    arguments = {"q": query, "k": key, "v": value, "ranges": ranges, "ts": ts, "attn_mask": torch.ones(5, 5)}
    arguments[name] = arguments[name].detach().to("meta")
    with pytest.raises(ValueError, match="q is on cpu, but .* meta"):
        multimax_attention(**arguments)


def test_no_key_heads_are_refused(chosen):
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        multimax_attention(*call(kv_heads=0))


@pytest.mark.parametrize("shape", [{"keys": 0}, {"rows": 0}, {"rows": 0, "keys": 0}], ids=str)
def test_nothing_to_attend_to_gives_zeros(chosen, shape):
    tensors = call(**shape)
    out = multimax_attention(*tensors)
    assert out.shape == tensors[0].shape and not out.any()
    for grad, tensor in zip(torch.autograd.grad(out.sum(), tensors, allow_unused=True), tensors):
        assert grad is None or (grad.shape == tensor.shape and not grad.any())


@pytest.mark.parametrize("chosen", ["tiled", "native"], indirect=True)
def test_a_chosen_kernel_refuses_forward_derivatives(chosen):
    query, *rest = (tensor.detach() for tensor in call())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(ValueError, match="does not support forward derivatives"):
            multimax_attention(dual, *rest)


@pytest.mark.parametrize("chosen", ["tiled", "native"], indirect=True)
def test_a_chosen_kernel_refuses_the_derivatives_of_torch_func(chosen):
    query, *rest = (tensor.detach() for tensor in call())
    with pytest.raises(ValueError, match=r"does not support the derivatives of torch\.func"):
        torch.func.grad(lambda x: multimax_attention(x, *rest).sum())(query)
    each = torch.func.vmap(lambda x: multimax_attention(x[None], *rest)[0])(torch.cat((query, 2 * query)))
    torch.testing.assert_close(each[1:], multimax_attention(2 * query, *rest))


@pytest.mark.parametrize("normalizer", ["multimax", "scalable_softmax"])
def test_gradients_of_each_example_by_torch_func(normalizer, monkeypatch):
    """Of attention and of the output layer, where the usual gradients come from kernels."""
    monkeypatch.setattr("hf_multimax.attention.choose.SMALL", 0)
    model = patch_model(make("GPT2LMHeadModel"), normalizer=normalizer, output=normalizer == "multimax").train()
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(2 * 30).view(2, 30) % 7
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def loss(weights, example):
        return torch.func.functional_call(
            model, weights, (), {"input_ids": example[None], "labels": example[None]}
        ).loss

    for _ in range(2):  # the first call with labels also checks the loss
        found = torch.func.grad(loss)(weights, ids[0])
    each = [found, torch.func.grad(loss)(weights, ids[1])]
    for example, grads in zip(ids, each):
        model.zero_grad()
        model(input_ids=example[None], labels=example[None]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_fused_loss_names_torch_func():
    hidden, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    with pytest.raises(RuntimeError, match=r"no derivative for torch\.func"):
        torch.func.grad(lambda x: multimax_linear_cross_entropy(x, weight, labels, None, None))(hidden)


def test_values_of_no_width(chosen):
    query, key, _, *scalars = call(rows=40, keys=40)
    value = torch.randn(1, 2, 40, 0, requires_grad=True)
    out = multimax_attention(query, key, value, *scalars)
    assert out.shape == (1, 2, 40, 0)
    grads = torch.autograd.grad(out.sum(), (query, key, value, *scalars))
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["tiled", "native"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_beyond_any_sequence(name, causal):
    attention = through({"tiled": tiled, "native": native}[name])
    if name == "native" and not native.available():
        pytest.skip("no native kernels here")
    tensors = call(rows=40, keys=70)
    expected = attention(*tensors, causal=causal)
    assert torch.equal(attention(*tensors, causal=causal, window=2**63 - 1), expected)


def test_tensors_kept_as_their_negatives(chosen):
    """As the imaginary part of a conjugate is."""
    query, key, value, *scalars = (x.detach() for x in call())
    negated = (torch._neg_view(-x) for x in (query, key, value))
    torch.testing.assert_close(multimax_attention(*negated, *scalars), multimax_attention(query, key, value, *scalars))


def test_a_hidden_entry_of_the_mask_that_is_no_number_stays_hidden(chosen):
    tensors = call(rows=40, keys=40)
    mask = torch.zeros(40, 40)
    expected = multimax_attention(*tensors, attn_mask=mask, is_causal=True)
    mask[3, 20] = float("nan")  # the future of row 3
    assert torch.equal(multimax_attention(*tensors, attn_mask=mask, is_causal=True), expected)
    mask[30, 20] = float("nan")
    out = multimax_attention(*tensors, attn_mask=mask, is_causal=True)
    assert out[:, :, 30].isnan().all() and out.isnan().any(-1).sum() == 2  # one row of each of two heads


def test_the_fused_loss_ignores_the_label_that_it_is_told_to():
    model = patch_model(make("GPT2LMHeadModel"), output=True).train()
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(12)[None] % 4
    losses = [model(ids, labels=ids, ignore_index=0) for _ in range(2)]
    assert losses[1].logits is None  # the second call is fused
    expected = model.eval()(ids, labels=ids, ignore_index=0).loss
    torch.testing.assert_close(losses[1].loss, expected)


@pytest.mark.parametrize("rows", [1, 300])
def test_a_default_device_moves_nothing(chosen, rows):
    threads = torch.get_num_threads()
    tensors = call(1, 1, rows, 600)
    expected = multimax_attention(*tensors)
    grads = torch.autograd.grad(expected.square().sum(), tensors)
    torch.set_num_threads(2)  # several processors split the keys of few rows
    try:
        with torch.device("meta"):
            actual = multimax_attention(*tensors)
            found = torch.autograd.grad(actual.square().sum(), tensors)
            with torch.no_grad():
                plain = multimax_attention(*tensors)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip((actual, plain, *found), (expected, expected, *grads)):
        torch.testing.assert_close(a, b)


def test_tiles_read_a_repeated_bias_once(monkeypatch):
    seen, aminmax = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda x: seen.append(x) or aminmax(x))
    query, key, value, ranges, ts = call()
    by_key = torch.randn(5, 5, 2).permute(2, 0, 1)  # as T5 lays out its position bias
    for bias in (torch.randn(5).expand(1, 2, 5, 5), by_key):
        through(tiled)(query, key, value, ranges, ts, bias=bias)
        assert seen[-1].numel() == (5 if bias is not by_key else 50) and seen[-1].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_entry_of_half_the_lowest_value_masks_and_the_next_does_not(chosen, dtype):
    edge = torch.tensor(torch.finfo(dtype).min / 2, dtype=dtype)
    above = torch.nextafter(edge.float(), torch.zeros(())) if dtype == torch.float32 else edge * 0.99
    query, key, value, ranges, ts = (x.detach() for x in call())
    everything = multimax_attention(query, key, value, ranges, ts)
    for entry, expected in ((edge, torch.zeros_like(everything)), (above.to(dtype), everything)):
        mask = torch.full((5, 5), entry.item(), dtype=dtype)
        out = multimax_attention(query, key, value, ranges, ts, attn_mask=mask)
        if entry is edge:
            assert torch.equal(out, expected)
        else:  # so far below that all scores round to it: the mean of the values
            assert out.abs().amax() > 0


@pytest.mark.parametrize("name", ["ranges", "ts"])
def test_a_parameter_that_is_no_number_shows(chosen, name):
    query, key, value, ranges, ts = (x.detach() for x in call(per_head=False))
    tensors = {"ranges": ranges, "ts": ts}
    tensors[name][1] = float("nan")
    assert multimax_attention(query, key, value, **tensors).isnan().all()


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_peaked_rows_have_exact_scalar_gradients(rows, sink):
    worst = {"plain": [], "native": [], "tiled": []}
    for seed in range(12):
        torch.manual_seed(seed)
        tensors = [torch.randn(2, 2, n, 64) for n in (rows, 129, 129)] + [torch.randn(4), torch.rand(4)]
        tensors[0] *= 20.0
        tensors = [x.requires_grad_() for x in tensors]
        sinks, grad = (torch.full((2,), 5.0) if sink else None), torch.randn(2, 2, rows, 64)

        def scalars(function, dtype=torch.float32, tensors=tensors, sinks=sinks, grad=grad):
            given = [x.detach().to(dtype).requires_grad_() for x in tensors]
            out = function(*given, sinks=sinks if sinks is None else sinks.to(dtype))
            return torch.cat(torch.autograd.grad(out, given[3:], grad.to(dtype)))

        exact = scalars(reference, torch.float64)
        found = {"plain": reference, "native": through(native), "tiled": through(tiled)}
        for name, function in found.items():
            if name != "native" or native.available():
                worst[name].append(relative_error(scalars(function), exact))
    plain = statistics.geometric_mean(x + 1e-6 for x in worst.pop("plain"))
    for name, errors in worst.items():
        assert statistics.geometric_mean(x + 1e-6 for x in errors or [0.0]) <= 2 * plain, name
