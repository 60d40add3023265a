"""Inputs that the rules do not make, by model type: functions of the maker that return keywords of forward."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.architectures.inputs import InputMaker

__all__ = ["INPUTS"]

Inputs = dict[str, Any]


def _one_image(m: "InputMaker") -> Inputs:
    """One text with one image, whose patches lie in a row."""
    ids = {"input_ids": m.tokens(16)[:1], "attention_mask": None} if "input_ids" in m.made else {}
    return {**ids, "pixel_values": m.image()[:1], "target_sizes": torch.tensor([[4, 4]]), "pixel_values_videos": None}


def _kosmos2_5(m: "InputMaker") -> Inputs:
    return {**_positioned_patches(m), **_kosmos2(m)}


def _series(m: "InputMaker") -> Inputs:
    past = m.config.context_length + max(m.config.lags_sequence)
    return {
        "past_values": m.normal(2, past),
        "past_time_features": m.normal(2, past, 2),
        "past_observed_mask": torch.ones(2, past),
        "future_values": m.normal(2, 4),
        "future_time_features": m.normal(2, 4, 2),
    }


def _csm(m: "InputMaker") -> Inputs:
    waves = m.normal(2, 1, 160)
    frames = m.model.codec_model.encode(waves).audio_codes.shape[-1]
    ids = torch.cat([torch.full((2, frames), m.config.audio_token_id), m.tokens(10)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": None,
        "input_values": waves,
        "input_values_cutoffs": torch.full((2, 1), 160),
    }


def _codebooks(m: "InputMaker") -> Inputs:
    return {"decoder_input_ids": m.integers(2 * m.find("num_codebooks"), 7, high=30)}


def _pair(m: "InputMaker") -> Inputs:
    return {"pixel_values": m.normal(2, 2, m.channels(), 64, 64)}


def _decision(m: "InputMaker") -> Inputs:
    return {
        "states": m.normal(2, 5, m.config.state_dim),
        "actions": m.normal(2, 5, m.config.act_dim),
        "rewards": m.normal(2, 5, 1),
        "returns_to_go": m.normal(2, 5, 1),
        "timesteps": m.integers(2, 5, high=10),
    }


def _mllama(m: "InputMaker") -> Inputs:
    return {
        "pixel_values": m.normal(2, 1, 4, 3, *m.image_shape()),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 16, 1, 4, dtype=torch.long),
    }


def _kosmos2(m: "InputMaker") -> Inputs:
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 1:9] = True
    return {"image_embeds_position_mask": mask}


def _jev(m: "InputMaker") -> Inputs:
    pair = torch.tensor([[2, 2]])
    return {
        "input_ids": m.tokens(16)[:1],
        "attention_mask": None,
        "marks": torch.tensor([[5, 9]]),
        "num_options": pair,
        "question_type_ids": pair - 2,
    }


def _superimposed(m: "InputMaker") -> Inputs:
    return {name: m.normal(2, 3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _robot(m: "InputMaker") -> Inputs:
    return {
        "state": m.normal(2, m.config.max_state_dim),
        "noise": m.normal(2, m.config.chunk_size, m.config.max_action_dim),
        "timestep": torch.full((2,), 0.5),
        "pixel_values": m.image()[:, None],
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        **_after(m, 16, m.find("image_token_index")),
    }


def _after(m: "InputMaker", count: int, token: int) -> Inputs:
    """Text after ``count`` placeholders."""
    ids = torch.cat([torch.full((2, count), token), m.tokens(10)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _molmo(m: "InputMaker") -> Inputs:
    return {
        "pixel_values": m.normal(2, 16, 192),
        "image_token_pooling": torch.arange(32).view(8, 4),
        "image_grids": torch.tensor([[1, 2, 1, 2]] * 2),
        "image_num_crops": torch.ones(2, dtype=torch.long),
        "pixel_values_videos": None,
    }


def _positioned_patches(m: "InputMaker") -> Inputs:
    return {"flattened_patches": torch.cat([m.integers(2, 16, 2, low=1, high=9).float(), m.normal(2, 16, 64)], dim=-1)}


def _bool_mask(m: "InputMaker") -> Inputs:
    return {"input_features_mask": m.input_features_mask().bool()}


INPUTS: dict[str, Callable[["InputMaker"], Inputs]] = {
    "audio-spectrogram-transformer": lambda m: {"input_values": m.normal(2, 40, 32)},
    "autoformer": _series,
    "blip_2_qformer": lambda m: {"query_embeds": m.normal(2, 8, 64), "encoder_hidden_states": m.normal(2, 5, 64)},
    "blt": lambda m: {"use_cache": False},
    "clap": lambda m: {"input_features": m.normal(2, 1, 100, 16), "is_longer": torch.zeros(2, 1, dtype=torch.bool)},
    "colqwen2": lambda m: {"pixel_values": m.patches().unflatten(0, (2, -1))},
    "csm": _csm,
    "decision_transformer": _decision,
    "deepseek_vl_hybrid": lambda m: {"high_res_pixel_values": m.normal(2, 3, 32, 32)},
    "depth_pro": lambda m: {"pixel_values": m.normal(2, 3, 128, 128)},
    "dia": lambda m: {"decoder_input_ids": m.integers(2, 7, 9, high=30)},
    "dots3_note": lambda m: {"chunk_sample_lengths": torch.full((2,), 12800)},
    "efficientloftr": _pair,
    "embedding_gemma2": _bool_mask,
    "emu3": lambda m: {"pixel_values": m.normal(2, 3, 32, 32), "image_sizes": torch.full((2, 2), 32)},
    "ernie4_5_vl_moe": lambda m: {
        "pixel_values_videos": m.patches(64),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * 2),
    },
    "fun_asr_nano": lambda m: {
        "input_features": m.normal(2, 20, 560),
        "input_features_mask": torch.ones(2, 20, dtype=torch.long),
    },
    "fun_asr_nano_encoder": lambda m: {
        "input_features": m.normal(2, 20, 560),
        "input_features_mask": torch.ones(2, 20, dtype=torch.long),
    },
    "fuyu": lambda m: {"pixel_values": m.patches().unflatten(0, (2, -1))},
    "gemma3n_audio": lambda m: {
        "audio_mel": m.normal(2, 40, 128),
        "audio_mel_mask": torch.zeros(2, 40, dtype=torch.bool),
    },
    "gemma4": _bool_mask,
    "gemma4_unified": lambda m: {
        "input_features": m.normal(2, 20, 64),
        "input_features_mask": torch.ones(2, 20, dtype=torch.bool),
        "pixel_values": m.normal(2, 16, 1728),
        "pixel_values_videos": m.normal(2, 16, 1728),
    },
    "glm5_next": lambda m: {"pixel_values_videos": None, "video_grid_thw": None},
    "granite4_vision": lambda m: {
        **_after(m, 10, m.config.image_token_id),
        "pixel_values": m.normal(2, 2, 3, *m.image_shape()),
        "image_sizes": m.image_sizes(),
    },
    "granite_docling": lambda m: {
        "pixel_values": m.normal(2, 1, 3, *m.image_shape()),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    },
    "granite_speech": lambda m: {"input_features_mask": None},
    "granite_speech5_ctc": lambda m: {"input_features": m.normal(2, 40, 320)},
    "granite_speech5_encoder": lambda m: {"input_features": m.normal(2, 40, 320)},
    "granite_speech_plus": lambda m: {"input_features_mask": None},
    "idefics": lambda m: {
        "pixel_values": m.normal(2, 1, 3, *m.image_shape()),
        "image_attention_mask": torch.ones(2, 16, 1, dtype=torch.long),
    },
    "informer": _series,
    "inkling2": lambda m: {"pixel_values": m.normal(8, 16, 16, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)},
    "inkling2_vision": lambda m: {
        "pixel_values": m.normal(8, 16, 16, 3),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
    },
    "inkling_mm_model": lambda m: {"pixel_values": m.normal(4, 2, 40, 40, 3)},
    "instructblip": lambda m: {"qformer_input_ids": m.tokens(6)},
    "instructblipvideo": lambda m: {"qformer_input_ids": m.tokens(6)},
    "jev": _jev,
    "kimi_k25": lambda m: {"pixel_values": m.normal(32, 3, 8, 8), "pixel_values_videos": m.normal(32, 3, 8, 8)},
    "kimi_k25_vision": lambda m: {"pixel_values": m.normal(32, 3, 8, 8)},
    "kosmos-2": _kosmos2,
    "kosmos-2.5": _kosmos2_5,
    "kyutai_speech_to_text": lambda m: {"input_ids": m.integers(2, 16, 1 + m.config.num_codebooks, low=5, high=30)},
    "layoutlmv3": lambda m: {"pixel_values": m.normal(2, 3, 32, 32)},
    "lightglue": _pair,
    "lxmert": lambda m: {"visual_feats": m.normal(2, 5, m.config.visual_feat_dim), "visual_pos": m.normal(2, 5, 4)},
    "mimi_decoder": lambda m: {"latents": m.normal(2, 64, 10)},
    "minicpm_ocr": _one_image,
    "minicpm_ocr_vision": _one_image,
    "minicpmv4_6": _one_image,
    "minicpmv4_7": _one_image,
    "minicpmv4_7_vision": _one_image,
    "mllama": _mllama,
    "molmo2": _molmo,
    "moss_transcribe_diarize": lambda m: {"padding_mask": torch.ones(2, 12800, dtype=torch.long)},
    "muse_glimmer": lambda m: {"pixel_values": m.normal(32, 384), "pixel_values_videos": m.normal(32, 384)},
    "muse_glimmer_vision": lambda m: {"pixel_values": m.normal(32, 384)},
    "muse_spark": lambda m: {"pixel_values": m.normal(32, 384), "pixel_values_videos": m.normal(32, 384)},
    "muse_spark_vision": lambda m: {"pixel_values": m.normal(32, 384)},
    "musicflamingo": lambda m: _after(m, 24, m.config.audio_token_id),
    "musicgen": _codebooks,
    "musicgen_melody": lambda m: {**_codebooks(m), "input_features": m.normal(2, 10, m.config.num_chroma)},
    "nemotron_h_omni": lambda m: {
        "pixel_values": m.normal(32, 192),
        "image_grid_hw": torch.tensor([[4, 4]] * 2),
        "pixel_values_videos": None,
        "input_features": None,
        "input_features_mask": None,
    },
    "neomme": lambda m: {"pixel_values": m.normal(8, 192)},
    "oneformer": lambda m: {"task_inputs": m.integers(2, m.config.task_seq_len, high=30)},
    "paddleocr_vl": lambda m: {"pixel_values": m.normal(32, 3, 8, 8)},
    "patchtsmixer": lambda m: {"past_values": m.normal(2, m.config.context_length, m.config.num_input_channels)},
    "patchtst": lambda m: {"past_values": m.normal(2, m.config.context_length, m.config.num_input_channels)},
    "pi0": _robot,
    "pix2struct": _positioned_patches,
    "pocket_tts_audio_tokenizer_decoder": lambda m: {"latents": m.normal(2, 64, 10)},
    "pop2piano": lambda m: {"input_ids": None, "attention_mask": None, "input_features": m.normal(2, 10, 64)},
    "pp_ocrv5_mobile_rec": lambda m: {"pixel_values": m.normal(2, 3, 96, 96)},
    "qwen2_audio": lambda m: _after(m, 24, m.config.audio_token_id),
    "qwen3_asr": lambda m: {
        "input_features": m.normal(2, m.sound_shape()[0], 100),
        "input_features_mask": torch.ones(2, 100, dtype=torch.long),
    },
    "qwen3_asr_encoder": lambda m: {
        "input_features": m.normal(2, m.sound_shape()[0], 100),
        "input_features_mask": torch.ones(2, 100, dtype=torch.long),
    },
    "seggpt": _superimposed,
    "siglip2": lambda m: {"pixel_attention_mask": m.pixel_attention_mask()},
    "speech-encoder-decoder": lambda m: {"input_features": None},
    "superglue": _pair,
    "time_series_transformer": _series,
    "timesfm": lambda m: {
        "past_values": m.normal(2, 64),
        "past_values_padding": torch.zeros(2, 64, dtype=torch.long),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda m: {
        "past_values": m.normal(2, 64),
        "past_values_padding": torch.zeros(2, 64, dtype=torch.long),
    },
    "tvp": lambda m: {
        "input_ids": m.tokens(16)[:1],
        "attention_mask": None,
        "pixel_values": m.normal(1, 4, 3, 128, 128),
    },
    "vibevoice_acoustic_tokenizer_decoder": lambda m: {"hidden_states": m.normal(2, 64, 10)},
    "vibevoice_acoustic_tokenizer_encoder": lambda m: {"hidden_states": m.normal(2, 1, 160)},
    "voxtral_realtime": lambda m: {"input_ids": m.tokens(12), "attention_mask": None},
    "xlstm": lambda m: {"use_cache": False},
}
