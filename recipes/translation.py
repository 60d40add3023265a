"""Translation: pre-train an encoder and a decoder from scratch or fine-tune a checkpoint, with any normalizer.

    python -m recipes.translation recipes/configs/translation_help_small.yaml
    python -m recipes.translation recipes/configs/translation_help_small.yaml --normalizer softmax --output_dir runs/s
    python -m recipes.translation --data corpus.en --target_data corpus.de --output_dir runs/mine
    python -m recipes.translation --model t5-small --source_prefix "translate English to German: " --output_dir runs/t5

The held-out loss is per target token and never smoothed. BLEU and chrF are sacrebleu's, of translations by beam search
against the references as they were read. The measures of attention are taken on padded batches, of sentences of nearly
the same length, and count the queries that are padding.
"""

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
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import EvalLoopOutput

from hf_multimax.training import MultiMaxSeq2SeqTrainer, MultiMaxSeq2SeqTrainingArguments
from recipes.shared.adapters import with_adapter
from recipes.shared.checks import DataError
from recipes.shared.data.sentence_batches import LengthBuckets, Sentences, longest
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


class SmoothedLoss:
    """Cross-entropy with label smoothing, divided by the number of target tokens in the whole batch of a step.

    The Trainer takes it from its ``compute_loss_func``. The loss inside Marian and T5 is a mean over one process's part
    of the batch, whose tokens would weigh more where sentences are short.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of ``outputs.logits`` ``[..., tokens, vocabulary]`` under ``labels`` ``[..., tokens]``."""
        logits = outputs["logits"].float().flatten(0, -2)
        total = cross_entropy(logits, labels.flatten(), label_smoothing=self.smoothing, reduction="sum")
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if torch.is_tensor(items) else items)


class TranslationTrainer(MultiMaxSeq2SeqTrainer):
    """``evaluate`` gives the loss per held-out token, not smoothed; ``predict`` translates."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthBuckets([longest(row) for row in dataset.rows], batch, seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return SequentialSampler(eval_dataset)  # translations must come in the order of the references

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Each sentence's loss and number of tokens, ``[batch, 2]``, or its translation; as predictions."""
        inputs = self._prepare_inputs(inputs)
        if not prediction_loss_only:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return None, self.model.generate(**given, **self._gen_kwargs), None
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits.float()
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return None, torch.stack([losses.sum(dim=1), (labels != -100).sum(dim=1).float()], dim=1), None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # What Seq2SeqTrainer sets keeps the rows that fill the last batches of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if prediction_loss_only:
            loss, tokens = output.predictions.astype("float64").sum(axis=0)
            output.metrics[f"{metric_key_prefix}_loss"] = float(loss / tokens)
        return output


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
    train = Sentences(train_pairs, tokenizer, options, cut=False).without_longer(options.max_length)
    if not len(train):
        raise DataError(f"no pair of {options.data} is within --max_length {options.max_length} tokens")
    everything = Sentences(held_out_pairs, tokenizer, options, cut=True)
    held_out, translated = (
        part.in_buckets(training.per_device_eval_batch_size)
        for part in (everything, everything.select(list(range(len(everything)))[: options.max_eval_examples]))
    )
    job = Job(
        task="translation",
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=held_out,
        collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        evaluate=lambda trainer: measure(trainer, translated, tokenizer, options),
        data={
            **describe_data(options),
            "training_tokens": sum(len(row["labels"]) for row in train.rows),
            "evaluation_tokens": sum(len(row["labels"]) for row in held_out.rows),
            "training_examples": len(train),
            "training_examples_left_out": len(train_pairs) - len(train),
            "evaluation_examples": len(held_out),
            "translated_examples": len(translated),
            "vocabulary": len(tokenizer),
        },
        headline=("bleu", "chrf", "perplexity"),
        metrics=("translation", "perplexity"),
        source=model_options.model,
        trainer_class=TranslationTrainer,
        trainer_options={"compute_loss_func": SmoothedLoss(training.label_smoothing_factor)},
    )
    return with_adapter(job, model_options)


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
    sentences: Sentences,
    tokenizer: PreTrainedTokenizerBase,
    options: TranslationArguments,
) -> dict[str, Any]:
    """Loss per token of all held-out sentences, BLEU and chrF of ``sentences``, whose translations are written."""
    loss = trainer.evaluate()["eval_loss"]
    translations = translate(trainer, sentences, tokenizer, options)
    references = [target for _, target in sentences.pairs]
    metrics = {
        **compute("translation", predictions=translations, references=references),
        **compute("perplexity", losses=[loss], tokens=[1]),
        "num_beams": options.num_beams,
    }
    if trainer.is_world_process_zero():
        rows = [
            {"source": source, "reference": reference, "translation": translation}
            for (source, reference), translation in zip(sentences.pairs, translations)
        ]
        write_json(Path(trainer.args.output_dir) / TRANSLATIONS, rows)
        for row in rows[:3]:
            print("\n" + "\n".join(f"{name:<11}  {text}" for name, text in row.items()), flush=True)
    return metrics


def translate(
    trainer: TranslationTrainer,
    sentences: Sentences,
    tokenizer: PreTrainedTokenizerBase,
    options: TranslationArguments,
) -> list[str]:
    """The translations of ``sentences`` by beam search, the same on every process."""
    tokens = trainer.predict(sentences, **generation_options(options)).predictions
    tokens[tokens < 0] = tokenizer.pad_token_id
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


RECIPE = ("translation", (ModelArguments, TranslationArguments, MultiMaxSeq2SeqTrainingArguments), make_job)

if __name__ == "__main__":
    main(*RECIPE)
