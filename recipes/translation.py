"""Translation: pre-train an encoder and a decoder from scratch or fine-tune a checkpoint, with any normalizer.

    python -m recipes.translation recipes/configs/translation_help_small.yaml
    python -m recipes.translation recipes/configs/translation_help_small.yaml --normalizer softmax --output_dir runs/s
    python -m recipes.translation --data corpus.en --target_data corpus.de --output_dir runs/mine
    python -m recipes.translation --model t5-small --source_prefix "translate English to German: " --output_dir runs/t5

The held-out loss is per target token and never smoothed. BLEU and chrF are sacrebleu's, of translations by beam search
against the references as they were read. The measures of attention are taken on padded batches, of sentences of nearly
the same length, and count the queries that are padding.
"""

import copy
import io
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sacrebleu
import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Tokenizer,
)
from transformers.trainer_utils import EvalLoopOutput

from hf_multimax.training import MultiMaxSeq2SeqTrainer, MultiMaxSeq2SeqTrainingArguments
from recipes.common import Job, ModelArguments, build_model, exp, main, write_json
from recipes.data import DataError, describe, help_sentences, load_text

HELP = "help-en-de"
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

Pair = tuple[str, str]


@dataclass
class TranslationArguments:
    """The sentences, their tokens, and how they are translated."""

    data: str = field(
        default=HELP,
        metadata={
            "help": f"{HELP}, a text file (with target_data), a .tsv or .jsonl file, or a Hub set or folder with a "
            "column 'translation', as name[:configuration]"
        },
    )
    target_data: str | None = field(
        default=None, metadata={"help": "text file that holds the translation of each line of data"}
    )
    validation_data: str | None = field(
        default=None, metadata={"help": "held-out sentences, given as data is; default: some of the data"}
    )
    validation_target_data: str | None = field(default=None, metadata={"help": "given as target_data is"})
    source_lang: str = field(default="en", metadata={"help": "language translated from, as the data set calls it"})
    target_lang: str = field(default="de", metadata={"help": "language translated to, as the data set calls it"})
    train_split: str = field(default="train", metadata={"help": "of a Hub data set"})
    validation_split: str | None = field(
        default=None, metadata={"help": "of a Hub data set; default: sentences of the train split are held out"}
    )
    data_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub data set"})
    validation_size: int = field(default=500, metadata={"help": "sentences held out where none are given"})
    source_prefix: str = field(default="", metadata={"help": "put before every source sentence, for T5 checkpoints"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id; default: the checkpoint's, or SentencePiece trained on the data"},
    )
    vocab_size: int = field(default=8000, metadata={"help": "of a tokenizer trained here, for both languages together"})
    max_length: int = field(
        default=128, metadata={"help": "tokens of a sentence: longer ones are left out in training, else cut"}
    )
    max_eval_examples: int | None = field(default=None, metadata={"help": "held-out sentences translated, at most"})
    num_beams: int = field(default=4, metadata={"help": "of the beam search"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "of a translation; default: max_length"})
    length_penalty: float = field(default=1.0, metadata={"help": "of the beam search, larger for longer translations"})

    def __post_init__(self) -> None:
        positive = ("validation_size", "vocab_size", "max_length", "max_eval_examples", "num_beams", "max_new_tokens")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name} must be positive, got {value}")
        if self.validation_target_data and not self.validation_data:
            raise DataError("--validation_target_data needs --validation_data")
        self.max_new_tokens = self.max_new_tokens or self.max_length


# -- sentences ---------------------------------------------------------------------------------------------------------


