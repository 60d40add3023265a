"""Tiny models of many architectures beside the first-class ones, and inputs for each, by the name of a head class."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 64
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SIZE, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
_TEXT |= {"eos_token_id": 2}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_WINDOW = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_IMAGE = {**_SIZE, "image_size": 16, "patch_size": 4, "num_labels": 3}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """How to make a model: its config class (by default the architecture's), and what to set in it."""

    config: str
    values: dict[str, Any] = field(default_factory=dict)
    image: bool = False
    seq2seq: bool = False


ZOO = {
    # causal language models
    "LlamaForCausalLM": Entry("LlamaConfig", _GROUPED),
    "MistralForCausalLM": Entry("MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "MixtralForCausalLM": Entry("MixtralConfig", {**_GROUPED, "num_local_experts": 2}),
    "Qwen2ForCausalLM": Entry("Qwen2Config", _GROUPED),
    "Qwen3ForCausalLM": Entry("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "Gemma2ForCausalLM": Entry(
        "Gemma2Config", {**_GROUPED, **_WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}
    ),
    "Gemma3ForCausalLM": Entry("Gemma3TextConfig", {**_GROUPED, **_WINDOW, "query_pre_attn_scalar": 8}),
    "PhiForCausalLM": Entry("PhiConfig", _TEXT),
    "Phi3ForCausalLM": Entry("Phi3Config", _GROUPED),
    "GPTNeoXForCausalLM": Entry("GPTNeoXConfig", _TEXT),
    "StableLmForCausalLM": Entry("StableLmConfig", _GROUPED),
    "Olmo2ForCausalLM": Entry("Olmo2Config", _GROUPED),
    "GraniteForCausalLM": Entry("GraniteConfig", _GROUPED),
    "CohereForCausalLM": Entry("CohereConfig", _GROUPED),
    "GptOssForCausalLM": Entry(
        "GptOssConfig", {**_GROUPED, **_WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}
    ),
    "DeepseekV32ForCausalLM": Entry(
        "DeepseekV32Config",
        {
            **_TEXT,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "index_topk": 4,
            "index_n_heads": 2,
            "index_head_dim": 16,
        },
    ),  # selects keys
    "SmolLM3ForCausalLM": Entry("SmolLM3Config", _GROUPED),
    "OPTForCausalLM": Entry("OPTConfig", {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPTBigCodeForCausalLM": Entry(
        "GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
    ),
    # encoders
    "BertForMaskedLM": Entry("BertConfig", _TEXT),
    "BertForSequenceClassification": Entry("BertConfig", {**_TEXT, "num_labels": 3}),
    "RobertaForSequenceClassification": Entry("RobertaConfig", {**_TEXT, "num_labels": 3}),
    "ElectraForPreTraining": Entry("ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "ModernBertForMaskedLM": Entry(
        "ModernBertConfig", {**_TEXT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}
    ),
    "DistilBertForTokenClassification": Entry(
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCAB, "num_labels": 3},
    ),
    "CLIPTextModelWithProjection": Entry("CLIPTextConfig", {**_TEXT, "projection_dim": 8}),
    # encoders of images
    "ViTForImageClassification": Entry("ViTConfig", _IMAGE, image=True),
    "DeiTForImageClassification": Entry("DeiTConfig", _IMAGE, image=True),
    "BeitForImageClassification": Entry("BeitConfig", _IMAGE, image=True),
    "Dinov2ForImageClassification": Entry("Dinov2Config", _IMAGE, image=True),
    "IJepaForImageClassification": Entry("IJepaConfig", _IMAGE, image=True),
    # encoder-decoders
    "BartForConditionalGeneration": Entry("BartConfig", _SEQ2SEQ, seq2seq=True),
    "M2M100ForConditionalGeneration": Entry("M2M100Config", _SEQ2SEQ, seq2seq=True),
    "PegasusForConditionalGeneration": Entry("PegasusConfig", _SEQ2SEQ, seq2seq=True),
    # written for additive masks that are always there
    "NllbMoeForConditionalGeneration": Entry("NllbMoeConfig", {**_SEQ2SEQ, "num_experts": 2}, seq2seq=True),
    "PegasusXForConditionalGeneration": Entry(
        "PegasusXConfig", {**_SEQ2SEQ, "block_size": 4, "num_global_tokens": 2}, seq2seq=True
    ),
    "BigBirdPegasusForConditionalGeneration": Entry(
        "BigBirdPegasusConfig", {**_SEQ2SEQ, "attention_type": "original_full"}, seq2seq=True
    ),
    "SwitchTransformersForConditionalGeneration": Entry(
        "SwitchTransformersConfig", {**_T5, "num_experts": 2}, seq2seq=True
    ),
    "LongT5ForConditionalGeneration": Entry("LongT5Config", {**_T5, "local_radius": 3}, seq2seq=True),
}
_OLD = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
#: Models whose attention does not go through the AttentionInterface.
OUTSIDE = {
    "BloomForCausalLM": Entry("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "GPTJForCausalLM": Entry("GPTJConfig", {**_OLD, "rotary_dim": 4}),
    "CodeGenForCausalLM": Entry("CodeGenConfig", {**_OLD, "rotary_dim": 4}),
    "GPTNeoForCausalLM": Entry(
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        },
    ),
    "FalconForCausalLM": Entry("FalconConfig", {k: v for k, v in _TEXT.items() if "inter" not in k and "max" not in k}),
    "MptForCausalLM": Entry(
        "MptConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    ),
    "DebertaV2ForMaskedLM": Entry("DebertaV2Config", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c"]}),
    "LongformerForMaskedLM": Entry("LongformerConfig", {**_TEXT, "attention_window": 4, "max_position_embeddings": 80}),
    "XLNetForTokenClassification": Entry(
        "XLNetConfig",
        {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 3},
    ),
    "Swinv2ForImageClassification": Entry(
        "Swinv2Config",
        {
            "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
            "window_size": 4, "num_labels": 3,
        },
        image=True,
    ),
    "MvpForConditionalGeneration": Entry("MvpConfig", _SEQ2SEQ, seq2seq=True),
}  # fmt: skip
CAUSAL = tuple(name for name in ZOO if name.endswith("ForCausalLM"))


def _entry(name: str) -> Entry:
    return ZOO.get(name) or OUTSIDE[name]


def zoo_model(name: str, seed: int = 0, attention: str = "eager", **config: Any) -> PreTrainedModel:
    """A random model of that class in evaluation mode."""
    torch.manual_seed(seed)
    entry = _entry(name)
    settings = getattr(transformers, entry.config)(**{**entry.values, **config})
    for key, value in list(vars(settings).items()):
        if "drop" in key and isinstance(value, float):  # nothing random in training
            setattr(settings, key, 0.0)
    model = getattr(transformers, name)._from_config(settings, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def zoo_inputs(name: str, length: int = 9, padded: bool = True) -> dict[str, torch.Tensor]:
    """A batch of two for that class, with labels where it takes any."""
    entry, generator = _entry(name), torch.Generator().manual_seed(1)
    if entry.image:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    ids[:, -1] = 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        batch["attention_mask"][1, length - 3 :] = 0
    if entry.seq2seq:
        batch["labels"] = ids[:, :5].contiguous()
    elif "SequenceClassification" in name:
        batch["labels"] = torch.tensor([0, 2])
    elif "TokenClassification" in name:
        batch["labels"] = ids % 3
    elif "PreTraining" in name:
        batch["labels"] = ids % 2
    elif "Projection" not in name:
        batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
    return batch
