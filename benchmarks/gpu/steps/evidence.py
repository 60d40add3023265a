"""Does it help: small byte-level GPT-2s, trained in pairs on text that every Python has, as many seeds as time allows.

The arms of a seed share initial weights, data order, number of steps and learning rate; nothing was tuned for any.
"""

import contextlib
import copy
import functools
import math
import pydoc_data.topics

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.gpu.cases import Case, Settings
from hf_multimax import backend, multimax_parameters, patch_model

__all__ = ["cases"]

SEEDS = 8
ARMS: dict[str, dict[str, object] | None] = {"softmax": None, "multimax": {}, "multimax and output": {"output": True}}
_LEARNING_RATE, _WARMUP, _WEIGHT_DECAY, _MAX_NORM = 2e-3, 0.1, 0.1, 1.0


def cases(settings: Settings) -> list[Case]:
    """One for each seed, with all arms."""
    on_gpu = settings.device == "cuda"
    return [
        Case(f"seed {seed}", lambda seed=seed: _compare(seed, settings), on_gpu)
        for seed in range(1 if settings.tiny else SEEDS)
    ]


def _compare(seed: int, settings: Settings) -> dict[str, object]:
    width, layers, length, batch, steps = (32, 1, 12, 1, 2) if settings.tiny else (256, 4, 256, 32, 600)
    config = GPT2Config(
        vocab_size=256, n_positions=length, n_embd=width, n_layer=layers, n_head=width // 64 or 2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    text = _text().to(settings.device)
    border = len(text) * 9 // 10
    held_out = text[border:][: 24 if settings.tiny else None]
    torch.manual_seed(seed)
    start = GPT2LMHeadModel(config).to(settings.device)
    places = torch.randint(border - length, (steps, batch), generator=torch.Generator().manual_seed(seed))
    found = {}
    for arm, options in ARMS.items():
        model = copy.deepcopy(start)
        if options is not None:
            patch_model(model, **options)
        with backend(settings.backend):
            _train(model, text, places, length, settings)
            found[arm] = _bits_per_byte(model, held_out, length, settings)
    described = {"layers": layers, "width": width, "length": length, "batch": batch, "steps": steps}
    return {"bits per byte": found, "bytes": len(text), **described}


@functools.cache
def _text() -> Tensor:
    """The texts of Python's help, which vary a little with its version, as bytes."""
    topics = pydoc_data.topics.topics
    return torch.frombuffer(
        bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8
    ).long()


def _train(model: GPT2LMHeadModel, text: Tensor, places: Tensor, length: int, settings: Settings) -> None:
    """AdamW with a cosine schedule; the scalars are not decayed, and clipped by themselves."""
    scalars = list(multimax_parameters(model).values())
    others = [parameter for parameter in model.parameters() if all(parameter is not scalar for scalar in scalars)]
    groups = [{"params": others, "weight_decay": _WEIGHT_DECAY}, {"params": scalars, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=_LEARNING_RATE, betas=(0.9, 0.95))
    steps = len(places)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate((step + 1) / steps))
    offsets = torch.arange(length, device=text.device)
    model.train()
    for starts in places.to(text.device):
        batch = text[starts[:, None] + offsets]
        with _autocast(settings):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for parameters in filter(None, (others, scalars)):
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def _rate(progress: float) -> float:
    """A linear warm-up, then half a cosine."""
    return min(progress / _WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress))


@torch.no_grad()
def _bits_per_byte(model: GPT2LMHeadModel, text: Tensor, length: int, settings: Settings) -> float:
    """Of the bytes after the first of each window of the held-out text."""
    model.eval()
    windows = text[: len(text) // length * length].view(-1, length)
    total = 0.0
    for batch in windows.split(64):
        with _autocast(settings):
            total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(windows) / math.log(2)


def _autocast(settings: Settings) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if settings.device == "cuda" else contextlib.nullcontext()
