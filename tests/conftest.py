"""Tiny models of every first-class architecture, with inputs, and the settings that every test runs under."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import hf_multimax  # noqa: F401  (registers the extension points)


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models are faster on one
    yield
    torch.set_num_threads(threads)