def read_data(options: TranslationArguments) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of source and target sentence.

    What is held out of the data is drawn once for all seeds.
    """
    pairs = read_pairs(options.data, options.target_data, options.train_split, options)
    if options.validation_data:
        split = options.validation_split or "validation"
        return pairs, read_pairs(options.validation_data, options.validation_target_data, split, options)
    if options.validation_split:
        if options.data == HELP or options.target_data or Path(options.data).suffix in _READERS:
            raise DataError(
                f"--validation_split {options.validation_split} is a part of a Hub data set, which {options.data} is "
                "not: give --validation_data, or the option's value null in the YAML file"
            )
        return pairs, read_pairs(options.data, None, options.validation_split, options)
    if len(pairs) <= options.validation_size:
        raise DataError(
            f"{options.data} has only {len(pairs)} pairs of sentences, so that --validation_size "
            f"{options.validation_size} cannot be held out"
        )
    random.Random(0).shuffle(pairs)
    return pairs[options.validation_size :], pairs[: options.validation_size]


def read_pairs(source: str, target: str | None, split: str, options: TranslationArguments) -> list[Pair]:
    """The pairs of sentences that the options name, without those that are blank in a language.

    Raises:
        DataError: if there is no such thing, no pair in it, or the languages do not fit.
    """
    path = Path(source).expanduser()
    if source == HELP and target is None:
        pairs = _help_pairs(options)
    elif target is not None:
        pairs = _read_parallel(path, Path(target).expanduser())
    elif path.suffix in _READERS:
        pairs = _READERS[path.suffix](path, options)
    elif path.is_file():
        raise DataError(f"{source} has one language only: give --target_data, or a .tsv or .jsonl file")
    elif not path.exists() and (path.is_absolute() or source.startswith((".", "~")) or path.suffix == ".txt"):
        raise DataError(f"there is no file or folder {source}")
    else:
        pairs = _read_hub(source, split, options)
    pairs = [(a, b) for a, b in ((a.strip(), b.strip()) for a, b in pairs) if a and b]
    if not pairs:
        raise DataError(f"there is no pair of sentences in {source}")
    return pairs


def _help_pairs(options: TranslationArguments) -> list[Pair]:
    languages = (options.source_lang, options.target_lang)
    if languages == ("en", "de"):
        return help_sentences()
    if languages == ("de", "en"):
        return [(german, english) for english, german in help_sentences()]
    raise DataError(f"{HELP} has en and de, not {options.source_lang} to {options.target_lang}")


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    return load_text(str(path)).removesuffix("\n").split("\n")  # splitlines would part lines at rare characters too


def _read_parallel(source: Path, target: Path) -> list[Pair]:
    sources, targets = _read_lines(source), _read_lines(target)
    if len(sources) != len(targets):
        raise DataError(f"{source} has {len(sources)} lines and {target} has {len(targets)}: they must be parallel")
    return list(zip(sources, targets))


def _read_tsv(path: Path, options: TranslationArguments) -> list[Pair]:
    pairs = []
    for number, line in enumerate(_read_lines(path), 1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise DataError(f"line {number} of {path} has {len(fields)} fields, not source<TAB>target")
        pairs.append((fields[0], fields[1]))
    return pairs


def _read_jsonl(path: Path, options: TranslationArguments) -> list[Pair]:
    pairs = []
    for number, line in enumerate(_read_lines(path), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is no JSON ({error})") from error
        sentences = row.get("translation", row) if isinstance(row, dict) else None
        pairs.append(_pair(sentences, f"line {number} of {path}", options))
    return pairs


_READERS = {".tsv": _read_tsv, ".jsonl": _read_jsonl}


def _pair(sentences: Any, where: str, options: TranslationArguments) -> Pair:
    if not isinstance(sentences, dict):
        raise DataError(f"{where} must be an object of language: sentence")
    for language in (options.source_lang, options.target_lang):
        if not isinstance(sentences.get(language), str):
            raise DataError(
                f"{where} has no sentence in language {language!r}, only {', '.join(map(str, sentences))}: "
                "see --source_lang and --target_lang"
            )
    return sentences[options.source_lang], sentences[options.target_lang]


def _read_hub(source: str, split: str, options: TranslationArguments) -> list[Pair]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source} is no file, and data sets of the Hub need `pip install datasets`") from error
    folder = Path(source).expanduser().is_dir()
    name, _, configuration = (source, "", "") if folder else source.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split=split, revision=options.data_revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"the split {split!r} of the data set {source} cannot be read: {reason}") from error
    if "translation" not in rows.column_names:
        raise DataError(f"the data set {source} has no column 'translation', only {', '.join(rows.column_names)}")
    return [_pair(row, f"the data set {source}", options) for row in rows["translation"]]


def describe_data(options: TranslationArguments) -> dict[str, Any]:
    """The name, origin and languages of the ``data`` entry of results.json."""
    languages = {"language": [options.source_lang, options.target_lang]}
    if options.data == HELP:
        return {**describe(HELP), **languages}
    path = Path(options.data).expanduser()
    local = options.target_data is not None or path.exists()
    name = path.name if local else options.data
    return {"name": name, "dataset": None if local else name.partition(":")[0], "description": name, **languages}


# -- tokens ------------------------------------------------------------------------------------------------------------


def load_tokenizer(model: ModelArguments, options: TranslationArguments, pairs: list[Pair]) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or that of the checkpoint, or one trained on the pairs."""
    name = options.tokenizer or model.model
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    kind = {**DEFAULT_CONFIG, **model.model_config}["model_type"]
    if kind not in _TOKENIZERS:
        raise DataError(f"no tokenizer is trained here for model_type {kind}: give --tokenizer")
    return _TOKENIZERS[kind](train_sentencepiece(pairs, options.vocab_size), options)


