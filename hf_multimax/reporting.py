"""The figures of a training: drawn into its folder, and handed to the trackers that take images."""

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw_training", "show_in_trackers"]

logger = logging.getLogger(__name__)


def draw_training(
    folder: Path, history: Iterable[Mapping[str, Any]], layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Path]:
    """Draw the curves of the scalars and, of the trained model, the modulators over the scores and the measures.

    Args:
        folder: where to write ``curves.png``, ``modulators.png`` and ``measures.png``; it is made.
        history: ``trainer.state.log_history``.
        layers: what :meth:`hf_multimax.diagnostics.LayerMeasures.to_dict` gives, by layer; empty without measures.

    Returns:
        The files by their names without ending. A figure that has nothing to show is left out; none without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("no figures of the training: they need matplotlib (pip install 'hf-multimax[plots]')")
        return {}
    from hf_multimax import plots

    wanted = {
        "curves": lambda path: plots.plot_training(history, path),
        "modulators": lambda path: plots.plot_modulators_on_scores(layers, path),
        "measures": lambda path: plots.plot_measures({"trained": layers}, path),
    }
    files = {}
    for name, draw in wanted.items():
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw(path)
        except (ValueError, OSError) as error:  # a figure must not end a training
            logger.info("no figure %s of the training: %s", name, error)
        else:
            files[name] = path
    return files


def show_in_trackers(callbacks: Iterable[Any], files: Mapping[str, Path], step: int) -> None:
    """Hand images to TensorBoard, Weights & Biases and trackio, as far as the Trainer reports to them.

    Args:
        callbacks: the Trainer's; others are passed over.
        files: images by name.
        step: the training step that they show.
    """
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None and hasattr(writer, "add_image"):
            for name, path in files.items():
                writer.add_image(f"multimax/{name}", _pixels(path), step, dataformats="HWC")
        for tracker in (getattr(callback, "_wandb", None), getattr(callback, "_trackio", None)):
            if tracker is not None and files and getattr(callback, "_initialized", False):
                images = {f"multimax/{name}": tracker.Image(str(path)) for name, path in files.items()}
                tracker.log({**images, "train/global_step": step})


def _pixels(path: Path) -> Any:
    """``[height, width, 3]``, uint8."""
    import matplotlib.image

    return (matplotlib.image.imread(path)[..., :3] * 255).astype("uint8")
