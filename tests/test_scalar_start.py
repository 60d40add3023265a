"""Scalars of a model whose scores reach as far as pretrained ones: what the defaults learn from noise must not hurt."""

import math

import pytest
import torch
from models import VOCAB, make
from peft import get_peft_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import Trainer, TrainingArguments

from hf_multimax import MultiMaxTrainer, MultiMaxTrainingArguments, freeze_base, parameter_groups, patch_model
from hf_multimax.peft import MultiMaxAdapterConfig

STEPS = 25
RATES = [1e-3, 5e-3, 2e-2]
#: As in a middle layer of SmolLM2-135M: mean and standard deviation of the scores.
MEAN, SPREAD = -10.0, 7.0
#: Nats; one rate for every order does more than five times that.
HARMLESS = 1e-3


def pretrained_like():
    """GPT-2 whose scores have that mean and spread."""
    model = make("GPT2LMHeadModel").eval()
    ids = windows()[0]
    width = model.config.n_embd
    size = width // model.config.n_head
    with torch.no_grad():
        for block in model.transformer.h:
            seen = []
            handle = block.attn.c_attn.register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
            model(input_ids=ids)
            handle.remove()
            q, k, _ = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in seen[0].split(width, dim=-1))
            scores = q @ k.mT / math.sqrt(size)
            block.attn.c_attn.weight[:, :width] *= SPREAD / scores.std()
            block.attn.c_attn.bias[:width] = math.sqrt(-MEAN) / size**0.25
            block.attn.c_attn.bias[width : 2 * width] = -math.sqrt(-MEAN) / size**0.25
    return model


def windows():
    """``[steps + 1, batch, length]``; the last batch is held out."""
    return torch.randint(3, VOCAB, (STEPS + 1, 4, 16), generator=torch.Generator().manual_seed(0))


def rows(teacher):
    """Windows with labels drawn from what ``teacher`` predicts, so that nothing can be learned from them but noise."""
    generator = torch.Generator().manual_seed(1)
    ids = windows()[:-1].flatten(0, 1)
    with torch.no_grad():
        drawn = torch.multinomial(teacher(input_ids=ids).logits.softmax(-1).flatten(0, 1), 1, generator=generator)
    labels = drawn.view(ids.shape).roll(1, dims=1)  # the loss compares a prediction with the next label
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels)]


def harm(model, teacher):
    """How much worse than the untuned model on the held-out windows: mean KL divergence, nats."""
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=windows()[-1]).logits.log_softmax(-1) for m in (model, teacher))
    return kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean().item()


def train(model, groups, rate, teacher):
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    data = rows(teacher)
    for step in range(STEPS):
        batch = data[4 * step : 4 * step + 4]
        ids, labels = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels"))
        optimizer.zero_grad()
        cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
    return harm(model, teacher)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("options", [{}, {"per_head": True}], ids=str)
def test_an_adapter_in_the_stock_trainer(rate, options, tmp_path):
    teacher = pretrained_like()
    model = get_peft_model(pretrained_like(), MultiMaxAdapterConfig(**options))
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=rate, lr_scheduler_type="constant", max_steps=STEPS, save_strategy="no",
        per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows(teacher)).train()
    assert 0 < harm(model, teacher) < HARMLESS


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_parameter_groups_of_every_order(rate, order):
    teacher, model = pretrained_like(), freeze_base(patch_model(pretrained_like(), order=order))
    assert 0 < train(model, parameter_groups(model, multimax_learning_rate=rate), rate, teacher) < HARMLESS


def test_multimax_trainer(tmp_path):
    teacher, model = pretrained_like(), freeze_base(patch_model(pretrained_like()))
    arguments = MultiMaxTrainingArguments(
        str(tmp_path), multimax_learning_rate=RATES[-1], lr_scheduler_type="constant", max_steps=STEPS,
        save_strategy="no", per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    MultiMaxTrainer(model, arguments, train_dataset=rows(teacher)).train()
    assert 0 < harm(model, teacher) < HARMLESS


@pytest.mark.parametrize("order, rate", [(2, RATES[-1]), (3, RATES[0])])
def test_one_rate_for_all_orders_would_hurt(order, rate):
    """Else the tests above could not fail."""
    teacher, model = pretrained_like(), freeze_base(patch_model(pretrained_like(), order=order))
    scalars = [p for p in model.parameters() if p.requires_grad]
    assert train(model, scalars, rate, teacher) > 5 * HARMLESS
