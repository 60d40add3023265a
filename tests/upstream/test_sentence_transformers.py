"""sentence-transformers on patched encoders: train, save, load in a fresh process, equal embeddings."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

from hf_multimax import is_patched, multimax_parameters, patch_model
from tests.zoo import zoo_model

sentence_transformers = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.models")
losses = pytest.importorskip("sentence_transformers.losses")
pytestmark = pytest.mark.slow

SENTENCES = ["a cat sits on a mat", "a dog runs in the park", "nothing happens here", "the park is empty"]


@pytest.fixture
def folder(tmp_path):
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(SENTENCES * 3, vocab_size=60)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip
    model = patch_model(zoo_model("BertForMaskedLM").bert)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=str)
def test_train_save_load(folder, tmp_path, precision):
    encoder = models.Transformer(str(folder))
    pooling = models.Pooling(encoder.get_embedding_dimension())
    model = sentence_transformers.SentenceTransformer(modules=[encoder, pooling], device="cpu")
    assert is_patched(next(m for m in model.modules() if is_patched(m)))
    before = {name: value.clone() for name, value in multimax_parameters(model).items()}
    data = Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES[::-1]})
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", learning_rate=1e-2, **precision,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    sentence_transformers.SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss).train()
    after = multimax_parameters(model)
    assert len(after) == 4 and not any(torch.equal(value, before[name]) for name, value in after.items())
    expected = model.encode(SENTENCES)
    model.save_pretrained(str(tmp_path / "saved"))
    np.save(tmp_path / "expected.npy", expected)
    code = f"""
    import hf_multimax, numpy, sentence_transformers
    model = sentence_transformers.SentenceTransformer({str(tmp_path / "saved")!r}, device="cpu")
    assert any(hf_multimax.is_patched(m) for m in model.modules())
    found = model.encode({SENTENCES!r})
    tolerance = {2e-2 if precision else 1e-5}  # the Trainer leaves its autocast around the model
    numpy.testing.assert_allclose(found, numpy.load({str(tmp_path / "expected.npy")!r}), rtol=tolerance, atol=tolerance)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
