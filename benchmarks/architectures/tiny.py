"""A tiny config of any model type: the default one with every size made small, by the names of its fields."""

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from benchmarks.architectures.special_configs import CONFIGS, MROPE

__all__ = ["tiny_config"]

VOCABULARY = 160

#: Fields by name, first match wins: what a larger value becomes. Everything has one width, so that towers fit together.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(task_|modality_)?type_vocab_size|additional_vocab_size|num_labels", 3),
    (r".*vocab(_size)?|encoder_hash_byte_group_vocab|vocab_size_per_layer_input|ngram_vocab_size_base", 160),
    (r".*codebook_size|num_embeddings|num_embeds|num_codevectors_per_group|num_centroids|num_clusters", 32),
    (r"num_kv_shared_layers|first_k_dense_replace|max_window_layers|num_(dense|mtp|nextn_predict)_layers", 1),
    (r"(.*_)?num(_\w+)?_layers|(.*_)?layers|n_layers?|(?!max_|iou_).*depth|num_blocks", 2),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|linear_num_key_heads|num_key_value_attention_heads)", 2),
    (r"(.*_)?(attention_)?heads|.*n_heads?|num_attn_heads", 4),
    (r"(.*_)?head_dim|d_kv|kv_channels|dim_head|d_head|attention_head_size|mamba_d_(head|state)|(ssm_)?state_size", 16),
    (r"rotary_dim|qk_\w+_head_dim|v_head_dim|resampler_dim_head|query_pre_attn_scalar|global_pointer_head_size", 16),
    (r"(.*_)?lora_rank|laurel_rank|gated_norm_rank|adapter_rank|embedding_rank|hc_lowrank", 16),
    (r"mamba_d_ssm|(.*_)?(intermediate_size(_mlp)?|ffn_(hidden_)?(size|dim)|d_?ff|n_inner|(mlp|ff)_dim)", 128),
    (r"(.*_)?(feedforward(_dim)?|linear_units|inner_dim|d_inner|feed_forward_size|intermediate_dim)", 128),
    (r"(.*_)?(hidden_size\w*|hidden_dim|d_model|n_embd|hidden_channels|emb(ed|edding)?_(dim|size))", 64),
    (r"(.*_)?(proj(ection)?_(dim|size)|output_dim|proj_size|width|latent_size|feature_size|out_dim|query_dim)", 64),
    (r"(num_(local_|routed_)?|n_routed_|moe_num_)experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_(topk|k)|top_k|num_selected_experts|topk", 2),
    (r"image_size|resolution|(visual_prompt|pretrain_image|spec|crop)_size", 32),
    (r"patch_size", 8),
    (r"(en|de)coder_in_channels|downsample_channels|stage_out_channels|output_channels|post_conv_in_channels", 64),
    (r"adapter_(in|out)_dim|adapter_input_size|condition_dim|mm_embed_dim|output_proj_dims|x4_feat_dim", 64),
    (r"d_latents|quantization_dim|num_position_embeddings|position_embedding_size|mm_posemb_size", 64),
    (r"max_num_patches", 64),
    (r"upsample_initial_channel|max_text_length", 32),
    (r"canvas_length", 8),
    (r"num_self_attends_per_block|num_res_blocks", 2),
    (r"prediction_length", 4),
    (r"n_group|num_expert_groups?", 2),
    (r"topk_group", 1),
    (r"(.*_)?n?_?shared_experts?", 1),
    (r"max_source_positions", 48),
    (r"(?!relative_).*(max_\w*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length)", 128),
    (r"sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size", 8),
    (r"num_queries|num_query_tokens|num_latents|\w*n(um)?_latents|latent_query_num|num_detection_tokens", 8),
    (r"num_frames|frames_per_clip", 4),
)
_COMPILED = tuple((re.compile(pattern), size) for pattern, size in _SIZES)
_TOKEN = re.compile(r"(.*_)?((token|patch)_(id|index|idx)s?|[a-z]+_index)")
_LAYER_INDICES = re.compile(r".*(_indexes|_indices|_layers_idx|_hook_ids)|extract_layers|encode_proj_layers")