def train_sentencepiece(pairs: list[Pair], vocab_size: int) -> bytes:
    """One unigram SentencePiece model for both languages, in which every character of the pairs has a piece.

    Args:
        vocab_size: at most; less where the sentences do not yield so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for pair in pairs for sentence in pair),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",  # a reference is compared as it was written
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,  # the same vocabulary everywhere
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"no vocabulary of {vocab_size} pieces can be made: {error}") from error
    return model.getvalue()


def marian_tokenizer(model: bytes, options: TranslationArguments) -> MarianTokenizer:
    """A tokenizer with one SentencePiece model for both languages; as in Marian's own, </s> is 0 and <pad> is last."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(len(processor)) if not processor.is_control(i)]
    names = ["</s>", "<unk>", *(piece for piece in pieces if piece != "<unk>"), "<pad>"]
    with tempfile.TemporaryDirectory() as folder:
        spm, vocabulary = Path(folder) / "both.spm", Path(folder) / "vocab.json"
        spm.write_bytes(model)
        vocabulary.write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
        return MarianTokenizer(
            source_spm=str(spm),
            target_spm=str(spm),
            vocab=str(vocabulary),
            source_lang=options.source_lang,
            target_lang=options.target_lang,
            model_max_length=options.max_length,
        )


def t5_tokenizer(model: bytes, options: TranslationArguments) -> T5Tokenizer:
    """T5's tokenizer, without the tokens of its pre-training by filled gaps."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=options.max_length)


_TOKENIZERS = {"marian": marian_tokenizer, "t5": t5_tokenizer, "mt5": t5_tokenizer}


class Sentences(Dataset):
    """Tokenized pairs: ``input_ids``, ``attention_mask`` and ``labels`` as lists, with the end-of-sentence token."""

    def __init__(
        self, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, options: TranslationArguments, cut: bool
    ) -> None:
        self.pairs = pairs
        limits = {"truncation": True, "max_length": options.max_length} if cut else {}
        encoded = tokenizer(
            [options.source_prefix + source for source, _ in pairs],
            text_target=[target for _, target in pairs],
            verbose=False,
            **limits,
        )
        names = ("input_ids", "attention_mask", "labels")
        self.rows = [dict(zip(names, row)) for row in zip(*(encoded[name] for name in names))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    def select(self, indices: list[int]) -> "Sentences":
        chosen = copy.copy(self)
        chosen.pairs, chosen.rows = [self.pairs[i] for i in indices], [self.rows[i] for i in indices]
        return chosen

    def without_longer(self, length: int) -> "Sentences":
        return self.select([i for i, row in enumerate(self.rows) if _longest(row) <= length])

    def in_buckets(self, batch: int) -> "Sentences":
        """In an order that fills batches with sentences of nearly the same length; the batches come in any order."""
        order = sorted(range(len(self)), key=lambda i: len(self.rows[i]["input_ids"]))
        batches = [order[i : i + batch] for i in range(0, len(order), batch)]
        last = batches.pop() if len(order) % batch else []
        random.Random(0).shuffle(batches)
        return self.select([i for batch in (*batches, last) for i in batch])


def _longest(row: dict[str, list[int]]) -> int:
    return max(len(row["input_ids"]), len(row["labels"]))


class LengthBuckets(Sampler[int]):
    """An order of the examples in which those of a batch have nearly the same length.

    Unlike that of Transformers it depends on seed and epoch only, so that every process and every resumed run has it.

    Args:
        lengths: of the examples.
        batch_size: examples of an optimizer step, on all processes.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = draw.sample(range(len(self)), len(self))
        batches = []
        pool = 50 * self.batch_size
        for begin in range(0, len(order), pool):
            alike = sorted(order[begin : begin + pool], key=self.lengths.__getitem__)
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        draw.shuffle(batches)
        batches.sort(key=lambda batch: len(batch) < self.batch_size)  # only the last batch may be smaller
        return (i for batch in batches for i in batch)


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
        return LengthBuckets([_longest(row) for row in dataset.rows], batch, seed)

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
    with training.main_process_first(desc="reading the data"):
        train_pairs, held_out_pairs = read_data(options)
    tokenizer = load_tokenizer(model_options, options, train_pairs)
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
    return Job(
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
        source=model_options.model,
        trainer_class=TranslationTrainer,
        trainer_options={"compute_loss_func": SmoothedLoss(training.label_smoothing_factor)},
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
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {rows}: give the model's own tokenizer"
        )
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
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    metrics = {
        "bleu": bleu.corpus_score(translations, [references]).score,
        "chrf": chrf.corpus_score(translations, [references]).score,
        "loss": loss,
        "perplexity": exp(loss),
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
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


if __name__ == "__main__":
    main("translation", (ModelArguments, TranslationArguments, MultiMaxSeq2SeqTrainingArguments), make_job)
