"""``patch``, ``push`` and ``convert``: from one checkpoint to another."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file
from transformers import AutoConfig

import hf_multimax
from hf_multimax import MultiMaxConfig
from hf_multimax.command_line import screen
from hf_multimax.command_line.loading import Loaded, check_patched, load, new_folder
from hf_multimax.command_line.options import Force, Replacement, Revision
from hf_multimax.command_line.words import read_options
from hf_multimax.convert import from_authors, to_authors

__all__ = ["convert", "patch", "push"]

_LAYOUTS = "timm-vit, fairseq-lm, fairseq-translation or lm-head"


def patch(
    src: Annotated[str, typer.Argument(help="A stock model: a folder, or an id on the Hub.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    replacement: Replacement,
    revision: Revision = None,
    force: Force = False,
) -> None:
    """Replace the SoftMax of a model and save it. With the defaults its outputs stay what they are."""
    values = dataclasses.asdict(replacement)
    values |= {name: values[name] or None for name in ("include", "exclude")}  # Typer gives an empty list
    config = MultiMaxConfig(normalizer_kwargs=read_options(values.pop("option"), "--option"), **values)
    new_folder(dst, force)
    with screen.working(f"loading {src}"):
        loaded = load(src, revision)
    if loaded.model is not loaded.inside:
        raise ValueError(f"{src} is an adapter, which has no SoftMax of its own: patch its base, or merge it first")
    hf_multimax.patch_model(loaded.model, config)
    with screen.working(f"writing {dst}"):
        loaded.model.save_pretrained(dst)
        _save_preparation(loaded, dst)
    parameters = hf_multimax.multimax_parameters(loaded.model)
    layers = {name.rpartition(".multimax")[0] for name, _ in loaded.model.named_modules() if name.endswith(".multimax")}
    count = sum(parameter.numel() for parameter in parameters.values())
    screen.say(
        f"{dst}: {loaded.class_name} with {config.normalizer} in {len(layers)} attention layers",
    )
    screen.say(f"{count} learnable scalars{', the output among them' if config.output else ''}")


def push(
    path: Annotated[str, typer.Argument(help="A MultiMax model, or an adapter.")],
    repo_id: Annotated[str, typer.Argument(help="user/name, or name.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is created.")] = False,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")] = False,
    branch: Annotated[str | None, typer.Option(help="The branch to commit to.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's identifier of the licence.")] = None,
    results: Annotated[Path | None, typer.Option(help="results.json of a recipe, for the card.")] = None,
) -> None:
    """Publish a MultiMax model or an adapter on the Hub, with its tokenizer and a card.

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    with screen.working(f"loading {path}"):
        loaded = load(path)
    check_patched(loaded)
    if results is not None and not results.is_file():
        raise FileNotFoundError(f"{results}: no such file")
    with screen.working(f"pushing to {repo_id}"):
        if loaded.model is not loaded.inside:  # PEFT's own way, into which the package puts the scalars
            commit = loaded.model.push_to_hub(
                repo_id, private=private or None, create_pr=pull_request, revision=branch, commit_message=message
            )
        else:
            commit = hf_multimax.push(
                loaded.model,
                repo_id,
                results=results,
                tokenizer=loaded.tokenizer,
                image_processor=loaded.image_processor,
                private=private or None,
                revision=branch,
                create_pr=pull_request,
                commit_message=message,
                license=license,
            )
    screen.say(str(commit.pr_url or commit.commit_url))


def convert(
    src: Annotated[Path, typer.Argument(help="A checkpoint file of the authors' layout; with --to-authors a model.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; with --to-authors a .safetensors file.")],
    layout: Annotated[str, typer.Option(help=_LAYOUTS)],
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, what the file does not tell (num_heads=6); may be repeated.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="For lm-head: the stock model that it is one of.")] = None,
    to_authors_layout: Annotated[bool, typer.Option("--to-authors", help="The other way round.")] = False,
    force: Force = False,
) -> None:
    """Make a Transformers model of a checkpoint of the authors' code, or the other way round."""
    options = read_options(option, "--option")
    if to_authors_layout:
        if options or config:
            raise ValueError("--option and --config are for the way from the authors' layout, not with --to-authors")
        if dst.suffix != ".safetensors":
            raise ValueError(f"{dst}: the file to write must end in .safetensors")
        if dst.exists() and not force:
            raise FileExistsError(f"{dst} is there: give --force to replace it")
        new_folder(dst.parent)
        with screen.working(f"loading {src}"):
            loaded = load(str(src))
        check_patched(loaded)
        save_file(to_authors(loaded.inside, layout), dst)
        screen.say(str(dst))
        return
    if not src.is_file():
        raise FileNotFoundError(f"{src}: no such file")
    if config is not None:
        options["config"] = AutoConfig.from_pretrained(config)
    with screen.working(f"reading {src}"):
        model = from_authors(src, layout, **options)
    new_folder(dst, force)
    model.save_pretrained(dst)
    screen.say(f"{dst}: {type(model).stock_class.__name__}")


def _save_preparation(loaded: Loaded, folder: Path) -> None:
    for part in (loaded.tokenizer, loaded.image_processor):
        if part is not None:
            part.save_pretrained(folder)
