"""Translation: pre-train an encoder and a decoder from scratch or fine-tune a checkpoint, with any normalizer.

    python -m recipes.translation recipes/configs/translation_help_small.yaml
    python -m recipes.translation recipes/configs/translation_help_small.yaml --normalizer softmax --output_dir runs/s
    python -m recipes.translation --data corpus.en --target_data corpus.de --output_dir runs/mine
    python -m recipes.translation --model t5-small --source_prefix "translate English to German: " --output_dir runs/t5

The held-out loss is per target token and never smoothed. BLEU and chrF are sacrebleu's, of translations by beam search
against the references as they were read. The measures of attention are taken on padded batches, of sentences of nearly
the same length, and count the queries that are padding.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_multimax.training import MultiMaxSeq2SeqTrainer, MultiMaxSeq2SeqTrainingArguments
from recipes.shared.checks import DataError
from recipes.shared.data.sentence_batches import Example, LengthBuckets, in_buckets, longest, tokenize
from recipes.shared.data.sentences import TranslationArguments, describe_data, read_data
from recipes.shared.metrics import compute
from recipes.shared.models import ModelArguments, build_model
from recipes.shared.record import write_json
from recipes.shared.run import Job, main
from recipes.shared.tokens import check_vocabulary, translation_tokenizer

TRANSLATIONS = "translations.json"
DEFAULT_CONFIG = {
    "model_type": "marian",
    "encoder_layers": 3,
    "decoder_layers": 3,
    "d_model": 256,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "scale_embedding": True,
}


# -- training ----------------------------------------------------------------------------------------------------------


def smoothed_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, smoothing: float
) -> Tensor:
    """Cross-entropy with label smoothing, divided by the number of target tokens in the whole batch of a step.

    The Trainer takes it from its ``compute_loss_func``. The loss inside Marian and T5 is a mean over one process's part
    of the batch, whose tokens would weigh more where sentences are short.

    Args:
        outputs: their ``logits`` are ``[..., tokens, vocabulary]``.
        labels: ``[..., tokens]``.
    """
    logits = outputs["logits"].float().flatten(0, -2)
    total = cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, reduction="sum")
    items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (items.to(total.device) if torch.is_tensor(items) else items)


class TranslationTrainer(MultiMaxSeq2SeqTrainer):
    """``evaluate`` gives the loss per held-out token, not smoothed; ``predict`` translates by its options."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthBuckets([longest(row) for row in dataset], batch, seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return SequentialSampler(eval_dataset)  # translations must come in the order of the references

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Each sentence's loss and number of tokens, ``[batch]``, as prediction and label; or its translation."""
        # What Seq2SeqTrainer sets keeps the rows that fill the last batches of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        inputs = self._prepare_inputs(inputs)
        if self._gen_kwargs:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return None, self.model.generate(**given, **self._gen_kwargs), None
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits.float()
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return None, losses.sum(dim=1), (labels != -100).sum(dim=1)


def loss_per_token(prediction: EvalPrediction) -> dict[str, float]:
    """The mean over tokens of what :class:`TranslationTrainer` has measured of each sentence, ``[n]``."""
    return {"loss": float(prediction.predictions.astype("float64").sum() / prediction.label_ids.sum())}


