"""Pairs of sentences in two languages: LibreOffice's help, local files, and data sets of the Hub."""

import glob
import html
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers.hf_argparser import HfArg

from recipes.shared.checks import DataError, check_numbers
from recipes.shared.data.debian import debian_folder
from recipes.shared.data.sources import describe, is_path, read_file, reading_with_datasets

HELP = "help-en-de"
TABS, JSON_LINES = ".tsv", ".jsonl"

Pair = tuple[str, str]


@dataclass
class TranslationArguments:
    """The sentences, their tokens, and how they are translated."""

    data: str = HfArg(
        default=HELP,
        help=f"{HELP}, a text file (with target_data), a .tsv or .jsonl file, or a Hub set or folder with a column "
        "'translation', as name[:configuration]",
    )
    target_data: str | None = HfArg(default=None, help="text file that holds the translation of each line of data")
    validation_data: str | None = HfArg(
        default=None, help="held-out sentences, given as data is; default: some of the data"
    )
    validation_target_data: str | None = HfArg(default=None, help="given as target_data is")
    source_lang: str = HfArg(default="en", help="language translated from, as the data set calls it")
    target_lang: str = HfArg(default="de", help="language translated to, as the data set calls it")
    train_split: str = HfArg(default="train", help="of a Hub data set")
    validation_split: str | None = HfArg(
        default=None, help="of a Hub data set; default: sentences of the train split are held out"
    )
    data_revision: str | None = HfArg(default=None, help="branch, tag or commit of a Hub data set")
    validation_size: int = HfArg(default=500, help="sentences held out where none are given")
    source_prefix: str = HfArg(default="", help="put before every source sentence, for T5 checkpoints")
    tokenizer: str | None = HfArg(
        default=None, help="folder or Hub id; default: the checkpoint's, or SentencePiece trained on the data"
    )
    vocab_size: int = HfArg(default=8000, help="of a tokenizer trained here, for both languages together")
    max_length: int = HfArg(default=128, help="tokens of a sentence: longer ones are left out in training, else cut")
    max_eval_examples: int | None = HfArg(default=None, help="held-out sentences translated, at most")
    num_beams: int = HfArg(default=4, help="of the beam search")
    max_new_tokens: int | None = HfArg(default=None, help="of a translation; default: max_length")
    length_penalty: float = HfArg(default=1.0, help="of the beam search, larger for longer translations")

    def __post_init__(self) -> None:
        check_numbers(self, "(0, inf)", "validation_size", "vocab_size", "max_length", "max_eval_examples")
        check_numbers(self, "(0, inf)", "num_beams", "max_new_tokens")
        if self.validation_target_data and not self.validation_data:
            raise DataError("--validation_target_data needs --validation_data")
        self.max_new_tokens = self.max_new_tokens or self.max_length


