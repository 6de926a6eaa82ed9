"""bench, compare, compile and report."""

import argparse
import json
import logging
import os
from typing import TYPE_CHECKING

from mlm_jax.errors import UserError, fail
from mlm_jax.verbs.options import Result, Verbs, config_option, device_errors

if TYPE_CHECKING:
    from mlm_jax.config import Config

logger = logging.getLogger(__name__)


def _declare_bench(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
    parser.add_argument("--stage", type=int, default=0, help="which of the config's stages, counted from 0 (default 0)")
    parser.add_argument("--steps", type=int, default=20, help="steps in a round (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, whose median is reported (default 5)")
    parser.add_argument("--batch-size", type=int, help="rows in a global step; default: the stage's")
    parser.add_argument("--seq-len", type=int, help="tokens in a row; default: the stage's")
    parser.add_argument("--data", metavar="DIR", help="a prepared corpus: its rows and its loader; default: random rows")
    parser.add_argument("--peer", metavar="NAME", help="compare with hf: BertForMaskedLM and AdamW, of the extra peers")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="other recipes, round by round; --config.section.field=value overrides a field in all",
    )


def _bench(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.config import load_config

    for name in ("batch_size", "seq_len"):
        if getattr(options, name) is not None:
            overrides = [*overrides, f"stages[{options.stage}].{name}={getattr(options, name)}"]
    # Before JAX is imported: a mistake is told at once.
    cfg, *against = (load_config(path, overrides) for path in (options.config, *options.against))
    from mlm_jax.bench import run_bench
    from mlm_jax.bench.table import format_table

    with device_errors():
        result = run_bench(
            cfg,
            stage_index=options.stage,
            steps=options.steps,
            rounds=options.rounds,
            peer=options.peer,
            against=against,
            data_dir=options.data,
        )
    print(format_table(result))
    return result


def _declare_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--configs",
        dest="config",
        required=True,
        nargs="+",
        metavar="FILE",
        help="recipes, as configs/compare_mini.py:span; --config.section.field=value overrides a field in all",
    )
    parser.add_argument("--budget-flops", type=float, metavar="F", help="floating-point operations for each")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="minutes of training steps for each")
    parser.add_argument("--out", required=True, metavar="DIR", help="a workdir for each, and compare.html")
    parser.add_argument("--data", metavar="DIR", help="a prepared corpus; default: made in DIR/data")
    parser.add_argument(
        "--blimp", nargs="+", default=[], metavar="GLOB", help="minimal pairs, as `score --pairs`, or folders"
    )


def _compare(options: argparse.Namespace, overrides: list[str]) -> Result | int:
    from mlm_jax.compare import Interrupted, compare
    from mlm_jax.report.comparison import failures, format_comparison

    try:
        table = compare(
            options.config,
            overrides,
            options.out,
            budget_flops=options.budget_flops,
            budget_minutes=options.budget_minutes,
            data_dir=options.data,
            pairs=options.blimp,
        )
    except Interrupted as stop:
        return fail(128 + stop.number, str(stop))
    print(format_comparison(table))
    failed = failures(table)
    if failed:
        if options.json:
            print(json.dumps(table))
        return fail(1, f"{len(failed)} of {len(table['runs'])} failed: {'; '.join(failed)}")
    return table


def _declare_compile(parser: argparse.ArgumentParser) -> None:
    recipes = parser.add_mutually_exclusive_group(required=True)
    recipes.add_argument("--config", metavar="FILE", help="a recipe; override with --config.section.field=value")
    recipes.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help="recipes: every stage, or --stage, as a line of a Markdown table; those without a topology are left out",
    )
    parser.add_argument(
        "--topology",
        action="append",
        default=[],
        metavar="NAME",
        help="as v5e:16x16, 2x v5e:16x16 for two slices, or h200:1x8; default: the recipe's reference_topology; "
        "with --table it may be given several times",
    )
    parser.add_argument("--slices", type=int, default=1, help="so many slices of the topology (default 1)")
    parser.add_argument("--stage", type=int, help="which stage, counted from 0 (default 0; of --table, all)")
    parser.add_argument("--rows-per-device", type=int, help="of a micro-batch, in place of the stage's global batch")
    parser.add_argument("--plan", action="store_true", help="compile other layouts as well and name the best one")
    parser.add_argument("--max-candidates", type=int, default=6, help="how many of them (default 6); minutes each")


def _compile(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.compile.topology import ENVIRONMENT

    recipes = _load_recipes(options.table or [options.config], overrides)
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    from mlm_jax.compile.run import run_compile, run_table
    from mlm_jax.compile.table import TABLE_HEAD, format_plan, format_result, format_row

    if options.table:
        if options.plan or options.slices > 1:
            raise UserError("--table covers recipes as they are; leave out --plan and --slices")
        print(TABLE_HEAD, flush=True)
        rows = []
        for row in run_table(recipes, options.topology, options.stage, rows_per_device=options.rows_per_device):
            print(format_row(row), flush=True)
            rows.append(row)
        if all("reason" in row for row in rows):
            raise UserError(
                rows[0]["reason"] if rows else "none of these recipes names a reference_topology: give --topology"
            )
        return {"rows": rows}
    if len(options.topology) > 1:
        raise UserError("--topology was given several times: only --table takes more than one")
    if options.plan and options.max_candidates < 1:
        raise UserError(f"--max-candidates={options.max_candidates} must be positive")
    result = run_compile(
        recipes[0],
        *options.topology,
        stage_index=options.stage or 0,
        slices=options.slices,
        rows_per_device=options.rows_per_device,
        max_candidates=options.max_candidates if options.plan else 0,
    )
    print(format_plan(result) if options.plan else format_result(result))
    return result


def _load_recipes(paths: list[str], overrides: list[str]) -> "list[Config]":
    """Those that can be compiled: of several files, others (a task's, or one with variants) are left out with a word."""
    from mlm_jax.config import load_config

    found, errors = [], []
    for path in paths:
        try:
            found.append(load_config(path, overrides))
        except UserError as error:
            logger.warning("left out: %s", error)
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _declare_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR", help="one or more runs, side by side")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first workdir")


def _report(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.report import write_report

    out = options.out or os.path.join(options.workdir[0], "report.html")
    write_report(options.workdir, out)
    print(out)
    return {"report": out}


VERBS: Verbs = {
    "bench": (
        "speed, memory and time by operation of a step, also beside other recipes or a peer",
        _declare_bench,
        _bench,
    ),
    "compare": ("train several configs on one corpus under one budget, for one table and page", _declare_compare, _compare),
    "compile": ("memory, collectives and estimated speed of a step on a TPU that is not here", _declare_compile, _compile),
    "report": ("one HTML page of one or more runs", _declare_report, _report),
}
