"""Whole training steps on a CPU, patched against stock: ``python -m benchmarks.training_step [--models NAME ...]``.

Real shapes with random weights: GPT-2 small at 1024 tokens, DeiT-small at 224 pixels, T5-small at 512 source and 114
target tokens, Marian (opus-mt base) at 128 and 128, a Llama of 135M parameters at 2048. A step is forward, backward and
AdamW. The stock model runs ``scaled_dot_product_attention``, the patched one (a copy with the same weights, order 2,
every term in use) whatever ``backend("auto")`` chooses; they take turns step by step in one process. On a CPU batches
are small, and a third of GPT-2 is measured: 4 of its 12 layers and a third of its vocabulary, so that all shares of the
time stay. Attention dropout is off, with which SDPA would leave its fused kernel there.
Writes benchmarks/results/training_step-cpu.json after every model. ``python -m benchmarks.gpu`` measures on a GPU with
the functions of this module, under bfloat16 autocast.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_multimax
from benchmarks.common import ROOT, add_thread_option, load, paired_timing, write_results
from benchmarks.tables import table

STOCK, PATCHED = "stock", "patched"
GPT2_LENGTH, T5_SOURCE, T5_TARGET, MARIAN_LENGTH, LLAMA_LENGTH = 1024, 512, 114, 128, 2048
#: "tiny" tries the code out, "cpu" is what a CPU measures, "full" what a GPU does
SIZES = ("tiny", "cpu", "full")


@dataclass(frozen=True)
class Case:
    """A model's shape, its inputs for a size and a batch, and the batch of each size."""

    build: Callable[[str], PreTrainedModel]
    inputs: Callable[[str, int], dict[str, Tensor]]
    described: str
    batch: dict[str, int]


def tokens(batch: int, length: int, size: str) -> Tensor:
    """Random token ids beyond the special ones; 8 at most of each sequence if ``size`` is "tiny"."""
    return torch.randint(10, 100, (batch, 8)) if size == "tiny" else torch.randint(10, 16000, (batch, length))


def gpt2(size: str) -> PreTrainedModel:
    """GPT-2 small, or a third of it on a CPU."""
    part = {
        "tiny": {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0},
        "cpu": {"n_layer": 4, "vocab_size": 16752, "bos_token_id": 0, "eos_token_id": 0},
        "full": {},
    }
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, **part[size]))


def deit(size: str) -> PreTrainedModel:
    """DeiT-small."""
    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
    if size == "tiny":
        shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 1000}
        shape |= {"image_size": 32, "num_hidden_layers": 1}
    return DeiTForImageClassification(DeiTConfig(**shape))


def t5(size: str) -> PreTrainedModel:
    """T5-small; its one dropout rate is off everywhere."""
    part = {"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(dropout_rate=0.0, decoder_start_token_id=0, **(part if size == "tiny" else {}))
    return T5ForConditionalGeneration(config)


def marian(size: str) -> PreTrainedModel:
    """The shape of the opus-mt models."""
    vocabulary, width, inner, layers, heads = (100, 32, 32, 1, 2) if size == "tiny" else (58101, 512, 2048, 6, 8)
    config = MarianConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        max_position_embeddings=512, activation_function="swish", pad_token_id=vocabulary - 1,
        decoder_start_token_id=vocabulary - 1, eos_token_id=0,
    )  # fmt: skip
    return MarianMTModel(config)


def llama(size: str) -> PreTrainedModel:
    """The shape of SmolLM2-135M: 9 query heads that share 3 key heads, tied embeddings."""
    width, inner, layers, heads, key_heads, vocabulary = 576, 1536, 30, 9, 3, 49152
    if size == "tiny":
        width, inner, layers, heads, key_heads, vocabulary = 64, 64, 1, 4, 2, 100
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=8192, rope_theta=100000.0,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _language_inputs(length: int) -> Callable[[str, int], dict[str, Tensor]]:
    def inputs(size: str, batch: int) -> dict[str, Tensor]:
        ids = tokens(batch, length, size)
        return {"input_ids": ids, "labels": ids}

    return inputs


