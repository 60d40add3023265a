"""Other models that go through the attention interface: patched without a line about them in the package."""

import pytest
import torch
import transformers

from hf_multimax import backend, multimax_parameters, patch_model, unpatch_model

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "BertForMaskedLM": _SMALL,
    "RobertaForSequenceClassification": _SMALL,
    "LlamaForCausalLM": _GROUPED,
    "MistralForCausalLM": {**_GROUPED, "sliding_window": 4},
    "Qwen2ForCausalLM": _GROUPED,
    "Qwen3ForCausalLM": _GROUPED,
    "Gemma2ForCausalLM": {**_GROUPED, **_WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
    "Gemma3ForCausalLM": {**_GROUPED, **_WINDOW, "query_pre_attn_scalar": 8},
    "GptOssForCausalLM": {**_GROUPED, **_WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "PhiForCausalLM": _SMALL,
    "OPTForCausalLM": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "ModernBertForMaskedLM": {**_SMALL, "global_attn_every_n_layers": 2, "local_attention": 8},
    "BartForConditionalGeneration": {
        "vocab_size": 61,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
    "CLIPTextModel": _SMALL,
    "MixtralForCausalLM": {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def make(name):
    cls = getattr(transformers, name)
    settings = {k: v for k, v in MODELS[name].items() if k not in ("bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    model = cls._from_config(cls.config_class(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_identity_round_trip_and_causality(name, tmp_path):
    model = make(name)
    ids = torch.randint(3, 61, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    keep = mask.bool()
    with torch.no_grad(), backend("eager"):
        stock = model(ids, attention_mask=mask)[0]
        patched = patch_model(model)(ids, attention_mask=mask)[0]
        if stock.ndim == 3 and stock.shape[1] == 13:
            stock, patched = stock[keep], patched[keep]
        torch.testing.assert_close(patched, stock, rtol=1e-5, atol=1e-5)
        for parameter in multimax_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter))
        changed = model(ids, attention_mask=mask)[0]
        assert not torch.equal(changed if changed.ndim == 2 else changed[keep], patched)
        if name.endswith("CausalLM"):
            other = ids.clone()
            other[:, 6:] = (other[:, 6:] + 11) % 50 + 3
            torch.testing.assert_close(model(ids).logits[:, :6], model(other).logits[:, :6], rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        reloaded = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(reloaded(ids, attention_mask=mask)[0], changed)
        assert type(unpatch_model(model)) is getattr(transformers, name)
