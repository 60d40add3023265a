"""The MultiMax module: initialisation, types, and what moves with a model."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_multimax import MultiMax, multimax


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_shapes_types_and_identity(order, heads):
    module = MultiMax(order, heads)
    shape = (2 * order,) if heads is None else (heads, 2 * order)
    assert {n: (tuple(p.shape), p.dtype) for n, p in module.named_parameters()} == {
        "ranges": (shape, torch.float32),
        "ts": (shape, torch.float32),
    }
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(module(x), x.softmax(-1))


def test_affine_starts_as_the_identity():
    module = MultiMax(affine=True)
    assert module.order == 1
    assert [(n, p.item()) for n, p in module.named_parameters() if n in ("scale", "shift")] == [
        ("scale", 1.0),
        ("shift", 0.0),
    ]
    x = torch.randn(4, 5)
    assert torch.equal(module(x), x.softmax(-1))


def test_the_papers_initialisation():
    module = MultiMax(order=2000, init="paper")
    for parameter in module.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
    assert MultiMax(2000, init="paper", init_std=3.0).ts.abs().max() <= 2.0


def test_the_module_is_the_function():
    module = MultiMax(2, 3, init="paper", init_std=1.0)
    x, keep = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5) < 0.5
    assert torch.equal(module(x, mask=keep), multimax(x, module.ranges, module.ts, mask=keep))


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16)]
)
def test_the_scalars_stay_float32_and_unrounded(cast):
    module = MultiMax(init="paper")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = cast(nn.Sequential(nn.Linear(2, 2), module))
    assert model[0].weight.dtype != torch.float32
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_it_moves_to_a_device():
    module = nn.Sequential(MultiMax()).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float32)}


def test_half_precision_scores():
    module = MultiMax(init="paper", init_std=1.0)
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    assert torch.equal(module(x), module(x.float()).to(torch.bfloat16))


def test_copies():
    module = MultiMax(2, 3, init="paper")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))
    assert repr(module) == "MultiMax(order=2, num_heads=3)"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"order": 0}, "order"),
        ({"order": 1.5}, "order"),
        ({"order": True}, "order"),
        ({"order": 2, "affine": True}, "affine"),
        ({"num_heads": 0}, "num_heads"),
        ({"init": "zeros"}, "init"),
        ({"init_std": 0.0}, "init_std"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        MultiMax(**arguments)
