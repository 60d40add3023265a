"""timm's vision transformer without a class token, as SigLIP's classifier."""

import math

import torch
import transformers
from transformers import PreTrainedModel

from hf_multimax.convert.layouts import (
    OUTPUT,
    Names,
    Weights,
    check_activation,
    check_counts,
    convert,
    depth_of,
    refuse,
    restore,
    shape_of,
    take,
)

_VIT_REFUSED = {
    r"^fc_norm\.": "the norm comes after the pooling there; SigLIP's classifier pools what is normalised already",
    r"^(cls_token|dist_token|reg_token)$": "SigLIP's classifier has patch tokens only",
    r"^attn_pool\.": "attention pooling is no mean over the patches",
    r"^norm_pre\.": "SigLIP has no norm before its layers",
    r"^blocks\.\d+\.(ls1|ls2)\.": "SigLIP has no layer scale",
    r"^blocks\.\d+\.attn\.(q_norm|k_norm)\.": "SigLIP does not normalise queries and keys",
    r"^patch_embed\.backbone\.": "SigLIP has no convolutional network before its patches",
}


def _vit_names(depth: int) -> Names:
    names = Names(
        {
            "patch_embed.proj": "vision_model.embeddings.patch_embedding",
            "norm": "vision_model.post_layernorm",
            "head": "classifier",
        },
        modulators={"": OUTPUT},
    )
    parts = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(depth):
        layer = f"vision_model.encoder.layers.{i}"
        names.modules |= {f"blocks.{i}.{theirs}": f"{layer}.{ours}" for theirs, ours in parts.items()}
        names.modulators[f"blocks.{i}.attn"] = f"{layer}.self_attn.multimax"
    return names


def _projections(layer: int, part: str) -> list[str]:
    return [f"vision_model.encoder.layers.{layer}.self_attn.{name}_proj.{part}" for name in "qkv"]


_VIT_POSITIONS = "vision_model.embeddings.position_embedding.weight"


def read_vit(
    weights: Weights, *, num_heads: int, layer_norm_eps: float = 1e-6, activation: str = "gelu"
) -> PreTrainedModel:
    check_counts(num_heads=num_heads)
    check_activation(activation)
    refuse(weights, _VIT_REFUSED)
    depth = depth_of(weights, "blocks")
    width, channels, patch, patch_width = shape_of(weights, "patch_embed.proj.weight", 4)
    _, patches, _ = shape_of(weights, "pos_embed", 3)
    side = math.isqrt(patches)
    if patch != patch_width or side * side != patches:
        raise ValueError(
            f"SigLIP needs square images and patches: 'patch_embed.proj.weight' has patches of {patch} x {patch_width}"
            f", 'pos_embed' {patches} of them"
        )
    config = transformers.SiglipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": shape_of(weights, "blocks.0.mlp.fc1.weight", 2)[0],
            "num_hidden_layers": depth,
            "num_attention_heads": num_heads,
            "num_channels": channels,
            "image_size": side * patch,
            "patch_size": patch,
            "hidden_act": activation,
            "layer_norm_eps": layer_norm_eps,
            "vision_use_head": False,
        },
        num_labels=shape_of(weights, "head.weight", 2)[0],
    )
    made = {_VIT_POSITIONS: take(weights, "pos_embed")[0]}
    for i in range(depth):
        weight = take(weights, f"blocks.{i}.attn.qkv.weight")
        bias = weights.pop(f"blocks.{i}.attn.qkv.bias", weight.new_zeros(3 * width))
        for part, tensor, shape in (("weight", weight, [3 * width, width]), ("bias", bias, [3 * width])):
            if list(tensor.shape) != shape:
                raise ValueError(f"'blocks.{i}.attn.qkv.{part}' has the shape {list(tensor.shape)} instead of {shape}")
        made |= zip(_projections(i, "weight"), weight.chunk(3), strict=True)
        made |= zip(_projections(i, "bias"), bias.chunk(3), strict=True)
    return convert(weights, transformers.SiglipForImageClassification, config, _vit_names(depth), made)


def write_vit(model: PreTrainedModel, ours: Weights) -> Weights:
    depth = model.config.vision_config.num_hidden_layers
    made = {"pos_embed": ours.pop(_VIT_POSITIONS)[None]}
    biases = {}
    for i in range(depth):
        made[f"blocks.{i}.attn.qkv.weight"] = torch.cat([ours.pop(key) for key in _projections(i, "weight")])
        biases[f"blocks.{i}.attn.qkv.bias"] = torch.cat([ours.pop(key) for key in _projections(i, "bias")])
    if any(bias.any() for bias in biases.values()):
        made |= biases
    return restore(ours, _vit_names(depth), made)
