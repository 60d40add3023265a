"""Decoding with caches agrees with decoding without, and no layer sees the future."""

import pytest
import torch
from models import GENERATORS, inputs_for, make

from hf_multimax import multimax_parameters, patch_model


def generator_model(name, **options):
    model = patch_model(make(name), **options)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    return model


def prompt(model):
    batch = {k: v for k, v in inputs_for(model, labels=False).items() if k in ("input_ids", "attention_mask")}
    if not model.config.is_encoder_decoder:  # texts are padded on the left to be continued
        batch = {key: value.flip(1) for key, value in batch.items()}
    return batch


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_caches_do_not_change_what_is_generated(name, how, output):
    model = generator_model(name, output=output)
    batch = prompt(model)
    results = []
    for cache in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        generated = model.generate(
            **batch,
            **how,
            **cache,
            max_new_tokens=8,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
        )
        results.append((generated.sequences, torch.stack(generated.logits)))
    for sequences, logits in results[1:]:
        assert torch.equal(sequences, results[0][0])
        torch.testing.assert_close(logits, results[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", [*GENERATORS, "MarianForCausalLM", "GPT2ForTokenClassification"])
def test_a_future_token_changes_nothing_earlier(name, padded, output):
    model = generator_model(name, output=output) if "Token" not in name else patch_model(make(name), output=output)
    batch = inputs_for(model, labels=False, padded=padded)
    ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    before = model(**batch).logits
    changed = {**batch, ids: batch[ids].clone()}
    changed[ids][:, 5:] = (changed[ids][:, 5:] + 7) % 50 + 3
    after = model(**changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
