"""Other models that go through the attention interface: patched without a line about them in the package."""

import pytest
import torch
import transformers
from zoo import ZOO, zoo_inputs, zoo_model

from hf_multimax import backend, multimax_parameters, patch_model, unpatch_model


def randomised(model, scale=1.0):
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(scale * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ZOO)
def test_identity_round_trip_and_causality(name, tmp_path):
    model, batch = zoo_model(name), zoo_inputs(name, length=13)
    del batch["labels" if "labels" in batch else "attention_mask"]
    if ZOO[name].seq2seq:
        batch["decoder_input_ids"] = batch["input_ids"][:, :7]
    keep = batch["attention_mask"].bool() if "attention_mask" in batch else ...
    with torch.no_grad(), backend("eager"):
        stock = model(**batch)[0]
        patched = patch_model(model)(**batch)[0]
        if stock.ndim == 3 and stock.shape[1] == 13:
            stock, patched = stock[keep], patched[keep]
        torch.testing.assert_close(patched, stock, rtol=1e-5, atol=1e-5)
        changed = randomised(model)(**batch)[0]
        assert not torch.equal(changed[keep] if changed.shape[:2] == (2, 13) else changed, patched)
        if name.endswith("CausalLM"):
            ids, other = batch["input_ids"], batch["input_ids"].clone()
            other[:, 6:] = (other[:, 6:] + 11) % 50 + 3
            torch.testing.assert_close(model(ids).logits[:, :6], model(other).logits[:, :6], rtol=1e-4, atol=1e-4)
        if ZOO[name].seq2seq:
            other = {**batch, "decoder_input_ids": batch["decoder_input_ids"].clone()}
            other["decoder_input_ids"][:, -1] = 7
            torch.testing.assert_close(model(**other).logits[:, :-1], changed[:, :-1], rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        reloaded = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(reloaded(**batch)[0], changed)
        assert type(unpatch_model(model)) is getattr(transformers, name)