def make_job(
    model_options: ModelArguments, options: TranslationArguments, training: MultiMaxSeq2SeqTrainingArguments
) -> Job:
    """Reads the sentences, makes or loads tokenizer and model, and checks that all of it fits together."""
    for name in ("generation_num_beams", "generation_max_length", "predict_with_generate", "prediction_loss_only"):
        if getattr(training, name, None):
            raise DataError(f"--{name} does not act here: translations are made by --num_beams and --max_new_tokens")
    with training.main_process_first(desc="reading the data"):
        train_pairs, held_out_pairs = read_data(options)
    kind = {**DEFAULT_CONFIG, **model_options.model_config}["model_type"]
    tokenizer = translation_tokenizer(model_options.model, kind, options, train_pairs)
    model = build_model(model_options, lambda: stock_model(model_options, options, tokenizer), training.seed)
    check_fit(model, tokenizer, options)
    whole = [example.row for example in tokenize(train_pairs, tokenizer, options, cut=False)]
    train = [row for row in whole if longest(row) <= options.max_length]
    if not train:
        raise DataError(f"no pair of {options.data} is within --max_length {options.max_length} tokens")
    examples = tokenize(held_out_pairs, tokenizer, options, cut=True)
    held_out, translated = (
        in_buckets(part, training.per_device_eval_batch_size)
        for part in (examples, examples[: options.max_eval_examples])
    )
    return Job(
        task="translation",
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=[example.row for example in held_out],
        collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        evaluate=lambda trainer: measure(trainer, translated, tokenizer, options),
        data={
            **describe_data(options),
            "training_tokens": sum(len(row["labels"]) for row in train),
            "evaluation_tokens": sum(len(example.row["labels"]) for example in held_out),
            "training_examples": len(train),
            "training_examples_left_out": len(train_pairs) - len(train),
            "evaluation_examples": len(held_out),
            "translated_examples": len(translated),
            "vocabulary": len(tokenizer),
        },
        headline=("bleu", "chrf", "perplexity"),
        metrics=("translation", "perplexity"),
        trainer_class=TranslationTrainer,
        trainer_options={
            "compute_loss_func": partial(smoothed_loss, smoothing=training.label_smoothing_factor),
            "compute_metrics": loss_per_token,
        },
    )


def stock_model(
    options: ModelArguments, translation: TranslationArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    if options.model is not None:
        return AutoModelForSeq2SeqLM.from_pretrained(options.model, dtype=torch.float32)
    values = {**DEFAULT_CONFIG, **options.model_config}
    if values["model_type"] != DEFAULT_CONFIG["model_type"]:
        values = options.model_config
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    if values["model_type"] == "marian":
        special["forced_eos_token_id"] = tokenizer.eos_token_id
        # With the default, meant for wide models, a narrow one takes long to look at the source at all.
        special["init_std"] = values["d_model"] ** -0.5
        special["max_position_embeddings"] = max(translation.max_length, translation.max_new_tokens + 1)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**{**special, **values}))
    # A model that nobody configures should translate as it was evaluated, not at most 20 tokens.
    model.generation_config.update(**generation_options(translation))
    return model


def generation_options(options: TranslationArguments) -> dict[str, Any]:
    """What ``generate`` is called with."""
    chosen = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    return chosen if options.num_beams == 1 else {**chosen, "length_penalty": options.length_penalty}


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TranslationArguments) -> None:
    """Raise DataError if tokenizer and model, or lengths and model, do not go together."""
    check_vocabulary(model, tokenizer)
    for name in ("pad_token_id", "eos_token_id"):
        ours, its = getattr(tokenizer, name), getattr(model.config, name)
        if ours is None or ours != its:
            raise DataError(f"{name} is {ours} in the tokenizer and {its} in the model: give the model's own tokenizer")
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, needed in (("max_length", options.max_length), ("max_new_tokens", options.max_new_tokens + 1)):
        if limit is not None and needed > limit:
            raise DataError(f"--{name} {getattr(options, name)} is too long for the model's {limit} positions")


# -- evaluation --------------------------------------------------------------------------------------------------------


def measure(
    trainer: TranslationTrainer,
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    options: TranslationArguments,
) -> dict[str, Any]:
    """Loss per token of all held-out sentences; BLEU and chrF of ``examples``, by beam search, which are written."""
    loss = trainer.evaluate()["eval_loss"]
    tokens = trainer.predict([example.row for example in examples], **generation_options(options)).predictions
    tokens[tokens < 0] = tokenizer.pad_token_id
    translations = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    rows = [
        {"source": example.source, "reference": example.target, "translation": translation}
        for example, translation in zip(examples, translations)
    ]
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / TRANSLATIONS, rows)
        for row in rows[:3]:
            print("\n" + "\n".join(f"{name:<11}  {text}" for name, text in row.items()), flush=True)
    return {
        **compute("translation", predictions=translations, references=[example.target for example in examples]),
        **compute("perplexity", losses=[loss], tokens=[1]),
        "num_beams": options.num_beams,
    }


RECIPE = ("translation", (ModelArguments, TranslationArguments, MultiMaxSeq2SeqTrainingArguments), make_job)

if __name__ == "__main__":
    main(*RECIPE)
