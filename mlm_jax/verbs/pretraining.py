"""prepare, train, and what a trained run is read by: evaluate, fill-mask, generate, score."""

import argparse
import dataclasses
import math
import os
import shlex
import sys
from typing import Any

from mlm_jax.config import Config
from mlm_jax.errors import MachineError, UserError, fail, install, tell_any
from mlm_jax.verbs.options import Result, Verbs, config_option, device_errors, workdir_option


def _declare_prepare(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the tokenizer and the packed corpus go")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    parser.add_argument(
        "--runner",
        choices=("local", "beam"),
        default="local",
        help="beam: the same as Apache Beam pipelines, whose workers must see the source and DIR under the same paths",
    )
    parser.add_argument(
        "--beam-options",
        default="",
        metavar="OPTIONS",
        help="Beam's own in one text, as --beam-options='--runner=FlinkRunner --flink_master=HOST:8081'; without a runner "
        "this machine does it, with several processes by '--direct_running_mode=multi_processing --direct_num_workers=8'",
    )


def _prepare(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.config import load_config
    from mlm_jax.data.prepare import prepare

    cfg = load_config(options.config, overrides)
    manifest = prepare(cfg, options.out, options.workers, _runner(options)).manifest
    print(f"{'split':12}{'documents':>12}{'words':>14}{'tokens':>14}")
    for name, part in manifest.get("sources", {"": manifest}).items():
        for split, words in part.get("words", {}).items():  # a corpus of an older version counts none
            print(f"{split:12}{part['documents'][split]:12,}{words:14,}{part['tokens'][split]:14,}  {name}".rstrip())
    return dict(manifest)


def _runner(options: argparse.Namespace) -> Any:
    """What `prepare` runs on, None for processes of its own."""
    if options.runner == "local":
        if options.beam_options:
            raise UserError(f"--beam-options={options.beam_options} are for --runner beam: add it")
        return None
    if options.workers is not None:
        raise UserError(
            f"--workers={options.workers} is for --runner local; with Beam write --beam-options="
            f"'--direct_running_mode=multi_processing --direct_num_workers={options.workers}'"
        )
    try:
        from mlm_jax.data.beam_runner import BeamRunner  # Beam is an optional extra
    except ImportError as error:
        raise UserError(f"--runner beam needs the extra 'beam' ({error}): {install('beam')}") from None
    return BeamRunner(tuple(shlex.split(options.beam_options)))


def _declare_train(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run's directory; an interrupted run continues there"
    )
    parser.add_argument("--data", metavar="DIR", help="a prepared corpus, made when missing; default: data/ in the workdir")
    parser.add_argument("--workers", type=int, help="processes for preparation; default: one a core")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps into the workdir's profile/")
    several = parser.add_argument_group(
        "several processes",
        "One run over many hosts: start the same command on each. Under srun, mpirun and on TPU slices nothing more is "
        "needed, but --coordinator with Open MPI 5 on several hosts; elsewhere give these, or set JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
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
    with peers.ending_at_once(tell_any), device_errors():
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
    workdir_option(parser)
    parser.add_argument(
        "--source", metavar="URI", help="other text than the run's held-out rows: files:…, tfds:…, builtin:…"
    )
    parser.add_argument("--seq-len", type=int, help="row length; default: the last stage's")
    _language_option(parser)


def _language_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", default="", help="of the text, one of model.languages (of pairs two: de,en)")


def _language(options: argparse.Namespace, cfg: Config) -> str:
    known = cfg.model.languages
    for name in options.language.split(",") if options.language else ():
        if name not in known:
            raise UserError(f"--language={name} is none of model.languages={known}, which this run was trained with")
    return str(options.language)


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> Result:
    import jax

    from mlm_jax.inference import open_run, pack_source
    from mlm_jax.train.evaluate import COMMON, HeldOut, evaluate_sources, make_eval_step
    from mlm_jax.train.feed import token_bytes, vocab_tables

    with device_errors(), open_run(options.workdir) as run:
        cfg = run.cfg
        seq_len = options.seq_len or cfg.stages[-1].seq_len
        if not 8 <= seq_len <= cfg.model.max_positions:
            raise UserError(f"--seq-len={seq_len} must lie between 8 and the model's {cfg.model.max_positions} positions")
        languages = cfg.languages(_language(options, cfg))
        if languages and not options.source:
            raise UserError(f"--language={options.language} is of a --source; the run's own rows have theirs")
        names = ("",) if options.source else tuple(source.name for source in cfg.data.sources) or ("",)
        held_out = {
            name: HeldOut(
                pack_source(run, options.source, seq_len, languages)
                if options.source
                else run.workdir.read_validation(seq_len, name),
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
    width = max(map(len, own), default=0)
    for name, value in own.items():
        print(f"{name:{max(width, 12)}}{value:10.4f}")
    if not math.isfinite(found["loss"]):
        raise MachineError(f"the loss is not finite: the parameters of step {run.step} are those of a run that diverged")
    return {"step": run.step, "seq_len": seq_len, **found}


def _measured(name: str, values: dict[str, Any]) -> str:
    loss, accuracy, perplexity = (values[key] for key in ("loss", "accuracy", "perplexity"))
    return f"{name:12}{loss:10.4f}{accuracy:10.4f}{perplexity:12.2f}{values['bits_per_byte']:12.4f}"


def _declare_fill_mask(parser: argparse.ArgumentParser) -> None:
    workdir_option(parser)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="with one or more [MASK]")
    parser.add_argument("--top-k", type=int, default=5, help="candidates per mask (default 5)")
    _language_option(parser)
    parser.add_argument("--image", metavar="FILE", help="what the texts are beside, for a run that reads images")


def _fill_mask(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.fill_mask import Filler, shown
    from mlm_jax.inference import open_run

    with device_errors(), open_run(options.workdir) as run:
        fill = Filler(run.objective, run.tokenizer)
        language, image = _language(options, run.cfg), _image(run.cfg, options.image)
        fills = fill(run.params, options.texts, top_k=options.top_k, language=language, image=image)
    for text, masks in zip(options.texts, fills, strict=True):
        print(text)
        for number, candidates in enumerate(masks, 1):
            print(f"  [MASK] {number}:", "  ".join(f"{shown(c)} {c['probability']:.3f}" for c in candidates))
    return {"step": run.step, "fills": [{"text": t, "masks": f} for t, f in zip(options.texts, fills, strict=True)]}


def _image(cfg: Any, path: str | None) -> Any:
    """The file's pixels as the run's model takes them; None where there is no file."""
    from mlm_jax.data import images

    if path is None:
        _caution("without --image the model sees the text alone" if cfg.model.image_size else "")
        return None
    if not cfg.model.image_size:
        raise UserError(f"--image={path}: this run was trained on text alone; leave it out")
    folder = images.Folder("")
    folder.check(path, "--image")
    return images.Decoder(folder, cfg.model.image_size, cfg.data.image_resize)(path)


def _without_image(cfg: Any) -> str:
    """What a verb that takes no image says of a run that was trained with them."""
    return "this run was trained on texts with images, and here it sees the text alone" if cfg.model.image_size else ""


def _caution(message: str) -> None:
    if message:
        print(f"mlm-jax: {message}", file=sys.stderr)


def _declare_generate(parser: argparse.ArgumentParser) -> None:
    workdir_option(parser)
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

    with device_errors(), open_run(options.workdir) as run:
        names = ("steps", "temperature", "block_size", "count", "seed")
        method = options.method or default_method(run.objective)
        sampling = Sampling(method, **{name: getattr(options, name) for name in names})
        caution = "; ".join(filter(None, (untrained_for(run.cfg, method), _without_image(run.cfg))))
        _caution(caution)
        samples = Generator(run.objective, run.tokenizer)(run.params, options.prompt, sampling, length=options.length)
    for number, text in enumerate(samples, 1):
        print(*([f"--- {number}"] if len(samples) > 1 else []), text, sep="\n")
    return {"step": run.step, **dataclasses.asdict(sampling), "caution": caution, "samples": samples}


def _declare_score(parser: argparse.ArgumentParser) -> None:
    workdir_option(parser)
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
    with device_errors(), open_run(options.workdir) as run:
        _caution(_without_image(run.cfg))
        scorer = PseudoLikelihood(run, method=options.method, batch_size=options.batch_size)
        print(f"{'set':44}{'pairs':>7}{'accuracy':>10}{'± s.e.':>8}")
        for name, pairs in sets.items():
            accuracies[name] = pair_accuracy(scorer, pairs)
            error = standard_error(accuracies[name], len(pairs))
            print(f"{name:44}{len(pairs):7}{accuracies[name]:10.3f}{error:8.3f}", flush=True)
    mean = sum(accuracies.values()) / len(accuracies)
    print(f"{'mean of the sets':44}{sum(map(len, sets.values())):7}{mean:10.3f}")
    return {"step": run.step, "method": options.method, "accuracy": accuracies, "mean": mean}


VERBS: Verbs = {
    "prepare": ("train a tokenizer and pack a corpus", _declare_prepare, _prepare),
    "train": ("pre-train, or continue where the workdir's run stopped", _declare_train, _train),
    "evaluate": ("held-out loss, perplexity and accuracy beside the unigram baseline", _declare_evaluate, _evaluate),
    "fill-mask": ("the most probable tokens at each [MASK]", _declare_fill_mask, _fill_mask),
    "generate": ("draw text: fill the blanks of a prompt, or continue it", _declare_generate, _generate),
    "score": ("minimal pairs by pseudo-log-likelihood", _declare_score, _score),
}
