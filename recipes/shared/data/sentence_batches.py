"""Tokenized pairs of sentences, and orders in which those of a batch have nearly the same length."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from recipes.shared.data.sentences import Pair, TranslationArguments


class Example(NamedTuple):
    """A pair of sentences, and what the model sees of it: ``input_ids``, ``attention_mask`` and ``labels`` as lists."""

    source: str
    target: str
    row: dict[str, list[int]]


def tokenize(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, options: TranslationArguments, cut: bool
) -> list[Example]:
    """The pairs with their tokens and the end-of-sentence token; ``cut`` shortens those that are too long."""
    limits = {"truncation": True, "max_length": options.max_length} if cut else {}
    encoded = tokenizer(
        [options.source_prefix + source for source, _ in pairs],
        text_target=[target for _, target in pairs],
        verbose=False,
        **limits,
    )
    names = ("input_ids", "attention_mask", "labels")
    rows = zip(*(encoded[name] for name in names))
    return [Example(*pair, dict(zip(names, row))) for pair, row in zip(pairs, rows)]


def in_buckets(examples: list[Example], batch: int) -> list[Example]:
    """In an order that fills batches with sentences of nearly the same length; the batches come in any order."""
    order = sorted(examples, key=lambda example: len(example.row["input_ids"]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    last = batches.pop() if len(order) % batch else []
    random.Random(0).shuffle(batches)
    return [example for batch in (*batches, last) for example in batch]


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
