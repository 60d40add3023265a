"""The explorer as a program: for ``hf-multimax explore``, and as a Space.

For a Space copy this file there as ``app.py``, with a ``requirements.txt`` of one line, ``hf-multimax[app]``, and name
the model in the Space's variable ``MULTIMAX_MODEL`` (a Hub id).
"""

import os
from typing import Any

from hf_multimax.command_line.loading import Loaded, load
from hf_multimax.explorer.looks import Explorer, Inputs
from hf_multimax.explorer.page import build, look_of_page

__all__ = ["SENTENCE", "serve"]

#: What a model of text looks at first.
SENTENCE = "The river remembers what the mountain forgets, and the old bridge remembers both."


def serve(loaded: Loaded, inputs: Inputs, length: int = 256, **launch: Any) -> tuple[Any, str]:
    """Serve the explorer of a model.

    Args:
        loaded: the model; a stock one is patched.
        inputs: what is looked at first.
        length: how many tokens a text may have.
        launch: of Gradio's ``launch``: ``server_name``, ``server_port``, ``inbrowser``, ``prevent_thread_lock``.

    Returns:
        Gradio's ``Blocks`` and its address, once it runs (with ``prevent_thread_lock``) or is ended.

    Raises:
        ImportError: without Gradio. ValueError: for a model without attention that can be reached, or impossible
            inputs. OSError: if the port is taken.
    """
    page = build(Explorer(loaded, length), inputs)
    _, address, _ = page.launch(**look_of_page(), quiet=True, **launch)
    return page, address


if __name__ == "__main__":
    if "MULTIMAX_MODEL" not in os.environ:
        raise SystemExit("set MULTIMAX_MODEL to the Hub id or folder of a model")
    serve(load(os.environ["MULTIMAX_MODEL"]), Inputs(SENTENCE))
