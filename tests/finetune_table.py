"""Fine-tunes pre-trained runs, and the same network from random parameters, on some tasks: a table of all, in Markdown.

python tests/finetune_table.py --init RUN [RUN …] --data ../shared/data --out DIR [--seeds 3] [--scale 1.0] [--tasks sst2 …]

All have the same data, steps, learning rate and seeds; random parameters have the first run's shape and tokenizer. What is
finished in --out is not run again, so that the command can be interrupted and repeated; each line of results.jsonl there is
one run, and an --out is for one list of runs. --scale 1 takes a minute or two a run on two cores.

SST-2 is there with its train file only, whose examples are phrases out of whole sentences. A part of the sentences, by hash,
becomes the dev file, and every phrase that one of them contains is left out of training. Of BC5CDR's devel file the first
1,500 sentences are used. QAMR's single file is divided by the hash of the sentence that is asked about.
"""

import argparse
import gzip
import hashlib
import json
import logging
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

from mlm_jax.config import load_config
from mlm_jax.finetune.job import finetune

ROOT = pathlib.Path(__file__).resolve().parents[1]
RANDOM = "random"


class Task(NamedTuple):
    """A recipe, its files, how many steps it has at --scale 1, and the measure that is shown."""

    recipe: str
    train: str
    dev: str
    steps: int
    measure: str
    held_out: float = 0.1  # the part of train that is, where there is no dev file


TASKS = {
    "sst2": Task("finetune_sst2", "sst2_train.tsv", "sst2_dev.tsv", 600, "accuracy"),
    "cola": Task("finetune_cola", "glue/CoLA/train.tsv.gz", "glue/CoLA/dev.tsv.gz", 600, "matthews"),
    "wnut17": Task("finetune_wnut17", "wnut17/wnut17train.conll", "wnut17/emerging.dev.conll", 300, "f1"),
    "bc5cdr": Task("finetune_bc5cdr", "biomed_ner/BC5CDR-IOB/train.tsv.gz", "bc5cdr_dev.tsv", 200, "f1"),
    "qamr": Task("finetune_qamr", "qamr/squad_format_dev.json.gz", "", 300, "f1", 0.05),
    "esol": Task("finetune_esol", "moleculenet/esol.csv", "", 400, "rmse", 0.2),
}
OF_ENGLISH = [name for name in TASKS if name != "esol"]  # that one is for a run on molecules
# The learning rate suits a small network and few steps, in which Adam needs its bias corrected: else the first updates are
# three times as large. Neither dropout nor the first token's own layer helps so short a run: pre-training has never asked
# anything of that token.
SETTINGS = (
    "optimizer.learning_rate=2e-4",
    "optimizer.bias_correction=True",
    "task.epochs=0",
    "task.dropout=0.0",
    "task.buckets=(32, 64)",
    "stages[0].batch_size=32",
    "train.log_every=20",
    "train.checkpoint_every=100000",
    "evaluation.every=0",
)


def write_sst2(source: pathlib.Path, out: pathlib.Path) -> None:
    """The train and dev files, of which no phrase of the first is a part of a sentence of the second."""
    header, *lines = gzip.decompress(source.read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines]
    labels = {text.strip(): label for text, label in rows}
    sentences, known = [], "\n"
    for text in sorted(labels, key=lambda text: (-len(text), text)):
        if len(text.split()) >= 5 and text not in known:
            sentences.append(text)
            known += text + "\n"
    held_out = sorted(text for text in sentences if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 32)
    joined = "\n" + "\n".join(held_out) + "\n"
    train = ["\t".join(row) for row in rows if row[0].strip() not in joined]
    dev = [f"{text}\t{labels[text]}" for text in held_out]
    for name, part in (("train", train), ("dev", dev)):
        (out / f"sst2_{name}.tsv").write_text("\n".join([header, *part]) + "\n", encoding="utf-8")


def write_bc5cdr(source: pathlib.Path, out: pathlib.Path) -> None:
    """The first sentences of a file of columns."""
    sentences = gzip.decompress(source.read_bytes()).decode().split("\n\n")[:1500]
    (out / "bc5cdr_dev.tsv").write_text("\n\n".join(sentences) + "\n", encoding="utf-8")


def path_of(name: str, data: pathlib.Path, out: pathlib.Path) -> str:
    """A file of the data, or one that was written for the table."""
    return str(data / name if "/" in name else out / name) if name else ""


def measure(name: str, init: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """One run."""
    task, out = TASKS[name], pathlib.Path(options.out)
    data = pathlib.Path(options.data)
    steps = max(20, round(task.steps * options.scale))
    cfg = load_config(
        str(ROOT / "configs" / f"{task.recipe}.py"),
        [
            *SETTINGS,
            *([] if name in ("wnut17", "bc5cdr", "qamr") else ["task.pooling=mean"]),
            f"seed={seed}",
            f"init_from={options.init[0] if init == RANDOM else init}",
            f"task.random_init={init == RANDOM}",
            f"task.train={path_of(task.train, data, out)}",
            f"task.dev={path_of(task.dev, data, out)}",
            f"task.dev_fraction={task.held_out}",
            f"stages[0].steps={steps}",
            f"optimizer.warmup_steps={steps // 10}",
        ],
        for_task=True,
    )
    began = time.perf_counter()
    run = finetune(cfg, out / f"{name}_{pathlib.Path(init).name}_{seed}")["runs"][0]
    return {"task": name, "init": init, "seed": seed, "steps": steps, "seconds": round(time.perf_counter() - began), **run}


def table(results: list[dict[str, object]], inits: list[str]) -> str:
    """Means and deviations over the seeds that there are."""
    titles = ["task", "measure", "steps of 32 rows", *(pathlib.Path(init).name for init in inits), "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|--" * len(titles) + "|"]
    for name, task in TASKS.items():
        of_task = [result for result in results if result["task"] == name]
        by_init = [[float(result[task.measure]) for result in of_task if result["init"] == init] for init in inits]
        if not all(by_init):
            continue
        cells = [
            f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
            for values in by_init
        ]
        lines.append(f"| {name} | {task.measure} | {of_task[0]['steps']} | {' | '.join(cells)} | {min(map(len, by_init))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, nargs="+", help="pre-trained workdirs")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    parser.add_argument("--tasks", nargs="+", default=OF_ENGLISH, choices=list(TASKS))
    options = parser.parse_args()
    names = [pathlib.Path(init).name for init in options.init]
    if len({*names, RANDOM}) <= len(names):
        parser.error(
            f"the runs {', '.join(names)} need different names, none of them {RANDOM!r}: they name columns and folders"
        )
    inits = [*options.init, RANDOM]
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    for chatty in ("jax", "orbax", "absl"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    data = pathlib.Path(options.data)
    if "sst2" in options.tasks and not (out / "sst2_dev.tsv").exists():
        write_sst2(data / "glue" / "SST-2" / "train.tsv.gz", out)
    if "bc5cdr" in options.tasks and not (out / "bc5cdr_dev.tsv").exists():
        write_bc5cdr(data / "biomed_ner" / "BC5CDR-IOB" / "devel.tsv.gz", out)
    file = out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(result["task"], result["init"], result["seed"]) for result in results}
    for seed in range(options.seeds):
        for name in options.tasks:
            for init in inits:
                if (name, init, seed) not in done:
                    results.append(measure(name, init, seed, options))
                    with file.open("a") as lines:
                        lines.write(json.dumps(results[-1]) + "\n")
    print(table(results, inits))


if __name__ == "__main__":
    main()
