"""Causal language models and their tokenizers: those of a checkpoint, or new ones for a text."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipes.shared.checkpoints import place_of
from recipes.shared.tokens import train_tokenizer

DEFAULT_CONFIG = {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128}


def stock_tokenizer(name: str | None, text: str, vocab_size: int, context: int) -> PreTrainedTokenizerBase:
    """The tokenizer of that name; without a name one trained on the text."""
    if name is not None:
        return AutoTokenizer.from_pretrained(place_of(name))
    return train_tokenizer(text, vocab_size, context)


def stock_model(
    name: str | None, values: dict[str, Any], context: int | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The checkpoint of that name, in float32; without a name one with random weights.

    Args:
        values: fields of a new model's config, over :data:`DEFAULT_CONFIG` and what the tokenizer says.
        context: positions of a new model, where ``values`` do not say.
    """
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(place_of(name), dtype=torch.float32)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **DEFAULT_CONFIG, **values})
    if context is not None and "max_position_embeddings" not in values and "n_positions" not in values:
        config.max_position_embeddings = context
    return AutoModelForCausalLM.from_config(config)
