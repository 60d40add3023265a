"""Tiny random models, one per head class of the first-class architectures, and inputs for each."""

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 61
_TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2}
_T5 = {
    **_TEXT,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "num_labels": 3,
    "dropout_rate": 0.0,
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 1,
    "encoder_stride": 4,
    "num_labels": 3,
}
CONFIGS = {
    "GPT2": {
        **_TEXT,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "num_labels": 3,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "T5": _T5,
    "MT5": _T5,
    "Marian": {
        **_TEXT,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
        "dropout": 0.0,
        "is_encoder_decoder": True,
    },
    "ViT": _VIT,
    "DeiT": _VIT,
}
_IMAGE_HEADS = ("Model", "ForImageClassification", "ForMaskedImageModeling")
_T5_HEADS = (
    "Model",
    "ForConditionalGeneration",
    "EncoderModel",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
HEADS = {
    "GPT2": (
        "Model",
        "LMHeadModel",
        "DoubleHeadsModel",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ),
    "T5": _T5_HEADS,
    "MT5": _T5_HEADS,
    "Marian": ("Model", "MTModel", "ForCausalLM"),
    "ViT": _IMAGE_HEADS,
    "DeiT": (*_IMAGE_HEADS, "ForImageClassificationWithTeacher"),
}
ALL = tuple(arch + head for arch, heads in HEADS.items() for head in heads) + ("SiglipForImageClassification",)
#: One class with a loss for each architecture.
TRAINED = (
    "GPT2LMHeadModel",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "SiglipForImageClassification",
    "T5ForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "MarianMTModel",
)
GENERATORS = ("GPT2LMHeadModel", "T5ForConditionalGeneration", "MT5ForConditionalGeneration", "MarianMTModel")


def make(name: str, seed: int = 0, **config) -> PreTrainedModel:
    """A random model of that class, without dropout, in evaluation mode and under eager attention."""
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    arch = next((arch for arch in sorted(CONFIGS, key=len, reverse=True) if name.startswith(arch)), None)
    if arch is None:
        vision = {k: v for k, v in _VIT.items() if k not in ("encoder_stride", "num_labels")}
        settings = transformers.SiglipConfig(vision_config=vision, num_labels=3, **config)
    else:
        if name == "MarianForCausalLM":
            config = {"is_decoder": True, "is_encoder_decoder": False, **config}
        settings = getattr(transformers, f"{arch}Config")(**{**CONFIGS[arch], **config})
    if "QuestionAnswering" in name:
        settings.num_labels = 2
    # at construction: T5's stacks hold copies of the config
    model = cls._from_config(settings, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # so that scores have a standard deviation near 1, and no bias is zero
            if parameter.requires_grad:  # Marian's positions are computed, and never saved
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_for(model: PreTrainedModel, labels: bool = True, padded: bool = True, seed: int = 1) -> dict:
    """A batch of two for any class of this file; ``padded`` masks the end of the second text."""
    generator = torch.Generator().manual_seed(seed)
    stock = getattr(type(model), "stock_class", type(model))
    name, config = stock.__name__, model.config
    if hasattr(config, "image_size") or hasattr(config, "vision_config"):
        batch = {"pixel_values": torch.randn(2, 1, 16, 16, generator=generator)}
        if "MaskedImage" in name:
            batch["bool_masked_pos"] = torch.rand(2, 16, generator=generator) < 0.5
        elif "Classification" in name and "Teacher" not in name and labels:
            batch["labels"] = torch.tensor([0, 2])
        return batch

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, (2, length), generator=generator)

    batch = {"input_ids": tokens(11)}
    if padded:
        batch["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
        batch["attention_mask"][1, 8:] = 0
        batch["input_ids"][1, 8:] = 0
    if "DoubleHeads" in name:
        batch = {key: value[:, None] for key, value in batch.items()}
        batch["mc_token_ids"] = torch.tensor([[10], [7]])
    if name.endswith(("T5Model", "MarianModel")):
        batch["decoder_input_ids"] = tokens(7)
    if not labels:
        if config.is_encoder_decoder and "decoder_input_ids" not in batch and "EncoderModel" not in name:
            if "SequenceClassification" in name or "QuestionAnswering" in name:
                return _with_eos(batch, name, config)
            if "TokenClassification" not in name:
                batch["decoder_input_ids"] = tokens(7)
        return batch
    if "SequenceClassification" in name:
        batch["labels"] = torch.tensor([0, 2])
        batch = _with_eos(batch, name, config)
    elif "TokenClassification" in name:
        batch["labels"] = torch.randint(0, 3, (2, 11), generator=generator)
    elif "QuestionAnswering" in name:
        batch["start_positions"], batch["end_positions"] = torch.tensor([1, 2]), torch.tensor([3, 4])
        batch = _with_eos(batch, name, config)
    elif name.endswith(("LMHeadModel", "ForCausalLM", "DoubleHeadsModel")):
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)
    elif name.endswith(("ForConditionalGeneration", "MTModel")):
        batch["labels"] = tokens(7)
        batch["labels"][1, 5:] = -100
    return batch


def _with_eos(batch: dict, name: str, config) -> dict:
    """T5's sequence head reads the last end-of-sequence token."""
    if config.is_encoder_decoder and "SequenceClassification" in name:
        batch["input_ids"][0, 10] = batch["input_ids"][1, 7] = config.eos_token_id
    return batch
