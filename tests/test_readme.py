"""README: every Python block runs, word for word and in order, and its tables say what the code says."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

from hub_server import TOKEN, HubServer
from models import make

from hf_multimax import MultiMaxConfig
from hf_multimax.registry import get_normalizer, registered_normalizers
from recipes.shared.tokens import train_tokenizer

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block_runs(tmp_path):
    """In a folder where "gpt2" is a tiny model, in a process of its own, and with a Hub of its own."""
    make("GPT2LMHeadModel", n_layer=6, vocab_size=300).save_pretrained(tmp_path / "gpt2")
    train_tokenizer("MultiMax is a SoftMax that can keep several peaks.\n", 300, 64).save_pretrained(tmp_path / "gpt2")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    (tmp_path / "blocks.py").write_text("\n".join(blocks))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(README.parent), os.environ.get("PYTHONPATH", "")])}
    with HubServer() as hub:
        hub.users[TOKEN] = "your-name"
        done = subprocess.run(
            [sys.executable, "blocks.py"],
            cwd=tmp_path,
            env=environment | hub.environment(tmp_path / "hf"),
            capture_output=True,
            text=True,
            timeout=500,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stderr
    assert "transformer.h.0.attn.multimax.ranges" in done.stdout
    assert "multimax params: " in done.stdout
    assert (tmp_path / "gpt2-multimax" / "model.safetensors").exists()


def test_the_config_table_is_the_config():
    text = README.read_text()
    for field in dataclasses.fields(MultiMaxConfig):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{field.name}` |"))
        assert field.metadata["help"].replace("'", '"') in row.replace("'", '"')
        assert repr(getattr(MultiMaxConfig(), field.name)).replace("'", '"') in row.replace("'", '"')


def test_every_normalizer_has_a_row():
    text = README.read_text()
    # other tests register some of their own, without a citation
    built_in = [name for name in registered_normalizers() if get_normalizer(name).citation]
    assert len(built_in) >= 13
    assert [name for name in built_in if f"| `{name}` |" not in text] == []


def test_every_figure_exists():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file()
