"""Language modelling: pre-train from scratch or fine-tune a checkpoint, with any normalizer.

    python -m recipes.language_modeling recipes/configs/lm_web_small.yaml
    python -m recipes.language_modeling recipes/configs/lm_web_small.yaml --normalizer softmax --output_dir runs/softmax
    python -m recipes.language_modeling --model gpt2 --data my.txt --output_dir runs/gpt2

Perplexity is exp of the mean loss over the held-out tokens, per token and per byte of their UTF-8 text; the first token
of each window is not predicted.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import StackDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, default_data_collator
from transformers.hf_argparser import HfArg
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_multimax.training import MultiMaxTrainingArguments
from recipes.shared.causal import stock_model, stock_tokenizer
from recipes.shared.checks import DataError, check_numbers
from recipes.shared.data.sources import describe
from recipes.shared.data.text import BUILT_IN_TEXTS, load_text
from recipes.shared.metrics import compute
from recipes.shared.models import ModelArguments, build_model
from recipes.shared.run import Job, main
from recipes.shared.tokens import check_vocabulary, encode

IGNORED = -100


@dataclass
class TextArguments:
    """The text and its tokens."""

    data: str = HfArg(
        default="web",
        help=f"{', '.join(BUILT_IN_TEXTS)}, a text file, a folder, or a Hub set as name[:configuration][@split]",
    )
    validation_data: str | None = HfArg(
        default=None, help="held-out text, given as data is; default: the end of the data"
    )
    validation_share: float = HfArg(default=0.05, help="of the data, held out at its end without validation_data")
    max_characters: int = HfArg(default=20_000_000, help="of a Hub data set, read at most")
    tokenizer: str | None = HfArg(
        default=None, help="folder or Hub id; default: the checkpoint's, or a BPE trained on the data"
    )
    vocab_size: int = HfArg(default=4096, help="of a tokenizer trained here")
    context: int | None = HfArg(default=None, help="tokens in a window; default: what the model can see, at most 1024")
    max_eval_windows: int | None = HfArg(default=None, help="held-out windows evaluated, at most")

    def __post_init__(self) -> None:
        check_numbers(self, "(0, 1)", "validation_share")
        check_numbers(self, "(0, inf)", "max_characters", "vocab_size", "context", "max_eval_windows")
        check_numbers(self, "[2, inf)", "context")  # the first token of a window is not predicted


def cut_windows(tokens: Tensor, context: int, most: int | None = None) -> StackDataset:
    """Consecutive windows of a text's tokens, ``[context]`` each; what does not fill the last one is left out.

    The first token of a window has no label: the Trainer divides the loss by the number of labels.
    """
    windows = tokens[: len(tokens) // context * context].view(-1, context)[:most]
    labels = windows.clone()
    labels[:, 0] = IGNORED
    return StackDataset(input_ids=windows, labels=labels)


def make_job(options: ModelArguments, text: TextArguments, training: MultiMaxTrainingArguments) -> Job:
    """Reads the text, makes or loads tokenizer and model, cuts windows."""
    with training.main_process_first(desc="reading the data"):
        train_text, held_out_text = read_texts(text)
    name = text.tokenizer or options.model
    tokenizer = stock_tokenizer(name, train_text, text.vocab_size, text.context or 1024)
    make_stock = partial(stock_model, options.model, options.model_config, text.context, tokenizer)
    model = build_model(options, make_stock, training.seed)
    check_vocabulary(model, tokenizer)
    context = choose_context(model, text)
    check_causal(model, min(context, 8))
    train = cut_windows(encode(tokenizer, train_text), context)
    held_out = cut_windows(encode(tokenizer, held_out_text), context, text.max_eval_windows)
    for part, name in ((train, text.data), (held_out, text.validation_data or f"the held-out end of {text.data}")):
        if not len(part):
            raise DataError(f"{name} has less than one window of {context} tokens: give more text or a smaller context")
    return Job(
        task="text-generation",
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=held_out,
        collator=default_data_collator,
        evaluate=lambda trainer: perplexities(trainer, held_out, tokenizer),
        data={
            **describe(text.data, BUILT_IN_TEXTS),
            "training_tokens": len(train) * context,
            "evaluation_tokens": len(held_out) * context,
            "training_examples": len(train),
            "evaluation_examples": len(held_out),
            "context": context,
            "vocabulary": len(tokenizer),
        },
        headline=("perplexity", "byte_perplexity"),
        metrics=("perplexity",),
    )


def read_texts(text: TextArguments) -> tuple[str, str]:
    """Training and held-out text."""
    whole = load_text(text.data, text.max_characters)
    if text.validation_data:
        return whole, load_text(text.validation_data, text.max_characters)
    cut = whole.find("\n", int(len(whole) * (1 - text.validation_share))) + 1
    if not 0 < cut < len(whole):
        raise DataError(f"{text.data} has too few lines to hold some out: give --validation_data")
    return whole[:cut], whole[cut:]


@torch.no_grad()
def check_causal(model: PreTrainedModel, length: int) -> None:
    """Raise DataError if the model sees, in a text of ``length`` tokens, those that it shall predict."""
    if is_deepspeed_zero3_enabled():  # the weights are in parts and the model cannot be called by itself
        return
    tokens = torch.arange(length, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
    training = model.training
    before, after = (model.eval()(input_ids).logits[:, :-1].float() for input_ids in (tokens, changed))
    model.train(training)
    if (before - after).abs().max() > 1e-5 * before.abs().max():  # an untrained model sees little
        raise DataError(
            f"{type(model).__name__} sees the tokens that it should predict: it is no causal language model as it is "
            "(for BERT and its like, is_decoder in the config makes it one)"
        )


def choose_context(model: PreTrainedModel, text: TextArguments) -> int:
    limit = getattr(model.config, "max_position_embeddings", None)
    if text.context is not None and limit is not None and text.context > limit:
        raise DataError(f"--context {text.context} is longer than the model's {limit} positions")
    return text.context or min(limit or 1024, 1024)


def perplexities(trainer: Trainer, held_out: StackDataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Loss in nats per predicted token, and both perplexities."""
    tokens = held_out.datasets["input_ids"].flatten()
    size = len(tokenizer.decode(tokens, clean_up_tokenization_spaces=False).encode("utf-8"))
    # All windows are equally long, so that the mean of their losses is the mean over tokens.
    loss = trainer.evaluate()["eval_loss"]
    return compute("perplexity", losses=[loss], tokens=[len(tokens)], num_bytes=size)


RECIPE = ("language_modeling", (ModelArguments, TextArguments, MultiMaxTrainingArguments), make_job)

if __name__ == "__main__":
    main(*RECIPE)
