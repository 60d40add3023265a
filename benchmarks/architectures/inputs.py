"""Small random inputs for any model of Transformers: for every tower that it has, found by what its forward takes."""

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from benchmarks.architectures.special_inputs import INPUTS

__all__ = ["InputMaker", "make_inputs", "parts", "special_tokens"]

BATCH, LENGTH, DECODER_LENGTH = 2, 16, 7
FRAMES, FRAMES_OF_SOUND = 4, 96
#: Patches of an image, for models whose images come as a list of patches: frames, rows, columns.
GRID = (1, 4, 4)
VISION = (
    "vision_config",
    "vision_encoder",
    "image_config",
    "vision",
    "vision_encoder_config",
    "backbone_config",
    "encoder",
)
AUDIO = (
    "audio_config",
    "audio_encoder",
    "speech_encoder",
    "encoder_config",
    "audio_encoder_config",
    "encoder",
    "codec_config",
)
#: Keywords of forward that are made where it takes them, beside those that it requires.
WANTED = frozenset(
    {"input_ids", "attention_mask", "decoder_input_ids", "bbox"}
    | {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "grid_thw", "spatial_shapes"}
    | {"input_features", "input_features_mask", "feature_attention_mask", "input_values", "image_position_ids"}
    | {"video_position_ids", "num_frames_per_video", "pixel_position_ids"}
    | {"image_merge_sizes", "video_merge_sizes"}
)
KINDS = ("image", "video", "audio")
#: Keywords of models that take the patches of each image in a row of their own.
_IN_ROWS = {"spatial_shapes", "image_position_ids", "pixel_position_ids"}
_NOT_MEDIA = {"attention_mask", "input_ids"}


def make_inputs(model: PreTrainedModel, seed: int = 1) -> dict[str, Any]:
    """A batch of two for ``model``, as keywords of its forward, without labels: the first layout that it takes.

    Raises:
        Exception: what the model raises at the usual layout, if it takes none.
    """
    first, tried = None, set()
    for layout in itertools.product(range(3), range(2), range(2)):
        maker = InputMaker(model, seed, *layout)
        try:
            batch = maker.batch()
            if maker.layout() in tried:
                continue
            tried.add(maker.layout())
            with torch.no_grad():
                model(**batch)
            return batch
        except Exception as error:
            first = first or error
            tried.add(maker.layout())
    raise first


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The sub-configs of ``config``, all the way down."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from parts(value)


def special_tokens(config: PreTrainedConfig, of: str = "") -> list[int]:
    """Every token that a config or a part of it names, in a field whose name matches the pattern ``of``."""
    fields = [(name, value) for c in (config, *parts(config)) for name, value in vars(c).items()]
    named = {value for name, value in fields if "token" in name and re.search(of, name) and type(value) is int}
    return sorted(value for value in named if value >= 0)


