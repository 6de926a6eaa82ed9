"""finetune and predict; embed and probe."""

import argparse
import json
import sys
from typing import Any

from mlm_jax.errors import UserError, fail
from mlm_jax.verbs.options import Result, Verbs, config_option, device_errors, workdir_option


def _declare_finetune(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
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
    with device_errors():
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
    with device_errors():
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
    workdir_option(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help=".txt (a text a line), .jsonl, .tsv, .csv, .parquet")
    parser.add_argument("--output", required=True, metavar="FILE", help="X.npy or X.parquet, a vector a text")
    parser.add_argument("--column", default="text", help="of the text (default: text)")
    _embedder_options(parser)


def _embed(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.finetune.embed import Embedder, read_texts, write_vectors

    if not options.output.endswith((".npy", ".parquet")):
        raise UserError(f"--output={options.output} must end in .npy or .parquet")
    with device_errors():
        embedder = _make_embedder(options, Embedder)
        vectors = embedder(read_texts(options.input, options.column))
    write_vectors(options.output, vectors)
    print(f"{options.output}: {vectors.shape[0]} vectors of {vectors.shape[1]}, step {embedder.step}")
    return {"step": embedder.step, "texts": vectors.shape[0], "dimensions": vectors.shape[1]}


def _make_embedder(options: argparse.Namespace, make: Any) -> Any:
    return make(options.workdir, pooling=options.pooling, max_length=options.max_length, batch_size=options.batch_size)


def _declare_probe(parser: argparse.ArgumentParser) -> None:
    workdir_option(parser)
    config_option(parser)
    parser.add_argument("--max-examples", type=int, default=5000, help="to fit on, the first ones (default 5000)")
    _embedder_options(parser)


def _probe(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.config import load_config

    cfg = load_config(options.config, overrides, for_task=True)
    if options.max_examples < 2:
        raise UserError(f"--max-examples={options.max_examples} must be 2 or more")
    from mlm_jax.finetune.embed import Embedder, probe

    with device_errors():
        result = probe(cfg, _make_embedder(options, Embedder), max_examples=options.max_examples)
    print(f"{result['examples']} examples, {result['dev_examples']} to measure on")
    print(f"{'':12}{'accuracy':>10}{'f1':>10}{'matthews':>10}")
    for name in ("majority", "neighbours", "logistic"):
        print(f"{name:12}" + "".join(f"{result[name][measure]:10.4f}" for measure in ("accuracy", "f1", "matthews")))
    return result


VERBS: Verbs = {
    "finetune": ("fine-tune a run for a task: labels, numbers, tags or answers", _declare_finetune, _finetune),
    "predict": ("labels, tags or answers of a fine-tuned run for the examples of a file", _declare_predict, _predict),
    "embed": ("a vector for each text of a file, from a run's encoder", _declare_embed, _embed),
    "probe": ("how much of a task a run's vectors know: nearest neighbours and logistic regression", _declare_probe, _probe),
}