def read_data(options: TranslationArguments) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of source and target sentence.

    What is held out of the data is drawn once for all seeds.
    """
    pairs = read_pairs(options.data, options.target_data, options.train_split, options)
    if options.validation_data:
        split = options.validation_split or "validation"
        return pairs, read_pairs(options.validation_data, options.validation_target_data, split, options)
    if options.validation_split:
        if options.data == HELP or options.target_data or Path(options.data).suffix in (TABS, JSON_LINES):
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
    elif not path.exists() and (is_path(source) or path.suffix in (".txt", TABS, JSON_LINES)):
        raise DataError(f"there is no file or folder {source}")
    elif path.suffix == TABS:
        pairs = _read_tsv(path)
    elif path.is_file() and path.suffix != JSON_LINES:
        raise DataError(f"{source} has one language only: give --target_data, or a .tsv or .jsonl file")
    else:
        pairs = _read_rows(source, split, options)
    pairs = [(a, b) for a, b in ((a.strip(), b.strip()) for a, b in pairs) if a and b]
    if not pairs:
        raise DataError(f"there is no pair of sentences in {source}")
    return pairs


def _help_pairs(options: TranslationArguments) -> list[Pair]:
    if {options.source_lang, options.target_lang} != {"en", "de"}:
        raise DataError(f"{HELP} has en and de, not {options.source_lang} to {options.target_lang}")
    pairs = help_sentences()
    return pairs if options.source_lang == "en" else [(german, english) for english, german in pairs]


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    text = read_file(path)
    if not text.strip():
        raise DataError(f"there is no text in {path}")
    return text.removesuffix("\n").split("\n")  # splitlines would part lines at rare characters too


def _read_parallel(source: Path, target: Path) -> list[Pair]:
    sources, targets = _read_lines(source), _read_lines(target)
    if len(sources) != len(targets):
        raise DataError(f"{source} has {len(sources)} lines and {target} has {len(targets)}: they must be parallel")
    return list(zip(sources, targets))


def _read_tsv(path: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(_read_lines(path), 1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise DataError(f"line {number} of {path} has {len(fields)} fields, not source<TAB>target")
        pairs.append((fields[0], fields[1]))
    return pairs


def _read_rows(source: str, split: str, options: TranslationArguments) -> list[Pair]:
    """What ``datasets`` reads: a JSON Lines file, a folder, or a data set of the Hub."""
    path = Path(source).expanduser()
    if path.suffix == JSON_LINES:
        _read_lines(path)  # refuses what has no text, which datasets does not
        kind, problem = "line", f"{path} cannot be read"
        name, request = "json", {"data_files": glob.escape(str(path)), "split": "train", "streaming": True}
    else:
        kind, problem = "row", f"the split {split!r} of the data set {source} cannot be read"
        name, _, configuration = (source, "", "") if path.is_dir() else source.partition(":")
        request = {"name": configuration or None, "split": split, "revision": options.data_revision}
    with reading_with_datasets(problem):
        rows = datasets.load_dataset(name, **request)
        return [_pair(row, f"{kind} {number} of {source}", options) for number, row in enumerate(rows, 1)]


def _pair(row: dict[str, Any], where: str, options: TranslationArguments) -> Pair:
    sentences = row.get("translation", row)
    if not isinstance(sentences, dict):
        raise DataError(f"{where} must be an object of language: sentence")
    languages = [language for language, sentence in sentences.items() if isinstance(sentence, str)]
    for language in (options.source_lang, options.target_lang):
        if language not in languages:
            raise DataError(
                f"{where} has no sentence in language {language!r}, only {', '.join(languages) or 'none'}: "
                "see --source_lang and --target_lang"
            )
    return sentences[options.source_lang], sentences[options.target_lang]


def describe_data(options: TranslationArguments) -> dict[str, Any]:
    """The name, origin and languages of the ``data`` entry of results.json."""
    return {**describe(options.data, (HELP,)), "language": [options.source_lang, options.target_lang]}


# -- LibreOffice's help ------------------------------------------------------------------------------------------------


def help_sentences(min_words: int = 3, max_words: int = 40) -> list[tuple[str, str]]:
    """English and German sentences of LibreOffice's help (Debian's libreoffice-help-en-us and -de, mainly MPL-2.0).

    They are the paragraphs with the same id on the same page that end as a sentence and have ``min_words`` to
    ``max_words`` words in both languages and differ. Each English text comes once, so that no split of the list has it
    on both sides. The order is that of the pages' names.
    """
    pages = "usr/*/libreoffice/help/*/text"
    english = _read_help(debian_folder("libreoffice-help-en-us", pages))
    german = _read_help(debian_folder("libreoffice-help-de", pages))
    pairs: dict[str, str] = {}
    for key, source in english.items():
        target = german.get(key, "")
        sentences = source[-1:] in _SENTENCE_ENDS and target[-1:] in _SENTENCE_ENDS
        fits = all(min_words <= len(text.split()) <= max_words for text in (source, target))
        if sentences and fits and source != target:
            pairs.setdefault(source, target)
    return list(pairs.items())


_SENTENCE_ENDS = (".", "!", "?")


_HELP_PARAGRAPH = re.compile(r'<(p|h\d)\b[^>]*?\bid="((?:par|hd)_id[^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)


def _read_help(folder: Path) -> dict[tuple[str, str], str]:
    """The paragraphs of LibreOffice's help pages in ``folder``, by page and paragraph id."""
    paragraphs = {}
    for page in sorted(folder.rglob("*.html")):
        name = page.relative_to(folder).as_posix()
        for _, identifier, content in _HELP_PARAGRAPH.findall(read_file(page)):
            plain = re.sub(r"<[^>]+>", "", re.sub(r"<br\b[^>]*>", " ", content))
            paragraphs[name, identifier] = " ".join(html.unescape(plain).split())
    return paragraphs
