"""Transformers' common tests of models and configs, for six architectures, stock or patched (``MULTIMAX=1``).

Run by :mod:`tests.upstream.test_transformers` in a process of its own, in which ``tests`` is Transformers' package.
"""

import os
import random
import unittest

import torch
import transformers
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

PATCHED = os.environ.get("MULTIMAX") == "1"
if PATCHED:
    import hf_multimax.modeling

VOCAB = 99
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
_TEXT = {**_SIZE, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 1}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class Tester:
    """Makes a small config and inputs of an architecture, as Transformers' own testers do."""

    is_training = True
    batch_size, seq_length, num_labels = 3, 7, 3
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, parent, config_class, values, kind, base_class):
        self.parent, self.config_class, self.values, self.kind, self.base_class = (
            parent, config_class, values, kind, base_class,
        )  # fmt: skip
        self.key_length = self.encoder_seq_length = self.decoder_seq_length = self.seq_length
        self.image_size = self.num_channels = None
        if kind == "image":
            self.image_size, self.num_channels = 30, 3
            self.encoder_seq_length = self.key_length = self.seq_length = (30 // 15) ** 2 + 1
        self.decoder_key_length = self.decoder_seq_length

    def get_config(self):
        config = self.config_class(**self.values)
        if not PATCHED:
            return config
        return hf_multimax.patch_model(self.base_class(config)).config

    def prepare_config_and_inputs(self):
        return self.prepare_config_and_inputs_for_common()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        if self.kind == "image":
            return config, {"pixel_values": torch.randn(self.batch_size, 3, 30, 30)}
        ids = ids_tensor([self.batch_size, self.seq_length], VOCAB).clamp(5)
        inputs = {"input_ids": ids, "attention_mask": random_attention_mask([self.batch_size, self.seq_length])}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = ids_tensor([self.batch_size, self.seq_length], VOCAB).clamp(5)
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        return config, inputs


def case(name, values, kind, classes, base, **attributes):
    """The test case of an architecture."""
    stock = tuple(getattr(transformers, cls) for cls in classes)
    base_class = getattr(transformers, base)
    config_class = base_class.config_class

    class Case(ModelTesterMixin, unittest.TestCase):
        all_model_classes = stock
        has_attentions = True
        test_resize_embeddings = kind != "image"
        is_encoder_decoder = kind == "seq2seq"

        def setUp(self):
            random.seed(0)
            torch.manual_seed(0)
            self.model_tester = Tester(self, config_class, values, kind, base_class)
            self.config_tester = ConfigTester(
                self, config_class=self.made_by(), has_text_modality=kind != "image", hidden_size=32
            )
            if PATCHED:
                self.all_model_classes = tuple(hf_multimax.modeling.registered_model_class(cls) for cls in stock)

        def made_by(self):
            return type(self.model_tester.get_config()) if PATCHED else config_class

        def test_config(self):
            self.config_tester.run_common_tests()

    for key, value in attributes.items():
        setattr(Case, key, value)
    Case.__name__ = Case.__qualname__ = f"{name}Test"
    return Case


GPT2Test = case(
    "GPT2",
    {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 98,
     "bos_token_id": 97, "eos_token_id": 97},
    "text",
    ("GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
    "GPT2Model",
    test_missing_keys=False,
)  # fmt: skip
BertTest = case(
    "Bert", {**_TEXT, **_DROPOUT}, "text",
    ("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"), "BertModel",
)  # fmt: skip
LlamaTest = case(
    "Llama", {**_TEXT, "num_key_value_heads": 2}, "text",
    ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification"), "LlamaModel",
)  # fmt: skip
ViTTest = case(
    "ViT", {**_SIZE, **_DROPOUT, "image_size": 30, "patch_size": 15, "num_labels": 3}, "image",
    ("ViTModel", "ViTForImageClassification"), "ViTModel",
)  # fmt: skip
T5Test = case(
    "T5",
    {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_decoder_layers": 2,
     "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    "seq2seq", ("T5Model", "T5ForConditionalGeneration"), "T5Model",
)  # fmt: skip
MarianTest = case(
    "Marian",
    {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
     "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64,
     "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "forced_eos_token_id": None},
    "seq2seq", ("MarianModel", "MarianMTModel"), "MarianModel", test_missing_keys=False,
)  # fmt: skip
