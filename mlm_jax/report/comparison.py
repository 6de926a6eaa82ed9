"""The page of a comparison: its table, in text and in HTML, before the report of the runs."""

import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mlm_jax.report import write_report
from mlm_jax.report.page import duration

Table = Mapping[str, Any]
HEAD = (
    "",
    "held-out loss",
    "accuracy",
    "minimal pairs",
    "tokens/s",
    "FLOPs",
    "steps",
    "memory",
    "wall time",
    "own measures",
)


def write_comparison(table: Table, workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Writes the page of the runs that have been trained."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells(table))
    failed = "".join(f'<p class="note">{html.escape(text)}</p>' for text in failures(table))
    lead = f'<table class="differences"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    note = f'<p class="note">{html.escape(caption(table))}</p>'
    write_report(workdirs, out, lead=f'<h2>Comparison</h2><div class="card scroll">{lead}</div>{failed}{note}')


def format_comparison(table: Table) -> str:
    """The same as text."""
    rows = [list(HEAD), *cells(table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)] + [0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *failures(table), caption(table)])


def caption(table: Table) -> str:
    """How the table is to be read."""
    budget = ", ".join(f"{value:g} {kind.replace('flops', 'FLOPs')}" for kind, value in table["budget"].items())
    return (
        f"Budget of each run: {budget}. Loss (nats) and accuracy are of the same held-out tokens under the same masks, each "
        "predicted from all others. Own measures are of one objective and compare runs of that objective alone. Wall time "
        "has start, compilation and evaluations in it."
    )


def failures(table: Table) -> list[str]:
    """A sentence for each run that failed."""
    return [f"{name}: {row['error']}" for name, row in table["runs"].items() if "error" in row]


def cells(table: Table) -> list[list[str]]:
    """The table's lines, the baseline last."""
    measured = {name: row for name, row in table["runs"].items() if "loss" in row}
    lines = [
        [
            name,
            f"{row['loss']:.3f}",
            f"{row['accuracy']:.1%}",
            "–" if row["pairs"] is None else f"{row['pairs']:.1%}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops']:.3g}",
            f"{row['steps']:,}",
            f"{row['memory_bytes'] / 1e9:.2f} GB",
            duration(row["wall_seconds"]),
            ", ".join(f"{measure.replace('_', ' ')} {value:.3f}" for measure, value in row["own"].items()),
        ]
        for name, row in measured.items()
    ]
    for row in [*measured.values()][:1]:
        lines.append(["unigram", f"{row['unigram_loss']:.3f}", f"{row['unigram_accuracy']:.1%}", *[""] * (len(HEAD) - 3)])
    return lines