def _deit_inputs(size: str, batch: int) -> dict[str, Tensor]:
    side = 32 if size == "tiny" else 224
    return {"pixel_values": torch.randn(batch, 3, side, side), "labels": torch.randint(1000, (batch,))}


def _pair_inputs(source: int, target: int) -> Callable[[str, int], dict[str, Tensor]]:
    return lambda size, batch: {"input_ids": tokens(batch, source, size), "labels": tokens(batch, target, size)}


CASES = {
    "gpt2": Case(gpt2, _language_inputs(GPT2_LENGTH), "GPT-2 small, 1024 tokens", {"tiny": 2, "cpu": 1, "full": 16}),
    "deit": Case(deit, _deit_inputs, "DeiT-small, 224 pixels", {"tiny": 2, "cpu": 4, "full": 256}),
    "t5": Case(
        t5, _pair_inputs(T5_SOURCE, T5_TARGET), "T5-small, 512 and 114 tokens", {"tiny": 2, "cpu": 1, "full": 32}
    ),
    "marian": Case(
        marian,
        _pair_inputs(MARIAN_LENGTH, MARIAN_LENGTH),
        "Marian base, 128 and 128 tokens",
        {"tiny": 2, "cpu": 2, "full": 64},
    ),
    "llama": Case(
        llama, _language_inputs(LLAMA_LENGTH), "Llama of 135M, 2048 tokens", {"tiny": 2, "cpu": 1, "full": 8}
    ),
}
#: measured on a CPU where none are named
CPU_CASES = ("gpt2", "deit", "t5", "marian")


def training_step(
    model: PreTrainedModel, inputs: dict[str, Tensor], device: str, backend: str = "auto"
) -> Callable[[], object]:
    """A function that trains ``model`` by one step of AdamW, on CUDA under bfloat16 autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with hf_multimax.backend(backend):
            with torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext():
                loss = model(**inputs).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    case: Case,
    size: str,
    device: str,
    budget_s: float,
    *,
    backends: Mapping[str, str] | None = None,
    batch: int | None = None,
) -> dict[str, object]:
    """One row: seconds of a stock step and of patched ones, and the medians of their paired ratios.

    Args:
        size: one of :data:`SIZES`.
        device: "cpu" or "cuda".
        budget_s: seconds of steps.
        backends: name of a patched model -> its backend; by default one called "patched", with "auto".
        batch: how many sequences or images; by default those of the size.

    Returns:
        ``"stock s"``, and for each patched model ``"<name> s"`` and ``"<name> / stock"``.
    """
    torch.manual_seed(0)
    backends = {PATCHED: "auto"} if backends is None else backends
    batch = case.batch[size] if batch is None else batch
    stock = case.build(size).to(device).train()
    stock.set_attn_implementation("sdpa")
    inputs = {name: x.to(device) for name, x in case.inputs(size, batch).items()}
    steps = {STOCK: training_step(stock, inputs, device)}
    for name, backend in backends.items():
        patched = hf_multimax.patch_model(copy.deepcopy(stock), init="paper")
        steps[name] = training_step(patched, inputs, device, backend)
    few = device == "cpu"
    rounds = {"min_rounds": 4, "max_rounds": 20, "warmup": 1} if few else {"min_rounds": 10, "warmup": 3}
    times = paired_timing(steps, device=device, budget_s=budget_s, **rounds)
    row: dict[str, object] = {"model": case.described, "batch": batch, "stock s": times[STOCK].median}
    row |= {f"{name} s": times[name].median for name in backends}
    row |= {f"{name} / stock": times[name].ratio(times[STOCK]) for name in backends}
    return {**row, "rounds": len(times[STOCK].seconds), "load": load()}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=tuple(CASES), default=CPU_CASES, help=f"default: {' '.join(CPU_CASES)}"
    )
    add_thread_option(parser)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of steps per model")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in arguments.models:
        rows.append(measure(CASES[name], "cpu", "cpu", arguments.budget))
        # written after every model: an interrupted run keeps what it has measured
        path = write_results("training_step", rows)
    print(table(rows))
    print("written to", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
