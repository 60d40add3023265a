"""Publishing on the Hugging Face Hub: one commit with all that a stranger needs to load a model, or no commit."""

import contextlib
import functools
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from hf_multimax.normalizers.base import is_patched
from hf_multimax.plots import plot_modulators
from hf_multimax.publishing.card import layer_modulators, model_card
from hf_multimax.publishing.results import Results
from hf_multimax.version import __version__

__all__ = ["publish", "push"]

RESULTS, CARD, FIGURE = "results.json", "README.md", "modulators.png"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class HubOptions(TypedDict, total=False):
    """Where and how a commit is made."""

    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None
    commit_description: str | None
    token: str | bool | None
    tags: Iterable[str] | str | None
    license: str | None


def push(
    model: PreTrainedModel,
    repo_id: str,
    *,
    results: dict[str, Any] | str | PathLike[str] | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    max_shard_size: int | str = "50GB",
    **hub: Unpack[HubOptions],
) -> CommitInfo:
    """Publish a MultiMax model in one commit: weights, config, tokenizer, generation config, loader file and card.

    A card that the repository has is edited, not replaced; weights of another sharding that it has are deleted, since
    they would be loaded in the place of these. The repository and the branch are created if they do not exist.

    Args:
        model: a patched model, or one loaded from a MultiMax checkpoint.
        repo_id: ``"user/name"``, or ``"name"`` for the token's user.
        results: what a recipe wrote, as a dict or the path of its ``results.json``: the card's figures. It is published
            with the model.
        tokenizer: the tokenizer, or the whole processor, that belongs to the model.
        image_processor: the image processor or feature extractor, likewise.
        private: whether a repository that is created is private.
        revision: the branch to commit to (default ``main``), or a pull request, ``"refs/pr/1"``.
        create_pr: open a pull request with the commit instead.
        token: a token with the right to write; by default the one of ``HF_TOKEN`` or ``hf auth login``.
        max_shard_size: as in ``save_pretrained``.
        tags: added to the card's own and to ``model.model_tags``.
        license: the Hub's identifier of the model's licence; by default that of the card that is there.

    Returns:
        The commit: its ``oid``, ``commit_url`` and ``pr_url``.

    Raises:
        TypeError, ValueError, OSError: for arguments that cannot be published, before anything is sent.
        RuntimeError: if the Hub refuses or cannot be reached, with the way to go on. A commit is made whole or not at
            all, and a branch made for it is removed again; a repository that was created stays, empty.
    """
    _check_model(model)
    unknown = hub.keys() - HubOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"push has no argument {min(unknown)!r}; there are {', '.join(HubOptions.__annotations__)}")
    for name, part in (("tokenizer", tokenizer), ("image_processor", image_processor)):
        if part is not None and not hasattr(part, "save_pretrained"):
            raise TypeError(f"{name} must be the object, not {part!r}: load it first")
    with tempfile.TemporaryDirectory(prefix="hf-multimax-") as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for part in (tokenizer, image_processor):
            if part is not None:
                part.save_pretrained(folder)
        if results is not None:
            (folder / RESULTS).write_text(json.dumps(Results(results).values, indent=2) + "\n", encoding="utf-8")
        return publish(
            model,
            folder,
            sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
            repo_id,
            tokenizer=image_processor if tokenizer is None else tokenizer,
            **hub,
        )


