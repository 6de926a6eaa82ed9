"""The report's page: its sections as HTML, with the style and the charts inside, so that it needs no other file."""

import dataclasses
import html
import importlib.resources
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlm_jax import __version__
from mlm_jax.config import TASKS, to_dict
from mlm_jax.report.charts import Curve, chart
from mlm_jax.report.runs import Record, Run


def page(runs: Sequence[Run], lead: str = "") -> str:
    """The whole HTML document; `lead` is HTML that comes before all sections."""
    style = importlib.resources.files("mlm_jax.report").joinpath("page.css").read_text(encoding="utf-8")
    title = " · ".join(run.label for run in runs)
    work = dict.fromkeys(
        f"Fine-tuning on {run.cfg.task.train}"
        if run.cfg.objective in TASKS
        else f"Masked-language-model pre-training on {_source_of(run)}"
        for run in runs
    )
    sections = [lead, _headline(runs), _by_source(runs), _charts(runs), _probes(runs), _config(runs)]
    # The policy lets the page load nothing at all, from anywhere.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)} – mlm-jax</title>
<style>
{style}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p class="muted">{_text("; ".join(work))}</p>
{"".join(section for section in sections if section)}
<footer>Written by mlm-jax {__version__} from metrics.jsonl and config.json.</footer>
</body>
</html>
"""


def _headline(runs: Sequence[Run]) -> str:
    columns = ("", "held-out loss", "perplexity", "accuracy", "tokens seen", "tokens/s", "training time", "steps")
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = "".join(_headline_row(index, run) for index, run in enumerate(runs))
    notes = "".join(f'<p class="note">{note}</p>' for note in _notes(runs))
    table = f'<table class="headline"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<h2>Result</h2><div class="card scroll">{table}</div>{notes}'


def _source_of(run: Run) -> str:
    data = run.cfg.data
    return f"a mixture of {', '.join(source.name for source in data.sources)}" if data.sources else data.source


def _by_source(runs: Sequence[Run]) -> str:
    """Of mixtures, what the last evaluation measured of each source."""
    rows = []
    for index, run in enumerate(runs):
        measured = run.evals[-1].get("sources", {}) if run.evals else {}
        trained: Record = run.train[-1] if run.train else {}
        for name, values in measured.items():
            swatch = f'<span class="swatch" style="background:var(--run{index})"></span>'
            cells = [
                f'<td class="run">{swatch}{_text(name)}<small>{_text(run.label)}</small></td>',
                _cell(values["loss"], "{:.3f}", "unigram {:.3f}", values["unigram_loss"]),
                _cell(values["bits_per_byte"], "{:.3f}", "", None),
                _cell(values["accuracy"], "{:.1%}", "unigram {:.1%}", values["unigram_accuracy"]),
                _cell(trained.get("shares", {}).get(name), "{:.1%}", "", None),
                _cell(trained.get("epochs", {}).get(name), "{:.2f}", "", None),
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return ""
    columns = ("", "held-out loss", "bits per byte", "accuracy", "share of tokens, at last", "epochs")
    head = "".join(f"<th>{column}</th>" for column in columns)
    table = f'<table class="headline"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h2>By source</h2><div class="card scroll">{table}</div>'


def _headline_row(index: int, run: Run) -> str:
    model = run.cfg.model
    shape = f"{model.num_layers} layers of {model.embed_dim}, vocabulary {model.vocab_size:,}"
    swatch = f'<span class="swatch" style="background:var(--run{index})"></span>'
    cells = [f'<td class="run">{swatch}{_text(run.label)}<small>{shape}</small></td>']
    final: Record = run.evals[-1] if run.evals else {}
    baseline = final.get("unigram_loss")
    cells += [
        _cell(final.get("loss"), "{:.3f}", "unigram {:.3f}", baseline),
        _cell(final.get("perplexity"), "{:,.1f}", "unigram {:,.0f}", None if baseline is None else math.exp(baseline)),
        _cell(final.get("accuracy"), "{:.1%}", "unigram {:.1%}", final.get("unigram_accuracy")),
    ]
    tokens, seconds = run.tokens_and_seconds()
    cells += [
        _cell(tokens or None, _scaled, "rows {:.1%} full", run.median("fill_rate")),
        _cell(run.median("tokens_per_second"), _scaled, "MFU {:.1%}", run.median("mfu")),
        f"<td>{duration(seconds) if seconds else '–'}<small>without evaluation</small></td>",
    ]
    total = run.cfg.total_steps
    cells.append(f"<td>{run.last_step:,}<small>{'' if run.last_step >= total else 'so far, '}of {total:,}</small></td>")
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: float | None, form: str | Callable[[float], str], below: str, below_value: float | None) -> str:
    shown = "–" if value is None else form.format(value) if isinstance(form, str) else form(value)
    return f"<td>{shown}<small>{'' if below_value is None else below.format(below_value)}</small></td>"


def _notes(runs: Sequence[Run]) -> Iterable[str]:
    if not _share_text(runs):
        yield (
            "These runs differ in their text or tokenizer. Losses per token then have different units: compare each "
            "run with its own unigram baseline, not with the others."
        )
    for run in runs:
        skipped = sum(record.get("skipped") or 0 for record in run.train)
        if skipped:
            updates = "1 update was" if skipped == 1 else f"{skipped:,} updates were"
            yield f"{_text(run.label)}: {updates} skipped because the loss or gradient was not finite."
        if not run.evals:
            yield f"{_text(run.label)} has not been evaluated yet."


# Title, how values are scaled, the metric, and the baseline that evaluation measured for it.
_CHARTS = (
    ("Loss", "plain", "loss", "unigram_loss"),
    ("Accuracy on masked tokens", "percent", "accuracy", "unigram_accuracy"),
    ("Learning rate", "rate", "learning_rate", None),
    ("Throughput, tokens per second", "count", "tokens_per_second", None),
    ("Gradient norm", "log", "grad_norm", None),
)


# What every training line has, whatever the objective; the rest are the objective's own losses and metrics.
_COMMON = {"step", "kind", "loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_second", "fill_rate"}
_COMMON |= {"predicted", "skipped", "stage", "mfu", "shares", "epochs"}


def _own_charts(runs: Sequence[Run]) -> list[tuple[str, str, str, None]]:
    """A chart for each loss and metric that some run's objective alone has."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for record in run.train:
            for name in record.keys() - _COMMON:
                found.setdefault(name, []).extend([] if record[name] is None else [record[name]])
    forms = {name: "percent" if max(values, default=0.0) <= 1.0 else "plain" for name, values in found.items()}
    return [(name.replace("_", " ").capitalize(), forms[name], name, None) for name in sorted(found)]


