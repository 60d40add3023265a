"""What the rules for tiny configs cannot know: overrides by model type, of a model or of a part of one."""

from transformers import CONFIG_MAPPING

_BACKBONE = CONFIG_MAPPING["resnet"](
    embedding_size=16,
    hidden_sizes=[16, 16, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)
_DETR = {"backbone_config": _BACKBONE, "backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
_SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
_MINICPM = {"insert_layer_id": 0, "image_token_id": 120}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VQGAN = {
    "embed_dim": 16,
    "latent_channels": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
}
_CODEC = {
    "hidden_size": 64,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_dim": 16,
    "upsample_groups": 64,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 4,
    "codebook_size": 32,
}
_HGNET = {
    "embedding_size": 16,
    "depths": [1] * 4,
    "hidden_sizes": [64] * 4,
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 64, 64, 64],
    "stage_mid_channels": [8] * 4,
    "stage_out_channels": [64] * 4,
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [1] * 4,
}
_EFFICIENT = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
_SERIES = {"prediction_length": 4, "context_length": 14, "num_time_features": 2}
_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    "vertical_long_to_small_conv_longratio": [[7, 1], [1, 1], [3, 0]],
    "vertical_long_to_small_conv_midratio": [[5, 1], [1, 1], [2, 0]],
    "vertical_long_to_small_conv_shortratio": [[3, 1], [1, 1], [1, 0]],
    "horizontal_small_to_long_conv_longratio": [[1, 7], [1, 1], [0, 3]],
    "horizontal_small_to_long_conv_midratio": [[1, 5], [1, 1], [0, 2]],
    "horizontal_small_to_long_conv_shortratio": [[1, 3], [1, 1], [0, 1]],
    "symmetric_conv_long_longratio": [[7, 7], [1, 1], [3, 3]],
    "symmetric_conv_long_midratio": [[5, 5], [1, 1], [2, 2]],
    "symmetric_conv_long_shortratio": [[3, 3], [1, 1], [1, 1]],
}
_TILES = {"image_grid_pinpoints": [[32, 32]]}
_HIERA = {
    "hidden_size": 16,
    "image_size": [128, 128],
    "blocks_per_stage": [1, 2, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 4, 4, 4],
    "global_attention_blocks": [2, 4],
    "window_positional_embedding_background_size": [2, 2],
}
_STAGES = [f"stage{i}" for i in range(1, 7)]
_VIBE = {"num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_DAC = {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "downsampling_ratios": [2, 4], "n_codebooks": 2}
_SWIN = {"image_size": 64, "window_size": 2}
_SAM2 = {"prompt_encoder_config": {"image_size": 128, "patch_size": 16}, "image_size": 128}

#: Text models whose rotary embedding has sections for time, height and width.
MROPE = frozenset(
    {"cosmos3_edge_text", "ernie4_5_vl_moe_text", "glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text"}
    | {"hunyuan_vl_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_omni_talker", "qwen2_5_vl_text"}
    | {"qwen2_vl_text", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_omni_moe_text", "qwen3_omni_moe_talker_text"}
    | {"qwen3_vl_text", "qwen3_vl_moe_text", "qwen4_exp_text"}
)

#: Keywords of the config class; a dict for a part of it that is a config.
CONFIGS = {
    "align": {"projection_dim": 32},
    "align_vision_model": _EFFICIENT,
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "audio-spectrogram-transformer": {"max_length": 40, "num_mel_bins": 32},
    "autoformer": {**_SERIES, "label_length": 7, "moving_average": 5},
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "blip-2": {"image_token_index": 120},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 159,
            **{f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(i))}Z": 100 + i for i in range(32)},
        }
    },
    "chameleon_vqgan": {**_VQGAN, "resolution": 32},
    "chmv2": {"backbone_config": {"return_class_token": True}},
    "clap_audio_model": {
        "spec_size": 64,
        "num_mel_bins": 16,
        "depths": [2, 2],
        "num_attention_heads": [4, 4],
        "num_hidden_layers": 2,
        "patch_embeds_hidden_size": 32,
    },
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [2, 3, 3]} for kind in ("full_attention", "sliding_attention")
        }
    },
    "conditional_detr": _DETR,
    "cosmos3_edge_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    "csm": {"num_codebooks": 4},
    "csm_depth_decoder_model": {"num_codebooks": 4},
    "cvt": {"depth": (1, 2, 3)},
    "dab-detr": _DETR,
    "dac": _DAC,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64], "output_channels": 64},
    "deepseek_ocr2_text": {
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _DETR,
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [64, 64],
        "scaled_images_feature_dims": [64, 64, 64],
    },
    "detr": _DETR,
    "diffusion_gemma_text": _EXPERTS,
    "donut-swin": _SWIN,
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientloftr": {"out_features": [16, 16, 32, 64], "stage_num_blocks": [1, 1, 1, 1], "num_attention_heads": 8},
    "efficientnet": _EFFICIENT,
    "emu3": {
        "vocabulary_map": {
            "<image>": 159,
            "<|extra_200|>": 158,
            **{f"<|visual token {i:06d}|>": 100 + i for i in range(32)},
        }
    },
    "emu3_vqgan": {
        **_VQGAN,
        "attn_resolutions": [1],
        "temporal_downsample_factor": 1,
        "codebook_size": 32,
        "hidden_size": 32,
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_head": 16},
    "fastspeech2_conformer_hifigan": {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        **_SHARED,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_audio": {"subsampling_conv_channels": [80, 32]},
    "gemma4_text": {**_SHARED, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {**_SHARED, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0],
        **_TILES,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hgnet_v2": _HGNET,
    "informer": _SERIES,
    "inkling_vision": {"patch_size": 40},
    "instructblip": {"image_token_index": 120},
    "instructblipvideo": {"video_token_index": 120},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "janus_vqgan": {
        "base_channels": 32,
        "latent_channels": 16,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "num_patches": 16,
    },
    "layoutlmv3": {"input_size": 32, "coordinate_size": 10, "shape_size": 12},
    "led": {"attention_window": [4, 4]},
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [64, 64, 64],
        "num_attention_heads": [4, 4, 4],
        "depths": [1, 1, 1],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "llama4_vision_model": {
        "intermediate_size": 256,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "lw_detr": {"projector_scale_factors": [1.0], "group_detr": 2},
    "lw_detr_vit": {"image_size": 64, "num_windows": 4, "window_block_indices": [0]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8, "state_size": 16},
    "mimi": _CODEC,
    "mimi_decoder": _CODEC,
    "minicpm_ocr": _MINICPM,
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "mllama_vision_model": {"intermediate_layers_indices": [0], "vision_output_dim": 128},
    "mobilevit": {"image_size": 128, "initializer_range": 0.3},
    "mobilevitv2": {"image_size": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "molmo2_vision": {"image_size": [32, 32], "num_position_embeddings": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moshi": {"num_codebooks": 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "muse_spark_audio": {"patch_sizes": [4, 2], "hidden_sizes": [32, 64], "depths": [1, 1], "out_hidden_size": 64},
    "nemotron_h_omni": {"audio_config": None, "image_token_id": 120, "vision_config": {"video_temporal_patch_size": 2}},
    "neucodec": {"quantization_dim": 128, "encoder_hidden_size": 8, "downsampling_ratios": [2, 2]},
    "pocket_tts_audio_tokenizer": {"num_filters": 4, "upsampling_ratios": [4, 2], "upsample_groups": 64},
    "pocket_tts_audio_tokenizer_decoder": {"num_filters": 4, "upsampling_ratios": [4, 2], "upsample_groups": 64},
    "pp_ocrv5_server_det": {
        "intraclass_block_config": _INTRACLASS,
        "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
    },
    "pvt_v2": {"image_size": 128},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 121, "vision_end_token_id": 122},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 121, "vision_end_token_id": 122},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "head_dim": 32,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 8,
    },
    "reformer": {
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (32, 32),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "sam2": _SAM2,
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam_hq": {"mask_decoder_config": {"vit_dim": 64}},
    "sam_hq_vision_model": {"output_channels": 64, "num_pos_feats": 32},
    "sam_vision_model": {"output_channels": 64, "num_pos_feats": 32},
    "seggpt": {
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1],
        "image_size": (64, 32),
        "pretrain_image_size": 32,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p5": {"sliding_window": 8},
    "superglue": {"keypoint_encoder_sizes": [16, 64], "gnn_layers_types": ["self", "cross"], "sinkhorn_iterations": 3},
    "superpoint": {"encoder_hidden_sizes": [16, 16, 16, 16], "descriptor_decoder_dim": 64, "max_keypoints": 16},
    "swin": _SWIN,
    "swin2sr": {"depths": [1, 1], "num_heads": [4, 4]},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "table-transformer": _DETR,
    "time_series_transformer": _SERIES,
    "tvp": {"max_img_size": 128, "visual_prompt_size": 8},
    "uvdoc": {"backbone_config": {"out_features": _STAGES}},
    "vibevoice_acoustic_tokenizer": _VIBE,
    "vibevoice_acoustic_tokenizer_decoder": _VIBE,
    "vibevoice_acoustic_tokenizer_encoder": _VIBE,
    "vipllava": {"vision_feature_layers": [-2, -1], "vision_feature_layer": [-2, -1]},
    "vitmatte": {
        "backbone_config": {"num_channels": 4, "image_size": 64, "patch_size": 16},
        "convstream_hidden_sizes": [16, 16, 16],
        "fusion_hidden_sizes": [32, 32, 32, 32],
    },
    "vits": {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]},
    "voxtral": {"audio_token_id": 120},
    "xcodec": {
        "acoustic_model_config": {
            "encoder_hidden_size": 64,
            "decoder_hidden_size": 64,
            "downsampling_ratios": [8, 5, 4, 2],
        }
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zoedepth": {"bottleneck_features": 64},
}
