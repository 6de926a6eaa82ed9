"""The verbs of the command line: what each takes, and the module that does the work, imported only when the verb runs."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from mlm_jax.errors import MachineError, UserError, fail, tell_any

Result = dict[str, Any] | None


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a recipe, as configs/smoke.py or configs/compare_mini.py:span; override with --config.section.field=value",
    )


def _workdir_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a trained run's directory")


def _declare_prepare(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the tokenizer and the packed corpus go")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")


def _prepare(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.config import load_config
    from mlm_jax.data.prepare import prepare

    manifest = prepare(load_config(options.config, overrides), options.out, options.workers).manifest
    print(f"{'split':12}{'documents':>12}{'words':>14}{'tokens':>14}")
    for name, part in manifest.get("sources", {"": manifest}).items():
        for split, words in part.get("words", {}).items():  # a corpus of an older version counts none
            print(f"{split:12}{part['documents'][split]:12,}{words:14,}{part['tokens'][split]:14,}  {name}".rstrip())
    return dict(manifest)


def _declare_train(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run's directory; an interrupted run continues there"
    )
    parser.add_argument("--data", metavar="DIR", help="a prepared corpus, made when missing; default: data/ in the workdir")
    parser.add_argument("--workers", type=int, help="processes for preparation; default: one a core")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps into the workdir's profile/")
    several = parser.add_argument_group(
        "several processes",
        "One run over many hosts: start the same command on each. Under srun, mpirun and on TPU slices nothing more is "
        "needed; elsewhere give these, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port there")
    several.add_argument("--num-processes", type=int, metavar="N", help="how many take part")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 to N - 1")
    several.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="insist that the environment describes the processes, or that this one is alone",
    )
    several.add_argument(
        "--coordinator-timeout", type=float, default=300.0, metavar="SECONDS", help="to wait for the others (default 300)"
    )


def _train(options: argparse.Namespace, overrides: list[str]) -> Result | int:
    from mlm_jax import distributed
    from mlm_jax.config import load_config

    cfg = load_config(options.config, overrides)  # before JAX is imported: a mistake is told at once
    steps = _profiled_steps(options.profile)
    cluster = distributed.find_cluster(
        os.environ,
        coordinator=options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
        wanted=options.distributed,
    )
    peers = distributed.join(cluster, cfg, options.workdir, options.coordinator_timeout) if cluster else distributed.Peers()
    with peers.ending_at_once(tell_any), _device_errors():
        from mlm_jax.train import loop, pretraining
        from mlm_jax.train.writer import read_metrics

        peers.initialize_jax()
        profile = loop.Profile(*steps) if steps else None
        try:
            pretraining.train(
                cfg, options.workdir, data_dir=options.data, workers=options.workers, profile=profile, peers=peers
            )
        except loop.Stop as stop:
            return fail(
                128 + stop.signal_number,
                f"stopped by signal {stop.signal_number}; step {stop.step} is saved, the same command continues",
            )
    if not peers.is_primary:
        return None
    measured = [record for record in read_metrics(options.workdir)[0] if record["kind"] == "eval"][-1]
    return {"workdir": str(options.workdir), **{k: v for k, v in measured.items() if k not in ("kind", "probes")}}


def _profiled_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, separator, last = text.partition(":")
    if not (separator and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile={text} is not FIRST:LAST, two steps like 20:22")
    return int(first), int(last)


def _declare_evaluate(parser: argparse.ArgumentParser) -> None:
    _workdir_option(parser)
    parser.add_argument(
        "--source", metavar="URI", help="other text than the run's held-out rows: files:…, tfds:…, builtin:…"
    )
    parser.add_argument("--seq-len", type=int, help="row length; default: the last stage's")


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> Result:
    import jax

    from mlm_jax.inference import open_run, pack_source
    from mlm_jax.train.evaluate import COMMON, HeldOut, evaluate_sources, make_eval_step
    from mlm_jax.train.feed import token_bytes, vocab_tables

    with _device_errors(), open_run(options.workdir) as run:
        cfg = run.cfg
        seq_len = options.seq_len or cfg.stages[-1].seq_len
        if not 8 <= seq_len <= cfg.model.max_positions:
            raise UserError(f"--seq-len={seq_len} must lie between 8 and the model's {cfg.model.max_positions} positions")
        names = ("",) if options.source else tuple(source.name for source in cfg.data.sources) or ("",)
        held_out = {
            name: HeldOut(
                pack_source(run, options.source, seq_len) if options.source else run.workdir.read_validation(seq_len, name),
                jax.device_put(run.workdir.log_unigrams(cfg.model.vocab_size, name), jax.P()),
            )
            for name in names
        }
        bytes_V = jax.device_put(token_bytes(run.tokenizer, cfg.model.vocab_size), jax.P())
        vocab = vocab_tables(cfg, run.tokenizer, run.workdir.read_ngrams())
        step = make_eval_step(cfg, run.objective)
        found = evaluate_sources(step, run.params, held_out, vocab, bytes_V, cfg.evaluation.batch_size)
    rows = sum(len(one.rows["tokens"]) for one in held_out.values())
    print(f"step {run.step}, {found['tokens']} masked tokens of {rows} rows of {seq_len}")
    print(f"{'':12}{'loss':>10}{'accuracy':>10}{'perplexity':>12}{'bits/byte':>12}")
    print(_measured("model", found))
    print(f"{'unigram':12}{found['unigram_loss']:10.4f}{found['unigram_accuracy']:10.4f}")
    for name, values in found.get("sources", {}).items():
        print(_measured(name, values))
        print(f"{'  unigram':12}{values['unigram_loss']:10.4f}{values['unigram_accuracy']:10.4f}")
    own = {name: value for name, value in found.items() if name not in COMMON}
    for name, value in own.items():
        print(f"{name:12}{value:10.4f}")
    if not math.isfinite(found["loss"]):
        raise MachineError(f"the loss is not finite: the parameters of step {run.step} are those of a run that diverged")
    return {"step": run.step, "seq_len": seq_len, **found}


def _measured(name: str, values: dict[str, Any]) -> str:
    loss, accuracy, perplexity = (values[key] for key in ("loss", "accuracy", "perplexity"))
    return f"{name:12}{loss:10.4f}{accuracy:10.4f}{perplexity:12.2f}{values['bits_per_byte']:12.4f}"


def _declare_fill_mask(parser: argparse.ArgumentParser) -> None:
    _workdir_option(parser)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="with one or more [MASK]")
    parser.add_argument("--top-k", type=int, default=5, help="candidates per mask (default 5)")


def _fill_mask(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.fill_mask import Filler, shown
    from mlm_jax.inference import open_run

    with _device_errors(), open_run(options.workdir) as run:
        fills = Filler(run.objective, run.tokenizer)(run.params, options.texts, top_k=options.top_k)
    for text, masks in zip(options.texts, fills, strict=True):
        print(text)
        for number, candidates in enumerate(masks, 1):
            print(f"  [MASK] {number}:", "  ".join(f"{shown(c)} {c['probability']:.3f}" for c in candidates))
    return {"step": run.step, "fills": [{"text": t, "masks": f} for t, f in zip(options.texts, fills, strict=True)]}


def _declare_generate(parser: argparse.ArgumentParser) -> None:
    _workdir_option(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text with blanks: [MASK], or [MASK:20] for twenty")
    parser.add_argument("--length", type=int, default=0, help="blanks after the prompt (default 64 if it has none, else 0)")
    parser.add_argument("--steps", type=int, default=0, help="calls of the model (default: one a blank)")
    parser.add_argument("--method", help="confidence, ancestral or causal; default: what the run was trained for")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--block-size", type=int, default=0, help="blanks filled before the next are begun (default: all)")
    parser.add_argument("--count", type=int, default=1, help="samples (default 1)")
    parser.add_argument("--seed", type=int, default=0)


def _generate(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.generate import Generator, Sampling, default_method, untrained_for
    from mlm_jax.inference import open_run

    with _device_errors(), open_run(options.workdir) as run:
        names = ("steps", "temperature", "block_size", "count", "seed")
        method = options.method or default_method(run.objective)
        sampling = Sampling(method, **{name: getattr(options, name) for name in names})
        caution = untrained_for(run.cfg, method)
        if caution:
            print(f"mlm-jax: {caution}", file=sys.stderr)
        samples = Generator(run.objective, run.tokenizer)(run.params, options.prompt, sampling, length=options.length)
    for number, text in enumerate(samples, 1):
        print(*([f"--- {number}"] if len(samples) > 1 else []), text, sep="\n")
    return {"step": run.step, **dataclasses.asdict(sampling), "caution": caution, "samples": samples}


def _declare_score(parser: argparse.ArgumentParser) -> None:
    _workdir_option(parser)
    parser.add_argument(
        "--pairs",
        required=True,
        metavar="GLOB",
        help="JSONL files with sentence_good and sentence_bad (BLiMP's format)",
    )
    parser.add_argument("--method", default="pll", help="pll (default) or word_l2r")
    parser.add_argument("--batch-size", type=int, default=256, help="masked copies at a time (default 256)")


def _score(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.inference import open_run
    from mlm_jax.score import PseudoLikelihood, pair_accuracy, read_pairs, standard_error

    if options.batch_size < 1:
        raise UserError(f"--batch-size={options.batch_size} must be positive")
    sets = read_pairs(options.pairs)
    accuracies = {}
    with _device_errors(), open_run(options.workdir) as run:
        scorer = PseudoLikelihood(run, method=options.method, batch_size=options.batch_size)
        print(f"{'set':44}{'pairs':>7}{'accuracy':>10}{'± s.e.':>8}")
        for name, pairs in sets.items():
            accuracies[name] = pair_accuracy(scorer, pairs)
            error = standard_error(accuracies[name], len(pairs))
            print(f"{name:44}{len(pairs):7}{accuracies[name]:10.3f}{error:8.3f}", flush=True)
    mean = sum(accuracies.values()) / len(accuracies)
    print(f"{'mean of the sets':44}{sum(map(len, sets.values())):7}{mean:10.3f}")
    return {"step": run.step, "method": options.method, "accuracy": accuracies, "mean": mean}


def _declare_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR", help="one or more runs, side by side")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first workdir")


def _report(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.report import write_report

    out = options.out or os.path.join(options.workdir[0], "report.html")
    write_report(options.workdir, out)
    print(out)
    return {"report": out}


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


def _declare_finetune(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run's directory; an interrupted run continues there"
    )
    parser.add_argument("--init", metavar="RUN", help="the workdir that it begins with, pre-trained or imported")
    parser.add_argument("--random-init", action="store_true", help="only its architecture and tokenizer, to compare with")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, in seed0, seed1, … of the workdir (default 1)")


def _finetune(options: argparse.Namespace, overrides: list[str]) -> Result | int:
    from mlm_jax.config import load_config

    overrides = [*overrides, *([f"init_from={options.init}"] if options.init else [])]
    overrides += ["task.random_init=True"] if options.random_init else []
    cfg = load_config(options.config, overrides, for_task=True)  # before JAX is imported: a mistake is told at once
    with _device_errors():
        from mlm_jax.finetune.job import finetune, format_result
        from mlm_jax.train import loop

        try:
            result = finetune(cfg, options.workdir, seeds=options.seeds)
        except loop.Stop as stop:
            return fail(
                128 + stop.signal_number,
                f"stopped by signal {stop.signal_number}; step {stop.step} is saved, the same command continues",
            )
    print(format_result(result))
    return result


def _declare_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a fine-tuned run's directory")
    parser.add_argument("--input", required=True, metavar="FILE", help="examples in the form of the run's training file")
    parser.add_argument("--output", metavar="FILE", help="JSONL, a prediction a line; default: they are printed")
    parser.add_argument("--batch-size", type=int, help="rows at a time; default: the config's evaluation.batch_size")


def _predict(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.finetune.predict import predict, write_jsonl

    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size={options.batch_size} must be positive")
    with _device_errors():
        found, measures, step = predict(options.workdir, options.input, batch_size=options.batch_size)
    if options.output:
        write_jsonl(options.output, found)
    elif not options.json:
        for prediction in found:
            print(json.dumps(prediction, ensure_ascii=False))
    for name, value in measures.items():
        print(f"{name} {value:.4f}", file=sys.stdout if options.output else sys.stderr)
    return {"step": step, "examples": len(found), **measures}


def _embedder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pooling", default="mean", help="mean of the tokens (default), or cls, the first one")
    parser.add_argument(
        "--max-length", type=int, default=0, help="tokens of a text (default: the model's positions, up to 512)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="texts at a time (default 64)")


def _declare_embed(parser: argparse.ArgumentParser) -> None:
    _workdir_option(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help=".txt (a text a line), .jsonl, .tsv, .csv, .parquet")
    parser.add_argument("--output", required=True, metavar="FILE", help="X.npy or X.parquet, a vector a text")
    parser.add_argument("--column", default="text", help="of the text (default: text)")
    _embedder_options(parser)


def _embed(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.finetune.embed import Embedder, read_texts, write_vectors

    if not options.output.endswith((".npy", ".parquet")):
        raise UserError(f"--output={options.output} must end in .npy or .parquet")
    with _device_errors():
        embedder = _make_embedder(options, Embedder)
        vectors = embedder(read_texts(options.input, options.column))
    write_vectors(options.output, vectors)
    print(f"{options.output}: {vectors.shape[0]} vectors of {vectors.shape[1]}, step {embedder.step}")
    return {"step": embedder.step, "texts": vectors.shape[0], "dimensions": vectors.shape[1]}


def _make_embedder(options: argparse.Namespace, make: Any) -> Any:
    return make(options.workdir, pooling=options.pooling, max_length=options.max_length, batch_size=options.batch_size)


def _declare_probe(parser: argparse.ArgumentParser) -> None:
    _workdir_option(parser)
    _config_option(parser)
    parser.add_argument("--max-examples", type=int, default=5000, help="to fit on, the first ones (default 5000)")
    _embedder_options(parser)


def _probe(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.config import load_config

    cfg = load_config(options.config, overrides, for_task=True)
    if options.max_examples < 2:
        raise UserError(f"--max-examples={options.max_examples} must be 2 or more")
    from mlm_jax.finetune.embed import Embedder, probe

    with _device_errors():
        result = probe(cfg, _make_embedder(options, Embedder), max_examples=options.max_examples)
    print(f"{result['examples']} examples, {result['dev_examples']} to measure on")
    print(f"{'':12}{'accuracy':>10}{'f1':>10}{'matthews':>10}")
    for name in ("majority", "neighbours", "logistic"):
        print(f"{name:12}" + "".join(f"{result[name][measure]:10.4f}" for measure in ("accuracy", "f1", "matthews")))
    return result


def _declare_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="FOLDER", help="of Hugging Face's format")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--generator", metavar="FOLDER", help="for a detector of replaced tokens: its generator's folder")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="draw what is not there: the head of a bare encoder, the generator of a detector",
    )


def _import(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.interop.load import import_folder

    result = import_folder(options.source, options.workdir, generator=options.generator, fresh=options.fresh)
    print(
        f"{result['workdir']}: {result['model_type']}, {result['parameters']:,} parameters, objective {result['objective']}"
    )
    print(f"to continue its pre-training: mlm-jax train --config {result['recipe']} --workdir DIR")
    return result


def _declare_export(parser: argparse.ArgumentParser) -> None:
    _workdir_option(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, as `transformers` loads it")
    parser.add_argument("--network", help="of replaced-token detection: discriminator (default) or generator")
    parser.add_argument("--model-type", metavar="NAME", help="bert, roberta, xlm-roberta or electra; default: what fits")


def _export(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.interop.save import export_run

    result = export_run(options.workdir, options.out, network=options.network, model_type=options.model_type)
    print(f"{result['out']}: {result['class']}, {result['parameters']:,} parameters of step {result['step']}")
    if result["note"]:
        print(f"mlm-jax: {result['note']}", file=sys.stderr)
    return result


def _declare_bench(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument("--stage", type=int, default=0, help="which of the config's stages, counted from 0 (default 0)")
    parser.add_argument("--steps", type=int, default=20, help="steps in a round (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, whose median is reported (default 5)")
    parser.add_argument("--batch-size", type=int, help="rows in a global step; default: the stage's")
    parser.add_argument("--seq-len", type=int, help="tokens in a row; default: the stage's")
    parser.add_argument("--data", metavar="DIR", help="a prepared corpus: its rows and its loader; default: random rows")
    parser.add_argument("--peer", metavar="NAME", help="compare with hf: BertForMaskedLM and AdamW, of mlm-jax[peers]")


def _bench(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.config import load_config

    for name in ("batch_size", "seq_len"):
        if getattr(options, name) is not None:
            overrides = [*overrides, f"stages[{options.stage}].{name}={getattr(options, name)}"]
    cfg = load_config(options.config, overrides)  # before JAX is imported: a mistake is told at once
    from mlm_jax.bench import run_bench
    from mlm_jax.bench.table import format_table

    with _device_errors():
        result = run_bench(
            cfg,
            stage_index=options.stage,
            steps=options.steps,
            rounds=options.rounds,
            peer=options.peer,
            data_dir=options.data,
        )
    print(format_table(result))
    return result


def _declare_compile(parser: argparse.ArgumentParser) -> None:
    recipes = parser.add_mutually_exclusive_group(required=True)
    recipes.add_argument("--config", metavar="FILE", help="a recipe; override with --config.section.field=value")
    recipes.add_argument("--table", nargs="+", metavar="FILE", help="recipes: every stage as a line of a Markdown table")
    parser.add_argument(
        "--topology",
        action="append",
        default=[],
        metavar="NAME",
        help="as v5e:16x16, 2x v5e:16x16 for two slices, or h200:1x8; default: the recipe's reference_topology; "
        "with --table it may be given several times",
    )
    parser.add_argument("--slices", type=int, default=1, help="so many slices of the topology (default 1)")
    parser.add_argument("--stage", type=int, default=0, help="which of the config's stages, counted from 0 (default 0)")
    parser.add_argument("--rows-per-device", type=int, help="of a micro-batch, in place of the stage's global batch")
    parser.add_argument("--plan", action="store_true", help="compile other layouts as well and name the best one")
    parser.add_argument("--max-candidates", type=int, default=6, help="how many of them (default 6); minutes each")


def _compile(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.compile.topology import ENVIRONMENT
    from mlm_jax.config import load_config

    recipes = [load_config(path, overrides) for path in options.table or [options.config]]
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    from mlm_jax.compile.run import run_compile, run_table
    from mlm_jax.compile.table import TABLE_HEAD, format_plan, format_result, format_row

    if options.table:
        if options.plan or options.stage or options.slices > 1:
            raise UserError("--table covers every stage as it is; leave out --plan, --stage and --slices")
        print(TABLE_HEAD, flush=True)
        rows = []
        for row in run_table(recipes, options.topology, rows_per_device=options.rows_per_device):
            print(format_row(row), flush=True)
            rows.append(row)
        return {"rows": rows}
    if len(options.topology) > 1:
        raise UserError("--topology was given several times: only --table takes more than one")
    if options.plan and options.max_candidates < 1:
        raise UserError(f"--max-candidates={options.max_candidates} must be positive")
    result = run_compile(
        recipes[0],
        *options.topology,
        stage_index=options.stage,
        slices=options.slices,
        rows_per_device=options.rows_per_device,
        max_candidates=options.max_candidates if options.plan else 0,
    )
    print(format_plan(result) if options.plan else format_result(result))
    return result


@contextlib.contextmanager
def _device_errors() -> Any:
    """Tells a device's lack of memory in one message; any other error of the runtime stays a traceback."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MachineError(
            f"the device is out of memory: {str(error).splitlines()[0][:300]}. Try more stages[…].accumulation, "
            "compute.remat=dots, a smaller batch, or sharding.fsdp"
        ) from error


