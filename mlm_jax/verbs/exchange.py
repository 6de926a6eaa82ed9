"""import, export, and extend, which gives what was imported new words."""

import argparse
import sys

from mlm_jax.verbs.options import Result, Verbs, workdir_option


def _declare_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="FOLDER", help="of Hugging Face's format")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--generator", metavar="FOLDER", help="for a detector of replaced tokens: its generator's folder")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="draw what is not there: the head of a bare encoder, the generator of a detector",
    )
    parser.set_defaults(config=None)  # of a fine-tuned network, --config.task.field=value says how predict reads its files


def _import(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.interop.load import import_folder

    result = import_folder(
        options.source, options.workdir, generator=options.generator, fresh=options.fresh, overrides=overrides
    )
    print(
        f"{result['workdir']}: {result['model_type']}, {result['parameters']:,} parameters, objective {result['objective']}"
    )
    if result["recipe"]:
        print(f"to continue its pre-training: mlm-jax train --config {result['recipe']} --workdir DIR")
    else:
        print(f"for labels, tags or answers: mlm-jax predict --workdir {result['workdir']} --input FILE")
    return result


def _declare_export(parser: argparse.ArgumentParser) -> None:
    workdir_option(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, as `transformers` loads it")
    parser.add_argument("--network", help="of replaced-token detection: discriminator (default) or generator")
    parser.add_argument("--model-type", metavar="NAME", help="bert, roberta, electra, …; default: what fits")
    parser.add_argument("--onnx", action="store_true", help="write a model.onnx beside it (extra onnx)")


def _export(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.interop.save import export_run

    result = export_run(
        options.workdir, options.out, network=options.network, model_type=options.model_type, onnx=options.onnx
    )
    print(f"{result['out']}: {result['class']}, {result['parameters']:,} parameters of step {result['step']}")
    if options.onnx:
        print(f"{result['out']}/model.onnx: in onnxruntime {result['onnx_difference']:.1e} from PyTorch at most")
    if result["note"]:
        print(f"mlm-jax: {result['note']}", file=sys.stderr)
    return result


def _declare_extend(parser: argparse.ArgumentParser) -> None:
    workdir_option(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--words", metavar="FILE", help="a word a line")
    source.add_argument("--corpus", metavar="URI", help="a source: its most frequent words of three pieces or more")
    parser.add_argument("--count", type=int, default=1000, help="how many of them (default 1000)")
    parser.add_argument("--sample-megabytes", type=float, default=100.0, help="text of the source to read (default 100)")


def _extend(options: argparse.Namespace, overrides: list[str]) -> Result:
    from mlm_jax.extend.run import extend_run

    result = extend_run(
        options.workdir,
        options.out,
        words=options.words,
        corpus=options.corpus,
        count=options.count,
        sample_megabytes=options.sample_megabytes,
    )
    shown = ", ".join(result["first_words"] + ["…"] * (result["words"] > len(result["first_words"])))
    print(
        f"{result['workdir']}: {result['words']} new words ({shown}), "
        f"{result['tokenizer_ids']} ids, a vocabulary of {result['vocab_size']} rows"
    )
    print(f"to train them: mlm-jax train --config {result['recipe']} --workdir DIR")
    return result


VERBS: Verbs = {
    "import": ("a workdir of a Hugging Face folder", _declare_import, _import),
    "export": ("a Hugging Face folder of a workdir", _declare_export, _export),
    "extend": ("a workdir with new words in its vocabulary", _declare_extend, _extend),
}
