"""PEFT's own tests of its methods pass on patched models.

The checkpoints that they name lie in folders of those names, tiny and random, stock or patched.
"""

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from hf_multimax import multimax_parameters, patch_model
from tests.upstream.sources import copy_tests, lost
from tests.zoo import zoo_model

_FEW = ("IA3", "LoraConfig", "PrefixTuning")
_MANY = (
    *_FEW, "AdaLora", "BOFT", "FourierFT", "HRA", "MissConfig", "OFT", "PromptEncoder", "PromptTuning", "RandLora",
    "VeraConfig",
)  # fmt: skip
#: Of each of PEFT's files of tests: the checkpoint in it that is tried, what class that is of, and the methods.
FILES = {
    "test_decoder_models": ("trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", _MANY),
    "test_encoder_decoder_models": (
        "peft-internal-testing/tiny-random-BartForConditionalGeneration", "BartForConditionalGeneration", _FEW,
    ),
    "test_feature_extraction_models": ("peft-internal-testing/tiny-random-BertModel", "BertForMaskedLM", _FEW),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a text"] * 3, vocab_size=300, special_tokens=["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = []
    for patched in (False, True):
        folder = tmp_path_factory.mktemp("peft")
        copy_tests("peft", folder)
        (folder / "diffusers.py").write_text("class StableDiffusionPipeline:\n    pass\n")  # imported, not used here
        for path, name, _ in FILES.values():
            model = zoo_model(name, vocab_size=1000)
            if patched:
                patch_model(model)
                with torch.no_grad():
                    for parameter in multimax_parameters(model).values():
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder / path)
            tokenizer().save_pretrained(folder / path)
        found.append(folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_what_passes_on_stock_models_passes_on_patched_ones(folders, name):
    path, _, methods = FILES[name]
    chosen = f"({' or '.join(methods)}) and {path.rpartition('/')[2]}"
    passed, missing = lost(*folders, f"tests/{name}.py", "-k", chosen, "-p", "hf_multimax")
    assert missing == []
    assert len(passed) > 100
