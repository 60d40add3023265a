"""The file that a saved model carries so that ``trust_remote_code=True`` can load it without importing the plugin."""

from pathlib import Path

__all__ = ["AUTO_MAP", "write_loader"]

_MODULE = "multimax_loader"

#: Only the config needs the file: importing it registers every class, and the Auto classes do the rest.
AUTO_MAP = {"AutoConfig": f"{_MODULE}.MultiMaxAutoConfig"}

_SOURCE = '''\
"""Loads this checkpoint, whose SoftMax is replaced by MultiMax, through the hf_multimax package."""

try:
    from hf_multimax.modeling import MultiMaxAutoConfig as _MultiMaxAutoConfig
except ImportError as error:
    raise ImportError(
        "This checkpoint needs the hf_multimax package, which replaces SoftMax by MultiMax: "
        "pip install hf-multimax"
    ) from error


class MultiMaxAutoConfig(_MultiMaxAutoConfig):
    pass
'''


def write_loader(directory: str | Path) -> Path:
    """Write the loader file into a checkpoint's folder and return its path."""
    path = Path(directory) / f"{_MODULE}.py"
    path.write_text(_SOURCE, encoding="utf-8")
    return path
