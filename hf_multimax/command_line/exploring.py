"""``explore``: one attention row in a browser, whose scalars can be moved."""

from pathlib import Path
from typing import Annotated

import typer

from hf_multimax.command_line import screen
from hf_multimax.command_line.looking import load_telling
from hf_multimax.command_line.options import Device, Length, ModelPath, Revision

__all__ = ["explore"]


def explore(
    path: ModelPath,
    text: Annotated[str | None, typer.Option(help="The sentence to begin with.")] = None,
    target: Annotated[str, typer.Option(help="Of an encoder-decoder: what the decoder reads; default: the text.")] = "",
    image: Annotated[Path | None, typer.Option(help="The image to begin with, for models of images.")] = None,
    length: Length = 256,
    host: Annotated[str, typer.Option(help="Who can connect: 127.0.0.1 this machine, 0.0.0.0 all.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser there.")] = False,
    device: Device = "cpu",
    revision: Revision = None,
) -> None:
    """Look at one attention row in a browser, and move its scalars; needs Gradio (the extra app).

    Type a sentence or drop an image, choose a layer and a head, and see sigma, the row, the map and the output change,
    beside what was trained and SoftMax. A stock model begins as SoftMax. Nothing is saved, and nothing leaves this
    machine. End it with Ctrl+C.
    """
    from hf_multimax.explorer.app import SENTENCE, serve
    from hf_multimax.explorer.looks import Inputs
    from hf_multimax.explorer.page import gradio

    gradio()  # before the model is loaded
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"{image}: no such file")
    loaded = load_telling(path, revision, device)
    if image is not None and not loaded.takes_images:
        raise ValueError(f"{path} takes text, not images: give --text")
    inputs = Inputs(SENTENCE if text is None else text, target, None if image is None else str(image))
    with screen.working("starting"):
        page, address = serve(
            loaded, inputs, length, server_name=host, server_port=port, inbrowser=open_browser, prevent_thread_lock=True
        )
    screen.say(f"{address} (Ctrl+C ends it)")
    page.block_thread()
