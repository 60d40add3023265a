"""Tables: in columns for a terminal, in Markdown for a page; and the rows of a comparison, for either."""

from collections.abc import Sequence

from hf_multimax.publishing.results import Results, metric_label


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the header, as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def comparison_rows(results: Results, p_values: bool) -> list[list[str]]:
    """The header, then for each arm the metric that decides, its difference from the reference, and what it cost."""
    header = ["arm", "metric", "mean ± std", "difference, 95 % interval", *["p"] * p_values]
    rows = [[*header, "verdict", "seeds", "step time", "memory"]]
    metric = f"{metric_label(results.metric)} {'↓' if results.values['lower_is_better'] else '↑'}"
    for arm in results.arms:
        p_value = [results.p_value(arm)] if p_values else []
        measured = [results.measured(arm, results.metric), results.difference(arm), *p_value, results.verdict(arm)]
        costs = [results.ratio(arm, figure) for figure in (results.step_time, "peak_bytes")]
        rows.append([arm, metric, *measured, results.seeds(arm), *costs])
    return rows
