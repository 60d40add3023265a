"""Patched models on the device: a rotary one under autocast, with a cache, and compiled."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.cases import Settings
from hf_multimax import backend, multimax_parameters, patch_model
from tests.tolerances import assert_close, assert_none_worse

__all__ = ["checks"]

_VOCABULARY = 100


def checks(settings: Settings) -> dict[str, Callable[[], object]]:
    """By name; each makes its tensors on PyTorch's default device."""
    return {
        "model: autocast of a rotary model": lambda: _autocast(settings),
        "model: decoding with a cache": lambda: _cache(settings),
        "model: compiled as one graph": lambda: _compiled(settings),
    }


def _model(settings: Settings, length: int) -> tuple[LlamaForCausalLM, Tensor]:
    """A small Llama with grouped heads and steep modulators, and token ids."""
    width, layers, heads = (32, 1, 2) if settings.tiny else (256, 2, 4)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config)).to(settings.device)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.normal_(std=0.5)
    return model, torch.randint(2, _VOCABULARY, (2, length))


def _autocast(settings: Settings) -> None:
    """Queries and keys come in float32 and values in bfloat16, as rotary embeddings leave them."""
    model, ids = _model(settings, 9 if settings.tiny else 200)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    exact = copy.deepcopy(model).double()

    def gradients(model: LlamaForCausalLM, chosen: str, autocast: bool) -> dict[str, Tensor]:
        with backend(chosen), torch.autocast(settings.device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            names, parameters = zip(*model.named_parameters())
            return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters)))}

    actual, plain = (gradients(model, chosen, True) for chosen in (settings.backend, "eager"))
    assert_none_worse(actual, plain, gradients(exact, "eager", False), "loss and gradients")


@torch.no_grad()
def _cache(settings: Settings) -> None:
    """The last tokens one by one, with a cache, give the logits of one pass, and of eager attention."""
    length, last = (36, 1) if settings.tiny else (300, 4)
    model, ids = _model(settings, length)
    model.eval()
    with backend("eager"):
        expected = model(input_ids=ids).logits
    with backend(settings.backend):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        cache = model(input_ids=ids[:, :-last], use_cache=True).past_key_values
        for place in range(length - last, length):
            logits = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], expected[:, place], rtol=1e-4, atol=1e-4)


def _compiled(settings: Settings) -> None:
    model, ids = _model(settings, 9 if settings.tiny else 200)
    compiled = torch.compile(model, fullgraph=True, backend=settings.compiler)
    found = []
    with backend(settings.backend):
        for function in (model, compiled):
            model.zero_grad()
            loss = function(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append({"loss": loss.detach(), **{name: x.grad for name, x in model.named_parameters()}})
    for name, expected in found[0].items():
        assert_close(found[1][name], expected, 1e-4, name)