def _share_text(runs: Sequence[Run]) -> bool:
    """Whether the runs' held-out tokens, and with them their baselines, are the same."""
    return len({(run.cfg.data, run.cfg.tokenizer) for run in runs}) == 1


def _charts(runs: Sequence[Run]) -> str:
    boundaries = sorted({step for run in runs for step in run.boundaries()})
    rows: dict[bool, list[str]] = {True: [], False: []}
    for title, form, metric, baseline in (*_CHARTS, *_own_charts(runs)):
        curves = [_curve(run.train, metric, index) for index, run in enumerate(runs)]
        if baseline:
            curves += _baselines(runs, baseline)
        if baseline or any(metric in record for run in runs for record in run.evals):
            curves += [_curve(run.evals, metric, index, "held_out") for index, run in enumerate(runs)]
        large = baseline is not None
        drawn = chart(title, curves, form=form, boundaries=boundaries, width_inches=5.6 if large else 3.7)
        if drawn:
            rows[large].append(f'<div class="card"><h3>{title}</h3>{drawn}</div>')
    grids = "".join(f'<div class="charts {"large" if large else ""}">{"".join(rows[large])}</div>' for large in rows)
    return f"<h2>Curves over steps</h2>{_legend(runs, boundaries)}{grids}"


def _curve(records: Sequence[Record], metric: str, run: int | None, kind: str = "train") -> Curve:
    return Curve([record["step"] for record in records], [record.get(metric) for record in records], run, kind)


def _baselines(runs: Sequence[Run], metric: str) -> list[Curve]:
    """One curve per run from its first step to its last, or a single neutral one where the runs share it."""
    curves = []
    for index, run in enumerate(runs):
        if run.evals:
            ends = [{**run.evals[0], "step": 0}, *run.evals, {**run.evals[-1], "step": run.last_step}]
            curves.append(_curve(ends, metric, index, "baseline"))
    if curves and _share_text(runs):
        return [dataclasses.replace(max(curves, key=lambda curve: curve.steps[-1]), run=None)]
    return curves


def _legend(runs: Sequence[Run], boundaries: Sequence[int]) -> str:
    several = len(runs) > 1
    names = [
        f'<span class="swatch" style="background:var(--run{i})"></span>{_text(run.label)}' for i, run in enumerate(runs)
    ]
    color = "var(--muted)" if several else "var(--run0)"
    lines = [(f'<path d="M0 5H28" stroke="{color}" stroke-width="1.3" stroke-opacity=".6"/>', "training batches")]
    if any(run.evals for run in runs):
        dot = f'<circle cx="14" cy="5" r="2.8" fill="{color}"/>'
        dashes = '<path d="M0 5H28" stroke="var(--baseline)" stroke-width="1.6" stroke-dasharray="5 3.5"/>'
        lines.append((f'<path d="M0 5H28" stroke="{color}" stroke-width="2.4"/>{dot}', "held-out text"))
        lines.append((dashes, "unigram baseline"))
    if boundaries:
        lines.append(('<path d="M14 0V10" stroke="var(--grid)" stroke-width="2.5"/>', "next stage"))
    keys = [f'<svg viewBox="0 0 28 10" aria-hidden="true">{line}</svg>{name}' for line, name in lines]
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in (names if several else []) + keys)}</ul>'


