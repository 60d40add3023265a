"""What was computed, as HTML that follows the page's colours: SVG curves, maps as small PNGs, tables, a sentence."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hf_multimax.explorer.looks import ARMS, Look

__all__ = ["error", "maps", "measures", "output", "row", "sigma"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 250, 36, 22
#: Entries of a row that are listed.
_LISTED = 6
#: Heat in the maps: vermilion is seen on a light and on a dark page.
_HEAT = (213, 94, 0)


def sigma(look: Look) -> str:
    """sigma now, as trained and as SoftMax leaves scores, over the histogram of the head's scores."""
    low, high = look.points[0].item(), look.points[-1].item()
    curves = {**look.sigma, "SoftMax": look.points}
    ends = [value for curve in curves.values() for value in (curve.min().item(), curve.max().item())]
    span = high - low  # what a slope of the second order makes of far scores would flatten all else
    bottom, top = max(min(ends), low - span), min(max(ends), high + span)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - low) / (high - low) * (_WIDTH - _LEFT),
            (_HEIGHT - _BOTTOM) * (1 - (y - bottom) / max(top - bottom, 1e-9)),
        )

    floor, most, inside = _HEIGHT - _BOTTOM, max(look.counts, default=1), []
    for left, right, count in zip(look.edges, look.edges[1:], look.counts):
        height = 0.6 * floor * count / most
        inside.append(
            f'<rect class="bars" x="{at(left, 0)[0]:.1f}" width="{at(right, 0)[0] - at(left, 0)[0]:.2f}" '
            f'y="{floor - height:.1f}" height="{height:.1f}"/>'
        )
    for fall in look.falls:
        left, right = (at(min(max(end, low), high), 0)[0] for end in (fall.low, fall.high))
        inside.append(f'<rect class="falls" x="{left:.1f}" width="{right - left:.1f}" height="{floor}"/>')
    for threshold in look.thresholds:
        x = at(threshold, 0)[0]
        inside.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{floor}"/>')
    for score in look.scores[look.row][look.keep[look.row]].tolist():
        x = at(score, 0)[0]
        inside.append(f'<line class="rug" x1="{x:.1f}" x2="{x:.1f}" y1="{floor - 7}" y2="{floor}"/>')
    for arm in reversed([arm for arm in ARMS if arm in curves]):
        points = " ".join(
            "{:.1f},{:.1f}".format(*at(x, min(max(y, bottom - span), top + span)))
            for x, y in zip(look.points.tolist(), curves[arm].tolist())
        )
        inside.append(f'<polyline class="line {arm}" points="{points}"/>')
    parts = [f'<clipPath id="mm-plot"><rect x="{_LEFT}" width="{_WIDTH - _LEFT}" height="{floor}"/></clipPath>']
    parts.append(f'<g clip-path="url(#mm-plot)">{"".join(inside)}</g>')
    parts.append(f'<path class="axis" fill="none" d="M{_LEFT} 0V{floor}H{_WIDTH}"/>')
    for x in _ticks(low, high):
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{_HEIGHT - 7}" text-anchor="middle">{x:g}</text>')
    for y in _ticks(bottom, top):
        parts.append(f'<text x="{_LEFT - 5}" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{y:g}</text>')
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="sigma over the scores of the head">'
        f"{''.join(parts)}</svg>"
    )
    notes = [] if "now" in look.sigma else ["what was chosen has no sigma: scores stay as they are"]
    notes += [_fall_in_words(fall.low, fall.high) for fall in look.falls]
    return _panel("σ(x) over the scores x of this head; ticks are the row's", svg, _legend(curves), *_paragraphs(notes))


def measures(look: Look) -> str:
    """Sparsity, multi-modality and more of the head, a column an arm."""
    body = [
        (name, ["-" if math.isnan(look.measures[arm][name]) else f"{look.measures[arm][name]:.4f}" for arm in ARMS])
        for name in look.measures["now"]
    ]
    return _panel("Mean over the rows of this head", _table("measure", body))


def row(look: Look) -> str:
    """What the query looks at: the keys, shaded by their weight, and the largest weights in numbers."""
    weights = {arm: look.weights[arm][look.row] for arm in ARMS}
    title = f"What {_name(look.queries[look.row])} looks at"
    kept = int(look.keep[look.row].sum())
    best = weights["now"].topk(min(_LISTED, kept)).indices.tolist()
    rows = [(_visible(look.keys[key]), [weights[arm][key].item() for arm in ARMS]) for key in best]
    zeros = int((weights["now"][look.keep[look.row]] == 0).sum())
    notes = [f"{zeros} of {kept} are exactly 0"] if zeros else []
    shown = _on_image(look) if look.pixels is not None else _sentence(look)
    return _panel(title, shown, _bars("key", rows), *_paragraphs(notes))


def maps(look: Look) -> str:
    """The head's whole map, of each arm, in one scale; the query's row is framed."""
    most = max(weights.max().item() for weights in look.weights.values())
    queries = len(look.queries)
    frame = (
        f'<span class="line-of-query" style="top:{100 * look.row / queries:.3f}%;height:{100 / queries:.3f}%"></span>'
    )
    shown = [
        f'<figure><figcaption>{arm}</figcaption><div class="map">{_heat(weights, most, arm)}{frame}</div></figure>'
        for arm, weights in look.weights.items()
    ]
    note = "rows are queries, columns keys; what is exactly 0 has no colour"
    return _panel("Attention map of this head", f'<div class="maps">{"".join(shown)}</div>', *_paragraphs([note]))


