"""Models by folder or Hub id, with what prepares their inputs; adapters come with their base."""

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import find_adapter_config_file

import hf_multimax

__all__ = ["Loaded", "check_patched", "load", "new_folder"]


@dataclass
class Loaded:
    """A model in evaluation mode.

    Attributes:
        path: what it was asked for by.
        model: the model, or PEFT's around it.
        tokenizer, image_processor: what prepares its inputs; None where the checkpoint has none.
    """

    path: str
    model: Any
    tokenizer: Any = None
    image_processor: Any = None

    @property
    def inside(self) -> PreTrainedModel:
        """The Transformers model, without an adapter's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def takes_images(self) -> bool:
        return self.inside.main_input_name == "pixel_values"

    @property
    def class_name(self) -> str:
        """The stock class's name."""
        return getattr(type(self.inside), "stock_class", type(self.inside)).__name__


def load(path: str, revision: str | None = None, device: str = "cpu") -> Loaded:
    """Load a stock model, a MultiMax model or an adapter.

    Raises:
        FileNotFoundError: if ``path`` looks like a folder and is none. OSError, ValueError: as Transformers does.
    """
    if _looks_local(path) and not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: no such folder; a model is a folder, or an id on the Hub (user/name)")
    is_adapter = find_adapter_config_file(path, revision=revision) is not None
    model = _load_adapter(path, revision) if is_adapter else _load_model(path, revision)
    model.eval()
    model.to(torch.device(device))
    loaded = Loaded(path, model)
    sources = [path, loaded.inside.config._name_or_path]
    loaded.tokenizer = _first(AutoTokenizer, sources, revision)
    loaded.image_processor = _first(_ImageProcessor, sources, revision) if loaded.takes_images else None
    return loaded


def check_patched(loaded: Loaded) -> None:
    """Raise ValueError, with the way out, for a stock model."""
    if not hf_multimax.is_patched(loaded.inside):
        raise ValueError(
            f"{loaded.path} is a stock {loaded.class_name}, not a MultiMax model: "
            f"`hf-multimax patch {loaded.path} DST` makes one of it"
        )


def new_folder(path: Path, force: bool = True) -> Path:
    """Make a folder, before anything long happens.

    Raises:
        OSError: if it cannot be made or written. FileExistsError: if it holds files and ``force`` is not given.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: the folder cannot be written")
    if not force and any(path.iterdir()):
        raise FileExistsError(f"{path} is there and not empty: choose another folder, or give --force")
    return path


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)


def _load_adapter(path: str, revision: str | None) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{path} is an adapter, which needs PEFT: pip install peft")
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(path, revision=revision).base_model_name_or_path
    if not base:
        raise ValueError(f"{path} does not say which model it is an adapter of (base_model_name_or_path)")
    return PeftModel.from_pretrained(_load_model(base, None), path, revision=revision)


def _load_model(path: str, revision: str | None) -> PreTrainedModel:
    """By the class that the checkpoint names."""
    config = AutoConfig.from_pretrained(path, revision=revision)
    name = (config.architectures or [""])[0]
    return getattr(transformers, name, AutoModel).from_pretrained(path, revision=revision)


class _ImageProcessor:
    """AutoImageProcessor, where it asks for Torchvision the class that does without."""

    @staticmethod
    def from_pretrained(path: str, revision: str | None = None) -> Any:
        try:
            return AutoImageProcessor.from_pretrained(path, revision=revision)
        except ImportError:
            values, _ = BaseImageProcessor.get_image_processor_dict(path, revision=revision)
            name = values.get("image_processor_type", "").removesuffix("Fast")
            return getattr(transformers, f"{name}Pil").from_pretrained(path, revision=revision)


def _first(auto_class: Any, sources: list[str], revision: str | None) -> Any:
    """What prepares inputs, from the first source that has it."""
    for index, source in enumerate(dict.fromkeys(sources)):
        if source:
            with contextlib.suppress(OSError, ValueError, KeyError, ImportError, AttributeError):
                return auto_class.from_pretrained(source, revision=revision if index == 0 else None)
    return None