def _probes(runs: Sequence[Run]) -> str:
    texts = list(dict.fromkeys(probe["text"] for run in runs for record in run.evals for probe in record.get("probes", ())))
    if not texts:
        return ""
    cards = "".join(_probe(text, runs) for text in texts)
    return f'<h2>Filled masks over training</h2><div class="probes">{cards}</div>'


def _probe(text: str, runs: Sequence[Run]) -> str:
    tables = []
    for index, run in enumerate(runs):
        filled = [(record["step"], probe["fills"]) for record, probe in run.probes() if probe["text"] == text]
        if filled:
            name = f'<span class="swatch" style="background:var(--run{index})"></span>{_text(run.label)}'
            table = _fill_table(_spread(filled, 8 if len(runs) == 1 else 5))
            tables.append(f"<div>{name if len(runs) > 1 else ''}{table}</div>")
    shown = _text(text).replace("[MASK]", "<b>[MASK]</b>")
    return f'<div class="card probe"><h3>{shown}</h3><div class="runs">{"".join(tables)}</div></div>'


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """The first, the last and evenly spaced ones between, `most` at most."""
    count = min(len(rows), most)
    return [rows[round(index * (len(rows) - 1) / max(count - 1, 1))] for index in range(count)]


def _fill_table(rows: Sequence[tuple[int, Sequence[Sequence[Record]]]]) -> str:
    masks = max(len(fills) for _, fills in rows)
    head = "".join(f"<th>{f'mask {mask + 1}' if masks > 1 else ''}</th>" for mask in range(masks))
    body = "".join(
        f'<tr><td class="step">{step:,}</td>{"".join(_fill_cell(mask[:3]) for mask in fills)}</tr>' for step, fills in rows
    )
    return f'<table><tr><th class="step">step</th>{head}</tr>{body}</table>'


def _fill_cell(mask: Sequence[Record]) -> str:
    fills = (
        f'<span class="fill" style="--p:{fill["probability"]:.3f}">{_fill(fill)} <i>{fill["probability"]:.0%}</i></span>'
        for fill in mask
    )
    return f"<td>{''.join(fills)}</td>"


def _fill(fill: Record) -> str:
    """As `fill_mask.shown`, with what is not text set apart."""
    if not fill["token"].strip():
        return "<s>space</s>"
    return f"{'' if fill.get('begins_word', True) else '<s>-</s>'}{_text(fill['token'])}"


def _config(runs: Sequence[Run]) -> str:
    flat = [dict(_flatten(to_dict(run.cfg))) for run in runs]
    paths = list(dict.fromkeys(path for fields in flat for path in fields))
    differing = [path for path in paths if len({fields.get(path, "") for fields in flat}) > 1]
    shared: dict[str, list[tuple[str, str]]] = {}
    for path in paths:
        if path not in differing:
            section, _, name = path.rpartition(".")
            shared.setdefault(section or "run", []).append((name, flat[0][path]))
    sections = "".join(_config_section(section, fields) for section, fields in shared.items())
    if len(runs) == 1:
        return f'<h2>Configuration</h2><div class="card config">{sections}</div>'
    table = _differences(runs, flat, differing) if differing else "<p>These runs have the same configuration.</p>"
    rest = f'<details><summary>What they share</summary><div class="config">{sections}</div></details>'
    return f'<h2>Configuration</h2><div class="card"><div class="scroll">{table}</div>{rest}</div>'


def _differences(runs: Sequence[Run], flat: Sequence[dict[str, str]], paths: Sequence[str]) -> str:
    names = "".join(
        f'<th><span class="swatch" style="background:var(--run{index})"></span>{_text(run.label)}</th>'
        for index, run in enumerate(runs)
    )
    rows = ""
    for path in paths:
        values = [fields.get(path, "–") for fields in flat]
        cells = "".join(f"<td{' class=changed' if value != values[0] else ''}>{_text(value)}</td>" for value in values)
        rows += f"<tr><td>{path}</td>{cells}</tr>"
    return f'<table class="differences"><thead><tr><th>what differs</th>{names}</tr></thead><tbody>{rows}</tbody></table>'


def _config_section(section: str, fields: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in fields)
    return f"<section><h3>{section}</h3><dl>{rows}</dl></section>"


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{path}[{index}]")
    else:
        yield path, value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _scaled(value: float) -> str:
    """A count as people say it: 81.3M, 41.2k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time as people say it: 1 h 05 min, 2 min 08 s, 41 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _text(text: str) -> str:
    return html.escape(text)