class InputMaker:
    """What one model takes. Methods are named after the keywords of its forward that they make.

    Args:
        images: 0 for one image, ``[batch, channels, height, width]``; 1 for a list of one; 2 for the frames of a video.
        sounds: 0 for ``[batch, mel, time]``; 1 for ``[batch, time, mel]``.
        waves: 0 for ``[batch, time]``; 1 for ``[batch, 1, time]``.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 1, images: int = 0, sounds: int = 0, waves: int = 0) -> None:
        self.model, self.config = model, model.config
        self.images, self.sounds, self.waves = images, sounds, waves
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = inspect.signature(model.forward).parameters
        self.vision, self.audio = self._part(VISION), self._part(AUDIO)
        self.varied: set[str] = set()
        self.made: dict[str, Any] = {}

    def batch(self) -> dict[str, Any]:
        """Every keyword that the model needs or can use."""
        for name, parameter in self.parameters.items():
            required = parameter.default is parameter.empty and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
            if (required or name == self.model.main_input_name or name in WANTED) and hasattr(type(self), name):
                self.made[name] = getattr(self, name)()
        if "input_ids" not in self.made:
            self.made.pop("attention_mask", None)
        if self.config.model_type in INPUTS:
            self.made.update(INPUTS[self.config.model_type](self))
        self.made = {name: value for name, value in self.made.items() if value is not None}
        if "input_ids" in self.made:
            self._place_media()
        return self.made

    def layout(self) -> tuple[int, ...]:
        """What distinguishes this maker's batch from those of other layouts."""
        return tuple(getattr(self, name) if name in self.varied else 0 for name in ("images", "sounds", "waves"))

    # -- tensors and fields

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, *shape: int, low: int = 0, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def find(self, *names: str, within: PreTrainedConfig | None = None, default: Any = None) -> Any:
        """The first field of one of these names in a config or in one of its parts that has a value."""
        within = self.config if within is None else within
        for name in names:
            for config in (within, *parts(within)):
                if vars(config).get(name) is not None:
                    return vars(config)[name]
        return default

    def _part(self, names: tuple[str, ...]) -> PreTrainedConfig:
        for name in names:
            for config in (self.config, *parts(self.config)):
                if isinstance(vars(config).get(name), PreTrainedConfig):
                    return vars(config)[name]
        return self.config

    # -- text

    def input_ids(self) -> Tensor | None:
        return self.tokens(LENGTH)

    def tokens(self, *shape: int, high: int = 100) -> Tensor:
        """Ordinary tokens, ``[batch, *shape]``: none that means something to the model."""
        special = special_tokens(self.config)
        try:
            high = min(high, self.model.get_input_embeddings().num_embeddings)
        except (AttributeError, NotImplementedError):
            high = min(high, self.find("vocab_size", default=high))
        ordinary = torch.tensor([token for token in range(5, high) if token not in special])
        return ordinary[self.integers(BATCH, *shape, high=len(ordinary))]

    def attention_mask(self) -> Tensor:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[1, -3:] = 0
        return mask

    def decoder_input_ids(self) -> Tensor | None:
        return self.tokens(DECODER_LENGTH)

    def bbox(self) -> Tensor:
        corners = self.integers(BATCH, LENGTH, 4, high=50)
        return torch.cat([corners[..., :2], corners[..., :2] + 1 + corners[..., 2:]], dim=-1)

    # -- images

    def channels(self) -> int:
        return self.find("num_channels", "in_channels", "in_chans", "num_input_channels", within=self.vision, default=3)

    def image_shape(self) -> tuple[int, int]:
        size = self.find("image_size", "resolution", within=self.vision, default=64)
        return (size, size) if isinstance(size, int) else tuple(size)

    def image(self) -> Tensor:
        """``[batch, channels, height, width]``."""
        return self.normal(BATCH, self.channels(), *self.image_shape())

    def patches(self, count: int = BATCH * GRID[0] * GRID[1] * GRID[2]) -> Tensor:
        """Flat patches, of as many frames as the model folds into one."""
        patch = self.find("patch_size", "spatial_patch_size", within=self.vision, default=8)
        frames = self.find("temporal_patch_size", within=self.vision, default=1)
        return self.normal(count, self.channels() * frames * patch * patch)

    def pixel_values(self) -> Tensor:
        if "image_grid_thw" in self.parameters or "grid_thw" in self.parameters:
            return self.patches()
        if _IN_ROWS & self.parameters.keys():
            return self.patches().unflatten(0, (BATCH, -1))
        self.varied.add("images")
        if self.images == 0:
            return self.image()
        tiles = 2 if self.find("image_grid_pinpoints") else 1  # the image as a whole, and as one piece
        frames = tiles if self.images == 1 else self.find("num_frames", "frames_per_clip", default=FRAMES)
        return self.normal(BATCH, frames, self.channels(), *self.image_shape())

    def pixel_values_videos(self) -> Tensor:
        if "video_grid_thw" in self.parameters:
            return self.patches()
        if "video_position_ids" in self.parameters:
            return self.patches().unflatten(0, (BATCH, -1))
        frames = self.find("num_frames", "frames_per_clip", within=self.vision, default=FRAMES)
        return self.normal(BATCH, frames, self.channels(), *self.image_shape())

    def grid_thw(self) -> Tensor:
        return torch.tensor([GRID] * BATCH)

    image_grid_thw = video_grid_thw = grid_thw

    def hidden_states(self) -> Tensor:
        return self.patches()

    def pixel_position_ids(self) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(GRID[1]), torch.arange(GRID[2]), indexing="ij")
        return torch.stack([columns.flatten(), rows.flatten()], dim=-1).expand(BATCH, -1, -1)

    image_position_ids = video_position_ids = pixel_position_ids

    def num_frames_per_video(self) -> Tensor:
        return torch.ones(BATCH, dtype=torch.long)

    def spatial_shapes(self) -> Tensor:
        return torch.tensor([GRID[1:]] * BATCH)

    def pixel_attention_mask(self) -> Tensor:
        if "spatial_shapes" in self.parameters:
            return torch.ones(BATCH, GRID[1] * GRID[2], dtype=torch.long)
        return torch.ones(BATCH, 1, *self.image_shape(), dtype=torch.long)

    def image_merge_sizes(self) -> Tensor:
        return torch.ones(BATCH, dtype=torch.long)

    video_merge_sizes = merge_sizes = image_merge_sizes

    def image_sizes(self) -> Tensor:
        return torch.tensor([self.image_shape()] * BATCH)

    # -- sound

    def input_values(self) -> Tensor:
        self.varied.add("waves")
        return self.normal(BATCH, 1600) if self.waves == 0 else self.normal(BATCH, 1, 1600)

    def sound_shape(self) -> tuple[int, int]:
        """Numbers of mel bins and of frames."""
        fields = (
            "num_mel_bins",
            "n_mel_bins",
            "feature_projection_input_dim",
            "input_feat_per_channel",
            "input_feat_size",
            "input_dim",
            "feature_size",
        )
        return self.find(*fields, within=self.audio, default=80), FRAMES_OF_SOUND

    def input_features(self) -> Tensor:
        self.varied.add("sounds")
        mels, frames = self.sound_shape()
        return self.normal(BATCH, mels, frames) if self.sounds == 0 else self.normal(BATCH, frames, mels)

    def input_features_mask(self) -> Tensor:
        return torch.ones(BATCH, self.sound_shape()[1], dtype=torch.long)

    feature_attention_mask = input_features_mask

    def padding_mask(self) -> Tensor:
        return torch.ones(BATCH, 1600, dtype=torch.long)

    # -- the text of several modalities

    def _place_media(self) -> None:
        """Give every image, video and sound its placeholders in the text: as many as it has features."""
        ids = self.made["input_ids"]
        pieces, kinds = [ids], [torch.zeros(ids.shape)]
        for kind, mark in enumerate(KINDS, 1):
            token = self.find(f"{mark}_token_id", f"{mark}_token_index", f"{mark}_patch_id")
            get = self._tower(mark)
            if token is None or get is None or (ids == token).any():
                continue
            names = inspect.signature(get).parameters
            given = {name: value for name, value in self.made.items() if name in names and name not in _NOT_MEDIA}
            for name, parameter in names.items():
                if parameter.default is parameter.empty and name not in given and hasattr(type(self), name):
                    given[name] = self.made[name] = getattr(self, name)()
            count = _vectors(get, given) // len(ids)
            pieces.insert(-1, torch.full((len(ids), count), token))
            kinds.insert(-1, torch.full((len(ids), count), kind))
        if len(pieces) == 1:
            return
        self.made["input_ids"] = torch.cat(pieces, dim=1)
        if "attention_mask" in self.made:
            before = torch.ones(len(ids), self.made["input_ids"].shape[1] - ids.shape[1], dtype=torch.long)
            self.made["attention_mask"] = torch.cat([before, self.made["attention_mask"]], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
            if name in self.parameters:
                self.made[name] = torch.cat(kinds, dim=1).long()

    def _tower(self, mark: str) -> Any:
        """The method of the model that turns what is made of one medium into vectors of the text's width."""
        found = (getattr(module, f"get_{mark}_features", None) for module in self.model.modules())
        known = {
            get: len((inspect.signature(get).parameters.keys() - _NOT_MEDIA) & self.made.keys()) for get in found if get
        }
        best = max(known, key=known.get, default=None)  # an outer method may take whatever an inner one takes
        return best if best is not None and known[best] else None


def _vectors(get: Any, given: dict[str, Any]) -> int:
    """How many vectors a tower makes of what is ``given``."""
    with torch.no_grad():
        found = get(**given)
    if isinstance(found, ModelOutput):
        found = found.get("pooler_output", found[0])
    return sum(tensor.shape[:-1].numel() for tensor in _flat(found))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
