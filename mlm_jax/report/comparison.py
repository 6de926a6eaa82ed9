"""The page of a comparison: its table, in text and in HTML, before the report of the runs."""

import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mlm_jax.config import Config
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
    "ms/step",
    "memory",
    "wall time",
    "own measures",
)


def write_comparison(table: Table, workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Writes the page of the runs that have been trained."""
    write_report(workdirs, out, lead=lead(table))


def lead(table: Table) -> str:
    """What stands before the report of the runs, in HTML."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells(table))
    lines = f'<table class="differences"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    notes = "".join(f'<p class="note">{html.escape(text)}</p>' for text in notes_of(table))
    return f'<h2>Comparison</h2><div class="card scroll">{lines}</div>{notes}'


def format_comparison(table: Table) -> str:
    """The same as text."""
    rows = [list(HEAD), *cells(table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)] + [0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *notes_of(table)])


def notes_of(table: Table) -> list[str]:
    """What stands below the table: what failed, how it is to be read, and whose figures a run's are."""
    told: dict[str, list[str]] = {}
    for name, row in table["runs"].items():
        if row.get("figures"):
            told.setdefault(row["figures"], []).append(name)
    return [*failures(table), caption(table), *(f"{', '.join(names)}: {text}" for text, names in told.items())]


def caption(table: Table) -> str:
    """How the table is to be read."""
    budget = ", ".join(f"{value:g} {kind.replace('flops', 'FLOPs')}" for kind, value in table["budget"].items())
    return (
        f"Budget of each run: {budget}. Loss (nats) and accuracy are of the same held-out tokens under the same masks, each "
        "predicted from all others where no sentence below says otherwise. Own measures are of one objective and compare "
        "runs of that objective alone. Steps × ms/step is the time of training steps; wall time has start, compilation and "
        "evaluations in it too."
    )


def figures_of(cfg: Config) -> str:
    """Whose a run's common figures are, where that is not plain; else nothing."""
    share = cfg.hybrid.causal_share
    if cfg.objective == "rtd":
        return (
            f"loss, accuracy and minimal pairs are the generator's, a network of {cfg.rtd.generator_size:g} of the width; "
            "the discriminator's figures are among the own measures."
        )
    if cfg.objective == "diffusion":
        return "saw no 80/10/10 masks in training, which loss and accuracy are under: judge it by its bound, an own measure."
    if cfg.objective == "hybrid" and share == 1:
        return "loss, accuracy and minimal pairs are of tokens predicted from those before them alone."
    if cfg.objective == "hybrid" and share:
        return f"{share:.3g} of its rows in training were predicted from the left only, the others as the figures are."
    return ""


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
            f"{1e3 * row['step_seconds'] / row['steps']:,.1f}",
            f"{row['memory_bytes'] / 1e9:.2f} GB",
            duration(row["wall_seconds"]),
            ", ".join(f"{measure.replace('_', ' ')} {value:.3f}" for measure, value in row["own"].items()),
        ]
        for name, row in measured.items()
    ]
    for row in [*measured.values()][:1]:
        lines.append(["unigram", f"{row['unigram_loss']:.3f}", f"{row['unigram_accuracy']:.1%}", *[""] * (len(HEAD) - 3)])
    return lines