def output(look: Look) -> str:
    """The most probable outputs, with the probabilities that each arm gives."""
    if not look.output:
        return ""
    rows = [(_visible(name), [values[arm] for arm in ARMS]) for name, values in look.output]
    if look.pixels is None and len(look.output) > 1:
        title = f"Output distribution at {_name(look.queries[look.row])}"
    else:
        title = "Output distribution"
    return _panel(title, _bars("token or class", rows))


def error(text: str) -> str:
    """One line that screen readers are told of."""
    return f'<div class="mm-error" role="alert">{html.escape(text)}</div>'


# -- parts -------------------------------------------------------------------------------------------------------------


def _sentence(look: Look) -> str:
    weights = look.weights["now"][look.row]
    most, words = max(weights.max().item(), 1e-30), []
    for index, (key, weight) in enumerate(zip(look.keys, weights.tolist())):
        kept = bool(look.keep[look.row, index])
        kinds = ["query"] if index == look.row and len(look.keys) == len(look.queries) else []
        kinds += [] if weight else ["zero"]
        share = 85 * math.sqrt(max(weight, 0.0) / most)
        told = f"{weight:.4f}" if kept else "masked"
        words.append(
            f'<b class="{" ".join(kinds)}" title="{told}" '
            f'style="background:color-mix(in srgb, var(--now) {share:.0f}%, transparent)">{_visible(key)}</b>'
        )
    return f'<div class="sentence">{"".join(words)}</div>'


def _on_image(look: Look) -> str:
    side = math.isqrt(len(look.keys))
    extra = len(look.keys) - side * side
    pixels = look.pixels.float()
    low, high = pixels.min(), pixels.max()
    picture = _png(((pixels - low) / (high - low).clamp_min(1e-12) * 255).byte().movedim(0, -1))
    if extra > 4:
        return ""
    rows = {arm: look.weights[arm][look.row][extra:].reshape(side, side) for arm in ARMS}
    most = max(weights.max().item() for weights in rows.values())
    shown = [
        f'<figure><figcaption>{arm}</figcaption><div class="map"><img src="{picture}" alt="">'
        f"{_heat(rows[arm], most, arm, 'over')}</div></figure>"
        for arm in ARMS
    ]
    return f'<div class="maps">{"".join(shown)}</div>'


def _heat(weights: Tensor, most: float, arm: str, kind: str = "") -> str:
    alpha = (weights.clamp_min(0) / max(most, 1e-30)).sqrt().mul(245).add(10 * (weights > 0)).clamp(0, 255).byte()
    color = torch.tensor(_HEAT, dtype=torch.uint8).expand(*alpha.shape, 3)
    picture = _png(torch.cat([color, alpha[..., None]], dim=-1))
    return f'<img class="{kind}" src="{picture}" alt="attention weights, {arm}">'


def _png(pixels: Tensor) -> str:
    """``[height, width, channels]`` of bytes as a data URL."""
    from PIL import Image

    pixels = pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels
    held = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(held, "png")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def _bars(first: str, rows: Iterable[tuple[str, Sequence[float]]]) -> str:
    """A table of probabilities, with a bar under each, as long as its share of the largest."""
    rows = list(rows)
    most = max((value for _, values in rows for value in values), default=0.0) or 1.0
    return _table(
        first,
        [
            (
                name,
                [
                    f'{value:.4f}<i style="width:{100 * value / most:.1f}%;background:var(--{arm.lower()})"></i>'
                    for arm, value in zip(ARMS, values)
                ],
            )
            for name, values in rows
        ],
    )


def _table(first: str, rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in (first, *ARMS))
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
        for name, values in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _legend(curves: Mapping[str, Tensor]) -> str:
    names = {"now": "now", "trained": "trained", "SoftMax": "identity (SoftMax)"}
    keys = [
        f'<span><span class="key" style="border-color:var(--{arm.lower()})"></span>{names[arm]}</span>'
        for arm in ARMS
        if arm in curves
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def _panel(title: str, *parts: str) -> str:
    return f'<section class="mm"><h3>{title}</h3>{"".join(parts)}</section>'


def _paragraphs(texts: Iterable[str]) -> list[str]:
    return [f"<p>{text}</p>" for text in texts]


def _name(token: str) -> str:
    return f"“{_visible(token.strip() or token)}”"


def _visible(token: str) -> str:
    return html.escape(token.replace("\n", "⏎")) or "∅"


def _fall_in_words(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "σ falls everywhere: the larger of two scores weighs less"
    if math.isinf(low):
        return f"σ rises again below {high:.2f}: there the smaller of two scores weighs more"
    if math.isinf(high):
        return f"σ falls above {low:.2f}: there the larger of two scores weighs less"
    return f"σ falls from {low:.2f} to {high:.2f}: there the larger of two scores weighs less"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(step * index, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
