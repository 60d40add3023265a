"""The sentences of the translation recipe: its options, reading and splitting them, their tokens, their order."""

import copy
import io
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from torch.utils.data import Dataset, Sampler
from transformers import (
    AutoTokenizer,
    MarianTokenizer,
    PreTrainedTokenizerBase,
    T5Tokenizer,
)

from recipes.data import DataError, describe, help_sentences, load_text

HELP = "help-en-de"

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


def load_tokenizer(
    checkpoint: str | None, model_type: str, options: TranslationArguments, pairs: list[Pair]
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or that of the checkpoint, or one for ``model_type`` trained on the pairs."""
    name = options.tokenizer or checkpoint
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    if model_type not in _TOKENIZERS:
        raise DataError(f"no tokenizer is trained here for model_type {model_type}: give --tokenizer")
    return _TOKENIZERS[model_type](train_sentencepiece(pairs, options.vocab_size), options)


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
        return self.select([i for i, row in enumerate(self.rows) if longest(row) <= length])

    def in_buckets(self, batch: int) -> "Sentences":
        """In an order that fills batches with sentences of nearly the same length; the batches come in any order."""
        order = sorted(range(len(self)), key=lambda i: len(self.rows[i]["input_ids"]))
        batches = [order[i : i + batch] for i in range(0, len(order), batch)]
        last = batches.pop() if len(order) % batch else []
        random.Random(0).shuffle(batches)
        return self.select([i for batch in (*batches, last) for i in batch])


def longest(row: dict[str, list[int]]) -> int:
    """Tokens of the longer side of a pair."""
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
