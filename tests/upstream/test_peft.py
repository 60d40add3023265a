"""PEFT's own tests of decoders pass on patched models.

The checkpoints that they name lie in folders of those names, tiny and random, stock or patched.
"""

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from hf_multimax import multimax_parameters, patch_model
from tests.upstream.sources import copy_tests, lost
from tests.zoo import zoo_model

CHECKPOINTS = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "peft-internal-testing/tiny-random-OPTForCausalLM": "OPTForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2": "Qwen2ForCausalLM",
}
METHODS = (
    "AdaLora", "BOFT", "BoneConfig", "HRA", "IA3", "LoraConfig", "OFT", "PrefixTuning", "PromptTuning",
    "PromptEncoder", "VeraConfig", "FourierFT", "LoHa", "RandLora",
)  # fmt: skip


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
        for path, name in CHECKPOINTS.items():
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
def test_what_passes_on_stock_decoders_passes_on_patched_ones(folders):
    chosen = f"({' or '.join(METHODS)}) and ({' or '.join(path.rpartition('/')[2] for path in CHECKPOINTS)})"
    passed, missing = lost(*folders, "tests/test_decoder_models.py", "-k", chosen)
    assert missing == []
    assert len(passed) > 300
