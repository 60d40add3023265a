"""Batches for a model: of text, of images, or of JSON lines that hold its arguments."""

import importlib.resources
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_multimax.command_line.loading import Loaded

__all__ = ["batches", "image_batch", "text_batch"]

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
#: What ``--data`` may be, for help and error messages.
KINDS = "a text file, an image, a folder of either, .jsonl of the model's arguments, or - for standard input"


def batches(loaded: Loaded, data: str | None, size: int, length: int, most: int) -> Iterator[dict[str, torch.Tensor]]:
    """At most ``most`` batches of ``size`` for a model, one at a time.

    Text for a model with logits for every token is packed into pieces of ``length`` tokens without padding. For other
    models each line is an input; for an encoder-decoder a tab may part source and target, else a line is both. Every
    line of a .jsonl file is one batch: an object of (nested) lists, by the names of ``forward``'s arguments.

    Args:
        data: see :data:`KINDS`; None for a short English text that comes with the package.

    Raises:
        FileNotFoundError: if there are no such data. ValueError: for data that the model does not take, or too little.
    """
    found = itertools.islice(_all_batches(loaded, data, size, length), most)
    first = next(found, None)
    if first is None:
        raise ValueError(f"{data or 'the text'} holds no batch: give more data, or a smaller --length")
    return itertools.chain([first], found)


def text_batch(loaded: Loaded, text: str) -> dict[str, torch.Tensor]:
    """One text as a batch of one. Raises ValueError for a model without a tokenizer."""
    return _of_lines(loaded, [text], None)


def image_batch(loaded: Loaded, path: Path) -> dict[str, torch.Tensor]:
    """One image as a batch of one. Raises ValueError for a model without an image processor."""
    return _of_images(loaded, [path])


def _all_batches(loaded: Loaded, data: str | None, size: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    if data is not None and data.endswith(".jsonl"):
        return _of_json(Path(data))
    if loaded.takes_images:
        if data is None:
            raise ValueError(f"{loaded.path} takes images: give some with --data")
        return (_of_images(loaded, paths) for paths in _grouped(_files(Path(data), _IMAGES), size))
    lines = (line for line in _lines(data) if line.strip())
    if _is_packed(loaded):
        return _packed(loaded, lines, size, _shorter(loaded, length))
    return (_of_lines(loaded, group, _shorter(loaded, length)) for group in _grouped(lines, size))


def _is_packed(loaded: Loaded) -> bool:
    inside = loaded.inside
    return not inside.config.is_encoder_decoder and loaded.class_name.endswith(("LMHeadModel", "ForCausalLM", "LM"))


def _shorter(loaded: Loaded, length: int) -> int:
    """``length``, or as many positions as the model has."""
    positions = getattr(loaded.inside.config, "max_position_embeddings", None)
    return min(length, positions) if isinstance(positions, int) and positions > 2 else length


def _lines(data: str | None) -> Iterator[str]:
    if data == "-":
        yield from sys.stdin
    elif data is None:
        yield from importlib.resources.files("hf_multimax.command_line").joinpath("sample.txt").open(encoding="utf-8")
    else:
        for path in _files(Path(data), (".txt", ".md", ".rst", ".text")):
            try:
                with path.open(encoding="utf-8") as file:
                    yield from file
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is no UTF-8 text: --data is {KINDS}") from error


def _files(path: Path, endings: Sequence[str]) -> list[Path]:
    """The file, or those of a folder that have one of the endings, in order."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; --data is {KINDS}")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
    if not found:
        raise ValueError(f"{path} holds no file that ends in {', '.join(endings)}")
    return found


def _grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _packed(loaded: Loaded, lines: Iterable[str], size: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Pieces of ``length`` tokens; the last batch may be smaller, and short text one piece."""
    tokenizer, held, pieces = _tokenizer(loaded), [], []
    for line in lines:
        held += tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
        while len(held) >= length:
            pieces.append(held[:length])
            held = held[length:]
            if len(pieces) == size:
                yield {"input_ids": torch.tensor(pieces)}
                pieces = []
    if pieces:
        yield {"input_ids": torch.tensor(pieces)}
    elif len(held) > 1:
        yield {"input_ids": torch.tensor([held])}


def _of_lines(loaded: Loaded, lines: list[str], length: int | None) -> dict[str, torch.Tensor]:
    """A padded batch, each line an input."""
    tokenizer = _tokenizer(loaded)
    if tokenizer.pad_token is None and len(lines) > 1:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"return_tensors": "pt", "padding": len(lines) > 1, "truncation": length is not None}
    sources, _, targets = zip(*(line.rstrip("\n").partition("\t") for line in lines))
    batch = dict(tokenizer(list(sources), max_length=length, **options))
    batch.pop("token_type_ids", None)
    if loaded.inside.config.is_encoder_decoder:
        wanted = [target or source for source, target in zip(sources, targets)]
        labels = tokenizer(text_target=wanted, max_length=length, **options)
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    return batch


def _tokenizer(loaded: Loaded) -> Any:
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.path} has no tokenizer: give --data a .jsonl file with input_ids")
    return loaded.tokenizer


def _of_images(loaded: Loaded, paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    if loaded.image_processor is None:
        raise ValueError(f"{loaded.path} has no image processor: give --data a .jsonl file with pixel_values")
    from PIL import Image, UnidentifiedImageError

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                channels = getattr(loaded.inside.config, "num_channels", 3)
                images.append(image.convert("L" if channels == 1 else "RGB"))
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is no image") from error
    return dict(loaded.image_processor(images, return_tensors="pt"))


def _of_json(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield {key: torch.tensor(value) for key, value in json.loads(line).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object of nested lists of numbers") from error