#: Sizes that some classes leave at None without deriving them from others.
_NEEDED = re.compile(r"vocab_size|num_key_value_heads|head_dim|n_routed_experts|prediction_length")

#: Parts that a class may do without: every tower is to be there.
_TOWERS = ("vision_config", "audio_config")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


class Shrinker:
    """Makes configs tiny; one for a tree of configs, so that a special token has one number in all of them."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}

    def config(self, config: PreTrainedConfig, **more: Any) -> PreTrainedConfig:
        """A config of the same class of a model small enough to build in a blink.

        Sizes shrink by the rules of this file, sub-configs likewise; the class derives again what depends on them.
        """
        cls, now = type(config), vars(config)
        values = {}
        for field in dataclasses.fields(cls):
            name, default = field.name, _default(field)
            value = now.get(cls.attribute_map.get(name, name))
            if value is None and name in _TOWERS and hasattr(cls, "sub_configs_defaults"):
                value = cls.sub_configs_defaults[name].default_config if name in cls.sub_configs_defaults else None
            if isinstance(value, PreTrainedConfig):
                values[name] = value  # shrunk below, with what is special about it
            elif value is None and _NEEDED.fullmatch(name):
                values[name] = self.value(name, 10**6)
            elif default is not None:
                same_kind = isinstance(value, list | tuple) == isinstance(default, list | tuple)
                values[name] = self.value(name, value if same_kind else default)
        if now.get("num_key_value_heads") == now.get("num_attention_heads") and "num_key_value_heads" in values:
            values["num_key_value_heads"] = values.get("num_attention_heads")  # only what has groups has groups
        values.update(_layers(now))
        values.update(_features(config, values))
        special = {**CONFIGS.get(cls.model_type, {}), **more}
        for name, value in values.items():
            if isinstance(value, PreTrainedConfig):
                given = special.pop(name, {})
                if given is None:
                    values[name] = None
                    continue
                values[name] = (
                    self.config(given) if isinstance(given, PreTrainedConfig) else self.config(value, **given)
                )
        for name, value in special.items():
            if isinstance(value, PreTrainedConfig):
                special[name] = self.config(value)
        small = cls(**{**values, **special})
        if cls.model_type in MROPE and "rope_parameters" not in special:
            rope = {**small.rope_parameters, "mrope_section": _mrope(small)}
            small = cls(**{**values, **special, "rope_parameters": rope})
        return small

    def value(self, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if _LAYER_INDICES.fullmatch(name):
                return type(value)(range(len(value)))
            if name.endswith("heads"):  # of stages: one number for all
                return type(value)(self.value(name, 10**6) for part in value)
            return type(value)(self.value(name, part) for part in value)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if _TOKEN.fullmatch(name):
            return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens)) if value >= VOCABULARY else value
        size = next((size for pattern, size in _COMPILED if pattern.fullmatch(name)), value)
        return min(size, value)


def _features(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """As many outputs of a backbone as it had, of the last of its stages, and as many stages as that needs."""
    had = getattr(config, "_out_features", None)
    if not had:
        return {}
    depths = values.get("depths", getattr(config, "depths", None))
    name = next((name for name in _DEPTHS if name in values), None)
    if depths is not None or name is None:
        return {"out_features": list(had)}
    values[name] = max(values[name], len(had))
    stages = [f"stage{i}" for i in range(1, values[name] + 1)]
    return {"out_features": stages[-len(had) :]}


def _mrope(config: PreTrainedConfig) -> list[int]:
    """Sections of a rotary embedding for time, height and width that fill it."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(width * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    return [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """Lists that say what each layer is, with every kind of layer, and the number of layers that they then have."""
    depth = next((values[name] for name in _DEPTHS if isinstance(values.get(name), int)), 0)
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == depth and all(isinstance(kind, str) for kind in value)
    }
    kinds = {name: found for name, found in kinds.items() if len(found) > 1}
    if not kinds:
        return {}
    count = max(map(len, kinds.values()))
    found = {name: [kind[i % len(kind)] for i in range(count)] for name, kind in kinds.items()}
    return {**found, next(name for name in _DEPTHS if name in values): count}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of that type of a model small enough to build in a blink."""
    return Shrinker().config(CONFIG_MAPPING[model_type]())


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
