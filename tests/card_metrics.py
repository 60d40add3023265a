"""Reading a card's figures back: from its metadata, against what its table shows."""

import re
from pathlib import Path

from huggingface_hub import ModelCard

from hf_multimax.publishing.results import Figure, metric_label, one_line, with_spread


def read_metrics(card: ModelCard | str | Path) -> dict[str, dict[str, Figure]]:
    """The figures of a card's evaluation, ``{arm: {metric: figure}}``, in full precision: those of results.json.

    They are read from the metadata; what the card's table shows must be their rounding.

    Args:
        card: the card, or the path of its file.

    Raises:
        ValueError: if the table shows another number than the metadata.
    """
    card = card if isinstance(card, ModelCard) else ModelCard.load(str(card))
    found: dict[str, dict[str, Figure]] = {}
    for entry in card.data.eval_results or []:
        args = entry.metric_args
        if not isinstance(args, dict) or not {"arm", "seeds"} <= args.keys():
            continue  # of somebody else
        figure = Figure(entry.metric_value, args.get("std"), args["seeds"])
        found.setdefault(args["arm"], {})[entry.metric_type] = figure
    shown = _shown_scores(card.text)
    for arm, figures in found.items():
        for metric, figure in figures.items():
            text = shown.get((one_line(arm), metric_label(metric)))
            decimals = len(text.split(" ± ")[0].partition(".")[2]) if text else 0
            if text is None or text != with_spread(figure, decimals):
                raise ValueError(
                    f"the card's table shows {text!r} for {metric} of {arm!r}, its metadata {figure}: render it again"
                )
    return found


def _shown_scores(text: str) -> dict[tuple[str, str], str]:
    """The cells of the table of results in MultiMax's block, by arm and column."""
    section = re.search(r"<!-- multimax -->.*?<!-- /multimax -->", text.replace("\r\n", "\n"), flags=re.DOTALL)
    results = re.search(r"^### Results\n(.*?)^### ", section.group() if section else "", re.DOTALL | re.MULTILINE)
    lines = [line for line in (results.group(1) if results else "").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    if not rows:
        return {}
    header, *body = rows
    return {(row[0].strip("`"), column): cell for row in body for column, cell in zip(header[1:], row[1:])}
