"""Tokenizers: of a checkpoint, or trained on the data; and whether one goes with a model."""

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    MarianTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Tokenizer,
)

from recipes.shared.checks import DataError, explained
from recipes.shared.data.sentences import Pair, TranslationArguments

END_OF_TEXT = "<|endoftext|>"


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {rows}: give the model's own tokenizer"
        )


# -- of one text -------------------------------------------------------------------------------------------------------


def train_tokenizer(text: str, vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, as GPT-2's, trained on ``text``; every text can be encoded and comes back unchanged.

    Args:
        vocab_size: at most; at least 257 (the bytes and the end of text).
        max_length: ``model_max_length`` of the tokenizer.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, got {vocab_size}")
    untrained = GPT2Tokenizer(pad_token=END_OF_TEXT, model_max_length=max_length)
    return untrained.train_new_from_iterator(text.splitlines(keepends=True), vocab_size, show_progress=False)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The tokens of a long text without special tokens, ``[tokens]``, int64."""
    tokens: list[int] = []
    for piece in _pieces(text):
        tokens += tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.long)


def _pieces(text: str, size: int = 1_000_000) -> Iterator[str]:
    """The text in pieces that end with a line where they can: tokenizers are slow on very long strings."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin + size) + 1
        yield text[begin : end or None]
        begin = end or len(text)


# -- of sentences in two languages -------------------------------------------------------------------------------------


def translation_tokenizer(
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
    with explained(f"no vocabulary of {vocab_size} pieces can be made", RuntimeError):
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
