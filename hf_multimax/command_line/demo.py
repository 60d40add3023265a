"""``demo``: the whole way on a toy, in under a minute: train, patch, train on with and without MultiMax, look."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import hf_multimax
from hf_multimax.command_line import screen
from hf_multimax.command_line.loading import new_folder
from hf_multimax.diagnostics import measure_models

__all__ = ["demo"]

_LENGTH, _BATCH = 64, 16


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps before patching, and again after.")] = 150,
    data: Annotated[
        Path | None, typer.Option(help="A text to train on; default: what Python's help() says of its topics.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the trained models.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")] = False,
) -> None:
    """Train a tiny GPT-2 on bytes, patch it, train on with SoftMax and with MultiMax, and measure both.

    It shows how things go together, not what MultiMax is good for: for that see the comparisons in the documentation.
    """
    if out is not None:
        new_folder(out)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    held_out, training = _tokens(data, tokenizer)
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=_LENGTH, bos_token_id=0,
                        eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    softmax = GPT2LMHeadModel(config)
    _train(softmax, training, range(steps), seed, "training")
    before = _loss(softmax, held_out)
    multimax = hf_multimax.patch_model(copy.deepcopy(softmax))
    patched = _loss(multimax, held_out)
    for name, model in (("SoftMax", softmax), ("MultiMax", multimax)):
        _train(model, training, range(steps, 2 * steps), seed, f"training on with {name}")
    rows = {
        "trained": before,
        "patched": patched,
        "SoftMax": _loss(softmax, held_out),
        "MultiMax": _loss(multimax, held_out),
    }
    measured = measure_models({"SoftMax": softmax, "MultiMax": multimax}, held_out.split(_BATCH))
    layers = {
        arm: {
            name: {key: layer.measures[key].value for key in ("sparsity", "multi_modality")}
            for name, layer in found.items()
        }
        for arm, found in measured.items()
    }
    if out is not None:
        for name, model in (("softmax", softmax), ("multimax", multimax)):
            model.save_pretrained(out / name)
            tokenizer.save_pretrained(out / name)
    if as_json:
        screen.show_json({"loss": rows, "layers": layers, "saved": None if out is None else str(out)})
        return
    labels = {
        "trained": f"after {steps} steps with SoftMax",
        "patched": "the same, patched",
        "SoftMax": f"{steps} steps on with SoftMax",
        "MultiMax": f"{steps} steps on with MultiMax",
    }
    screen.show_table(
        "A tiny GPT-2 on bytes", ("model", "held-out loss [nats]"), [(labels[k], f"{v:.4f}") for k, v in rows.items()]
    )
    table = [
        (name, *(screen.number(layers[arm][name][key]) for key in ("sparsity", "multi_modality") for arm in layers))
        for name in layers["SoftMax"]
    ]
    columns = [f"{key} {arm}" for key in ("sparsity", "multi-modality") for arm in layers]
    screen.show_table("What attention does", ("layer", *columns), table)
    if out is not None:
        screen.say(f"Look at the models with `hf-multimax inspect {out / 'multimax'}`, or compare both.")


def _tokens(data: Path | None, tokenizer: ByT5Tokenizer) -> tuple[Tensor, Tensor]:
    """Bytes of a text as pieces ``[pieces, length]``: 64 that are held out, and the others."""
    if data is None:
        from pydoc_data.topics import topics  # English prose that every Python has

        text = "\n".join(topics.values())
    else:
        text = data.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = torch.tensor(ids[: len(ids) // _LENGTH * _LENGTH]).view(-1, _LENGTH)
    if len(pieces) < 100:
        raise ValueError(f"{data} is too short: give {100 * _LENGTH} bytes at least")
    chosen = torch.zeros(len(pieces), dtype=torch.bool)
    chosen[:: max(1, len(pieces) // 64)] = True
    return pieces[chosen], pieces[~chosen]


def _train(model: PreTrainedModel, pieces: Tensor, steps: Iterable[int], seed: int, what: str) -> None:
    """AdamW; step by step the same batches for every model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other in so small a model
    model.train()
    groups = hf_multimax.parameter_groups(model, weight_decay=0.01, multimax_learning_rate=2e-2)
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    steps = list(steps)
    for step in screen.progress(what, steps, len(steps)):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        batch = pieces[torch.randint(len(pieces), (_BATCH,), generator=generator)]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.eval()


@torch.no_grad()
def _loss(model: PreTrainedModel, pieces: Tensor) -> float:
    model.eval()
    return float(model(pieces, labels=pieces).loss)