def publish(
    model: PreTrainedModel,
    folder: Path,
    files: Iterable[str],
    repo_id: str,
    *,
    tokenizer: Any = None,
    **hub: Unpack[HubOptions],
) -> CommitInfo:
    """Commit files of a folder that ``model`` was saved in, and the card, which is written beside them.

    Args:
        files: their paths in the folder; its ``results.json`` gives the card its figures if it is among them.

    Other arguments, result and exceptions as of :func:`push`.
    """
    token, tags, license, revision = (hub.get(name) for name in ("token", "tags", "license", "revision"))
    _check_token(token)
    _check_names(repo_id, tags, license)
    files = [file for file in files if file not in (CARD, FIGURE)]
    results = folder / RESULTS if RESULTS in files else None
    figure = _figure(model, folder)
    card_of = functools.partial(
        model_card, model, results, repo_id=repo_id, tokenizer=tokenizer, license=license, modulator_figure=figure
    )
    card_of(existing=_local_card(folder))  # raises for results of another model, before anything is sent
    api = HfApi(token=token, library_name="hf_multimax", library_version=__version__)
    with _way_out(repo_id), contextlib.ExitStack() as stack:
        repo_id = api.create_repo(repo_id, private=hub.get("private"), exist_ok=True).repo_id
        head = stack.enter_context(_branch(api, repo_id, revision))
        present = {sibling.rfilename for sibling in head.siblings or ()}
        there = ModelCard.load(api.hf_hub_download(repo_id, CARD, revision=head.sha)) if CARD in present else None
        card = card_of(existing=there or _local_card(folder), repo_id=repo_id)  # the name now has its namespace
        _tag(card, [*(model.model_tags or ()), *([tags] if isinstance(tags, str) else tags or ())])
        card.save(folder / CARD)
        files += [CARD, *([figure] if figure else [])]
        whole = {"model.safetensors", "model.safetensors.index.json"} & set(files)  # no adapter, no variant
        stale = sorted(name for name in present - set(files) if whole and _WEIGHTS.fullmatch(name))
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in files),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=hub.get("commit_message") or "Upload MultiMax model",
            commit_description=hub.get("commit_description"),
            revision=revision,
            create_pr=hub.get("create_pr", False),
            parent_commit=head.sha,  # the card was read there: a commit in between must not be undone
        )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or not is_patched(model):
        raise TypeError(
            f"push needs a MultiMax model, got {type(model).__name__}: call hf_multimax.patch_model first; of a "
            "wrapped model give the one inside, of a PEFT model the merged one (merge_and_unload)"
        )


def _check_names(repo_id: str, tags: Any, license: Any) -> None:
    if not isinstance(repo_id, str) or not repo_id:
        raise ValueError(f"repo_id must be 'user/name' or 'name', got {repo_id!r}")
    validate_repo_id(repo_id)
    tags = tags if isinstance(tags, Iterable) else [] if tags is None else [tags]
    if not all(isinstance(tag, str) for tag in tags):
        raise TypeError(f"tags must be a string or several, got {tags!r}")
    if not isinstance(license, str | None):
        raise TypeError(f"license must be one of the Hub's identifiers, such as 'mit', got {license!r}")


def _check_token(token: str | bool | None) -> None:
    """A token that no header can hold would be shown in the HTTP client's own error."""
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("token is empty or has characters that no token has: look for a space or line break in it")


def _local_card(folder: Path) -> ModelCard | None:
    path = folder / CARD
    return ModelCard.load(path) if path.is_file() else None


def _figure(model: PreTrainedModel, folder: Path) -> str | None:
    """The name of a figure of the modulators, drawn if there are any, and matplotlib to draw them."""
    layers = layer_modulators(model)
    if importlib.util.find_spec("matplotlib") is None or not any("ranges" in values for values in layers.values()):
        return None
    plot_modulators(layers, folder / FIGURE)
    return FIGURE


def _tag(card: ModelCard, tags: Iterable[str]) -> None:
    present = card.data.tags or []
    card.data.tags = [*present, *(tag for tag in dict.fromkeys(tags) if tag not in present)]


@contextlib.contextmanager
def _branch(api: HfApi, repo_id: str, revision: str | None) -> Iterator[ModelInfo]:
    """What the repository is at that revision; a branch that had to be created is removed again on any exception."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if revision is None:
            raise
    else:
        yield info
        return
    api.create_branch(repo_id, branch=revision)
    info = api.model_info(repo_id, revision=revision)
    try:
        yield info
    except BaseException:
        with contextlib.suppress(Exception):  # the first exception is the one to know of
            if api.model_info(repo_id, revision=revision).sha == info.sha:  # nobody has committed to it
                api.delete_branch(repo_id, branch=revision)
        raise


@contextlib.contextmanager
def _way_out(repo_id: str) -> Iterator[None]:
    """Turn whatever stops a commit into an error that says how to go on."""
    advice = {
        401: "Log in with `hf auth login`, set HF_TOKEN, or pass token=: it must be valid.",
        403: f"The token must have the right to write to {repo_id}; without it, create_pr=True proposes the change.",
        412: "Someone else committed to it meanwhile. Call it again: it then starts from their commit.",
    }
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        passing = status is None or status == 429 or status >= 500
        default = "Call it again: files that have arrived are not sent twice." if passing else ""
        way_out = advice.get(status, default)
        raise RuntimeError(
            f"the push to {repo_id} stopped, and nothing is half-done: a commit is made whole or not at all. {way_out} "
            f"What happened: {type(error).__name__}: {str(error).strip()}"
        ) from error