Declare = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace, list[str]], Any]
VERBS: dict[str, tuple[str, Declare, Run]] = {
    "prepare": ("train a tokenizer and pack a corpus", _declare_prepare, _prepare),
    "train": ("pre-train, or continue where the workdir's run stopped", _declare_train, _train),
    "evaluate": ("held-out loss, perplexity and accuracy beside the unigram baseline", _declare_evaluate, _evaluate),
    "fill-mask": ("the most probable tokens at each [MASK]", _declare_fill_mask, _fill_mask),
    "generate": ("draw text: fill the blanks of a prompt, or continue it", _declare_generate, _generate),
    "score": ("minimal pairs by pseudo-log-likelihood", _declare_score, _score),
    "finetune": ("fine-tune a run for a task: labels, numbers, tags or answers", _declare_finetune, _finetune),
    "predict": ("labels, tags or answers of a fine-tuned run for the examples of a file", _declare_predict, _predict),
    "embed": ("a vector for each text of a file, from a run's encoder", _declare_embed, _embed),
    "probe": ("how much of a task a run's vectors know: nearest neighbours and logistic regression", _declare_probe, _probe),
    "import": ("a workdir of a Hugging Face folder", _declare_import, _import),
    "export": ("a Hugging Face folder of a workdir", _declare_export, _export),
    "bench": ("speed, memory and time by operation of a stage's step, alone or beside a peer", _declare_bench, _bench),
    "compare": ("train several configs on one corpus under one budget, for one table and page", _declare_compare, _compare),
    "compile": ("memory, collectives and estimated speed of a step on a TPU that is not here", _declare_compile, _compile),
    "report": ("one HTML page of one or more runs", _declare_report, _report),
}
