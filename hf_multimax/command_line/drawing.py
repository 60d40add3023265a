"""``plot``: what a model learned and does, in figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_multimax import plots
from hf_multimax.command_line import screen
from hf_multimax.command_line.data import image_batch, text_batch
from hf_multimax.command_line.loading import Loaded, new_folder
from hf_multimax.command_line.looking import load_telling, measured_on, plain
from hf_multimax.command_line.options import DataOptions, Device, MapOptions, ModelPath, Revision
from hf_multimax.diagnostics import attention_maps

__all__ = ["plot"]


def plot(
    path: ModelPath,
    out: Annotated[Path, typer.Option(help="The folder for the figures.")],
    data: DataOptions,
    maps: MapOptions,
    format: Annotated[str, typer.Option(help="png or svg, or anything that matplotlib writes.")] = "png",
    device: Device = "cpu",
    revision: Revision = None,
) -> None:
    """Draw the modulators over the scores, the measures of all layers, and attention maps."""
    new_folder(out)
    loaded = load_telling(path, revision, device)
    models = {path: loaded}
    if maps.beside is not None:
        models[maps.beside] = load_telling(maps.beside, None, device)
    (layers,) = measured_on([loaded], data)
    values_of = plain(layers)
    if any(values.get("ranges") for values in values_of.values()):
        _tell(plots.plot_modulators_on_scores(values_of), out / f"modulators.{format}")
    _tell(plots.plot_measures({path: values_of}), out / f"measures.{format}")
    if maps.text is not None:
        _tell(_text_maps(models, maps.text, maps.layer), out / f"maps.{format}")
    if maps.image is not None:
        _tell(_image_maps(models, maps.image, maps.layer), out / f"image.{format}")


def _text_maps(models: Mapping[str, Loaded], text: str, layer: str | None) -> Any:
    maps, labels = {}, []
    for name, loaded in models.items():
        batch = text_batch(loaded, text)
        maps[name] = _map(loaded, batch, layer)
        labels = [loaded.tokenizer.decode([token]) for token in batch["input_ids"][0].tolist()]
    return plots.plot_text_maps(maps, labels)


def _image_maps(models: Mapping[str, Loaded], path: Path, layer: str | None) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    maps, pixels = {}, None
    for name, loaded in models.items():
        batch = image_batch(loaded, path)
        maps[name], pixels = _map(loaded, batch, layer), batch["pixel_values"][0]
    return plots.plot_image_maps(maps, pixels)


def _map(loaded: Loaded, batch: Mapping[str, torch.Tensor], layer: str | None) -> torch.Tensor:
    """``[heads, queries, keys]`` of the chosen layer, else of the last self-attention layer."""
    maps = {name: weights[0] for name, weights in attention_maps(loaded.model, batch).items() if weights.ndim == 4}
    if layer is not None and layer not in maps:
        raise ValueError(f"{loaded.path} has no layer {layer!r}: there are {', '.join(maps)}")
    square = [name for name, weights in maps.items() if weights.shape[-1] == weights.shape[-2]]
    if not square:
        raise ValueError(f"{loaded.path} has no layer of self-attention whose map could be drawn")
    return maps[layer or square[-1]]


def _tell(figure: Any, path: Path) -> None:
    plots.save(figure, path)
    screen.say(str(path))
