"""Whole training steps, patched against stock: ``python -m benchmarks.training_step [--device cuda] [--models NAME]``.

Real shapes with random weights: GPT-2 small at 1024 tokens, DeiT-small at 224 pixels, T5-small at 512 source and 114
target tokens, Marian (opus-mt base) at 128 and 128. A step is forward, backward and AdamW. The stock model runs
``scaled_dot_product_attention``, the patched one (a copy with the same weights, order 2, every term in use) whatever
``backend("auto")`` chooses; they take turns step by step in one process. On a CPU batches are small, and a third of
GPT-2 is measured: 4 of its 12 layers and a third of its vocabulary, so that all shares of the time stay. Attention
dropout is off, with which SDPA would leave its fused kernel there. On CUDA the steps run under bfloat16 autocast.
Writes benchmarks/results/training_step-<device>.json after every model.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_multimax
from benchmarks.common import ROOT, add_thread_option, load, paired_timing, table, write_results

STOCK, PATCHED = "stock", "patched"
GPT2_LENGTH, T5_SOURCE, T5_TARGET, MARIAN_LENGTH = 1024, 512, 114, 128


@dataclass(frozen=True)
class Case:
    """A model's shape, and the batch sizes that fit the devices."""

    build: Callable[[str], PreTrainedModel]
    inputs: Callable[[int], dict[str, Tensor]]
    described: str
    batch: dict[str, int]


def tokens(batch: int, length: int) -> Tensor:
    """Random token ids beyond the special ones."""
    return torch.randint(10, 16000, (batch, length))


def gpt2(device: str) -> PreTrainedModel:
    """GPT-2 small, or a third of it on a CPU."""
    part = {"n_layer": 4, "vocab_size": 16752, "bos_token_id": 0, "eos_token_id": 0} if device == "cpu" else {}
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, **part))


def deit(device: str) -> PreTrainedModel:
    """DeiT-small."""
    config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    return DeiTForImageClassification(config)


def t5(device: str) -> PreTrainedModel:
    """T5-small; its one dropout rate is off everywhere."""
    return T5ForConditionalGeneration(T5Config(dropout_rate=0.0, decoder_start_token_id=0))


def marian(device: str) -> PreTrainedModel:
    """The shape of the opus-mt models."""
    config = MarianConfig(
        vocab_size=58101, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512,
        activation_function="swish", pad_token_id=58100, decoder_start_token_id=58100, eos_token_id=0,
    )  # fmt: skip
    return MarianMTModel(config)


def _gpt2_inputs(batch: int) -> dict[str, Tensor]:
    ids = tokens(batch, GPT2_LENGTH)
    return {"input_ids": ids, "labels": ids}


def _deit_inputs(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.randint(1000, (batch,))}


def _t5_inputs(batch: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch, T5_SOURCE), "labels": tokens(batch, T5_TARGET)}


def _marian_inputs(batch: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch, MARIAN_LENGTH), "labels": tokens(batch, MARIAN_LENGTH)}


CASES = {
    "gpt2": Case(gpt2, _gpt2_inputs, "GPT-2 small, 1024 tokens", {"cpu": 1, "cuda": 16}),
    "deit": Case(deit, _deit_inputs, "DeiT-small, 224 pixels", {"cpu": 4, "cuda": 256}),
    "t5": Case(t5, _t5_inputs, "T5-small, 512 and 114 tokens", {"cpu": 1, "cuda": 32}),
    "marian": Case(marian, _marian_inputs, "Marian base, 128 and 128 tokens", {"cpu": 2, "cuda": 64}),
}


def training_step(model: PreTrainedModel, inputs: dict[str, Tensor], device: str) -> Callable[[], object]:
    """A function that trains ``model`` by one step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    def step() -> None:
        with autocast:
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(case: Case, device: str, budget_s: float) -> dict[str, object]:
    """One row: seconds of a stock and of a patched step, and the median of their paired ratios."""
    torch.manual_seed(0)
    stock = case.build(device).to(device).train()
    stock.set_attn_implementation("sdpa")
    patched = hf_multimax.patch_model(copy.deepcopy(stock), init="paper")
    batch = case.batch[device]
    inputs = {name: x.to(device) for name, x in case.inputs(batch).items()}
    steps = {STOCK: training_step(stock, inputs, device), PATCHED: training_step(patched, inputs, device)}
    few = device == "cpu"
    rounds = {"min_rounds": 4, "max_rounds": 20, "warmup": 1} if few else {"min_rounds": 10, "warmup": 3}
    times = paired_timing(steps, device=device, budget_s=budget_s, **rounds)
    return {
        "model": case.described,
        "batch": batch,
        "stock s": times[STOCK].median,
        "patched s": times[PATCHED].median,
        "patched / stock": times[PATCHED].ratio(times[STOCK]),
        "rounds": len(times[STOCK].seconds),
        "load": load(),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=list(CASES), help="default: all")
    add_thread_option(parser)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of steps per model")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in arguments.models:
        rows.append(measure(CASES[name], arguments.device, arguments.budget))
        # written after every model: an interrupted run keeps what it has measured
        path = write_results("training_step", rows, device=arguments.device)
    print(table(rows))
    print("written to", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
