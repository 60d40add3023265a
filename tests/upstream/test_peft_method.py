"""PEFT's own tests of its methods, for MultiMax adapters: each of its testers gets our config as the one to test.

The checkpoints that they name lie in folders of those names, tiny and random.
"""

import re

import pytest
import torch

from hf_multimax.peft import MultiMaxAdapterConfig
from tests.upstream.sources import copy_tests, outcomes
from tests.upstream.test_peft import tokenizer
from tests.zoo import zoo_model

_VOCABULARY = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2}
CHECKPOINTS = {
    "test_decoder_models.py": {
        "peft-internal-testing/tiny-random-OPTForCausalLM": "OPTForCausalLM",
        "peft-internal-testing/tiny-random-GPTJForCausalLM": "GPTJForCausalLM",
        "trl-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
        "peft-internal-testing/tiny-dummy-qwen2": "Qwen2ForCausalLM",
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "Gemma3ForCausalLM",
    },
    "test_encoder_decoder_models.py": {
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": "BartForConditionalGeneration",
    },
    "test_feature_extraction_models.py": {
        "peft-internal-testing/tiny-random-BertModel": "BertForSequenceClassification",
        "peft-internal-testing/tiny-random-DebertaV2Model": "DebertaV2ForMaskedLM",
    },
    "test_seq_classifier.py": {
        "peft-internal-testing/tiny-random-BertForSequenceClassification": "BertForSequenceClassification",
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification": "RobertaForSequenceClassification",
    },
}
TASKS = dict(zip(CHECKPOINTS, ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS")))
#: What of them does not pass, by the test's name and the checkpoint, and why.
EXCEPTIONS = {
    r"test_add_adapter_no_autocast_adapter_dtype": "scalars stay float32, as PEFT exempts LN tuning",
    r"test_merge_layers_multi": "a layer has one set of scalars: two cannot be merged, as in LN tuning",
    r"test_merge_layers_nan": "refused in words of our own",
    r"mixed_adapter_batches\[.*GPTJ": "refused where attention is outside Transformers' AttentionInterface",
    r"test_merge_layers(_fp16)?\[.*GPTJ": "the test targets GPT-J's feed-forward layers, which have no SoftMax",
}
#: Among the decoders' tests, which others skip for the methods that they do not serve.
MUST_PASS = {
    "test_save_pretrained",
    "test_merge_layers",
    "test_mixed_adapter_batches",
    "test_generate_with_mixed_adapter_batches",
    "test_training_decoders",
    "test_training_decoders_gradient_checkpointing",
    "test_disable_adapter",
    "test_delete_adapter",
    "test_unload_adapter",
}
#: Their helpers know each method by its class; ours is put beside those that are like it.
_HELPERS = """

def _with_ours(stock):
    def set_init_weights_false(config_cls, kwargs):
        if config_cls.__name__ == "MultiMaxAdapterConfig":
            return {**kwargs, "init": "paper", "init_std": 1.0}
        return stock(config_cls, kwargs)
    return set_init_weights_false
set_init_weights_false = _with_ours(set_init_weights_false)
"""
_NOT_OURS = 'config_cls.__name__ != "MultiMaxAdapterConfig"'
_CONFIGS = """
from hf_multimax.peft import MultiMaxAdapterConfig
ALL_CONFIGS = [(MultiMaxAdapterConfig, {{"task_type": "{task}"}})]


"""


def edited(text: str, pattern: str, replacement: str) -> str:
    """``text`` with every match replaced; fails where PEFT's tests are not made as they were."""
    new, count = re.subn(pattern, lambda _: replacement, text, flags=re.MULTILINE)
    assert count, pattern
    return new


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    copy_tests("peft", folder)
    (folder / "diffusers.py").write_text("class StableDiffusionPipeline:\n    pass\n")  # imported, not used here
    common = folder / "tests" / "testing_common.py"
    text = edited(common.read_text(), r"config_cls not in \(LoraConfig, RoadConfig\)", _NOT_OURS)
    common.write_text(edited(text, r"config_cls not in \(LoraConfig,\)", _NOT_OURS))
    helpers = folder / "tests" / "testing_utils.py"
    helpers.write_text(helpers.read_text() + _HELPERS)
    for module, checkpoints in CHECKPOINTS.items():
        path = folder / "tests" / module
        text = edited(path.read_text(), r"^(?=class Test)", _CONFIGS.format(task=TASKS[module]))
        text = edited(text, r"\[\[1, 1, 1\], \[1, 2, 1\]\]", "[[1, 7, 4], [9, 2, 5]]")  # equal tokens mix to the same
        if module == "test_decoder_models.py":
            text = edited(text, "config_cls != LoraConfig", _NOT_OURS)
        path.write_text(text)
        for name, architecture in checkpoints.items():
            model = zoo_model(architecture, **_VOCABULARY)
            with torch.no_grad():  # attention counts
                for key, parameter in model.named_parameters():
                    if re.search("attn|attention", key) and parameter.ndim > 1:
                        parameter.mul_(8)
            (model.base_model if name.endswith("Model") else model).save_pretrained(folder / name)
            tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("module", CHECKPOINTS)
def test_pefts_tests_of_its_methods_pass(module, folder):
    models = " or ".join(name.rpartition("/")[2] for name in CHECKPOINTS[module])
    found = outcomes(folder, f"tests/{module}", "-k", f"{MultiMaxAdapterConfig.__name__} and ({models})")
    failed = sorted(name for name, outcome in found.items() if outcome != "PASSED")
    assert [name for name in failed if not any(re.search(pattern, name) for pattern in EXCEPTIONS)] == []
    assert len(found) - len(failed) >= 20
    if module == "test_decoder_models.py":
        assert {name.partition("[")[0].rpartition(":")[2] for name in set(found) - {*failed}} >= MUST_PASS
