"""Kills a run again and again, at random and at the worst moments, and compares its end with that of a run left alone.

python tests/kill_resume.py --kills 20                   prints each kill; exit status 1 unless the ends are bit-identical
python tests/kill_resume.py --kills 3 --objective all    each objective and masking policy, whose loss has to fall, too
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMINGS = ("tokens_per_second", "mfu")
MOMENTS = ("prepare", "checkpoint", "any")
# What each trains with: a recipe, and what it has to be told beside `OVERRIDES`.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "smoke": ("smoke.py",),
    "mlm": ("compare_mini.py:mlm", "masking.schedule=cosine", "masking.final_rate=0.15", "masking.rate_spread=0.1"),
    "whole_word": ("compare_mini.py:whole_word",),
    "ngram": ("compare_mini.py:mlm", "masking.policy=ngram", "masking.max_words=3"),
    "pmi": ("compare_mini.py:mlm", "masking.policy=pmi", "masking.ngrams={ngrams}"),
    "span": ("compare_mini.py:span",),
    "rtd": ("compare_mini.py:rtd", "rtd.generator_size=0.5"),
    "diffusion": ("compare_mini.py:diffusion", "diffusion.scored_share=0.5"),
    "hybrid": ("compare_mini.py:hybrid", "hybrid.causal_share=0.25"),
    "image_text": (
        "emoji_mini.py",
        "data.source=images:{pictures}/labels.jsonl",
        "model.image_size=16",
        "image_text.patch_mask_rate=0.5",
    ),
}
NGRAMS = ("for example", "such as", "of the", "in the", "the following", "the same", "return value", "in order to")
OVERRIDES = (
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.vocab_size=512",
    "tokenizer.vocab_size=512",
    "tokenizer.algorithm=bpe",
    "model.max_positions=64",
    "model.dropout=0.1",
    "optimizer.learning_rate=3e-3",
    "optimizer.warmup_steps=10",
    "optimizer.ema_decay=0.9",
    "stages[0].steps=150",
    "stages[0].seq_len=64",
    "stages[0].batch_size=8",
    "train.log_every=7",
    "train.checkpoint_every=4",
    "evaluation.every=25",
    "evaluation.max_rows=16",
)


@dataclasses.dataclass
class Kill:
    """One run of the command that did not live to its end."""

    moment: str
    after_seconds: float
    logged_step: int


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained: the same command for every start."""

    source: str
    objective: str = "smoke"

    def command(self, workdir: pathlib.Path) -> list[str]:
        recipe, *own = OBJECTIVES[self.objective]
        ngrams = workdir.parent / "ngrams.txt"
        ngrams.write_text("\n".join(NGRAMS))
        pictures = workdir.parent / "pictures"
        if self.objective == "image_text" and not pictures.exists():
            write_pictures(pictures)
        own = [field.format(ngrams=ngrams, pictures=pictures) for field in own]
        fields = (*OVERRIDES, f"data.source={self.source}", *own)
        return [
            *(sys.executable, "-m", "mlm_jax", "train", "--workers=1", "--config", str(ROOT / "configs" / recipe)),
            *("--workdir", str(workdir), *(f"--config.{field}" for field in fields)),
        ]

    def start(self, workdir: pathlib.Path) -> subprocess.Popen[bytes]:
        """Starts (or continues) the run, its output kept beside the workdir."""
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        with open(workdir.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(self.command(workdir), cwd=ROOT, env=environment, stdout=log, stderr=log)

    def finish(self, workdir: pathlib.Path) -> float:
        """Runs the command to its end and returns the seconds it took."""
        began = time.monotonic()
        status = self.start(workdir).wait()
        if status != 0:
            raise SystemExit(f"the run ended with status {status}:\n{workdir.with_suffix('.log').read_text()[-3000:]}")
        return time.monotonic() - began


def write_pictures(folder: pathlib.Path) -> None:
    """Pictures of one shade each, and texts that say how bright it is among other words."""
    folder.mkdir()
    rng, lines = random.Random(0), []
    for number in range(600):
        shade = 16 * rng.randrange(16)
        Image.new("L", (20, 20), shade).save(folder / f"{number}.png")
        words = (rng.choice(("ka", "lo", "mi", "ru")) + rng.choice(("nat", "ser", "tob", "vel")) for _ in range(4))
        lines.append(json.dumps({"text": f"shade {shade} {' '.join(words)}", "image": f"{number}.png"}))
    (folder / "labels.jsonl").write_text("\n".join(lines))


def reached(workdir: pathlib.Path, moment: str) -> bool:
    """Whether the run is now at a moment that is worth a kill."""
    if moment == "prepare":
        return (workdir / "data").exists() and not (workdir / "data" / "manifest.json").exists()
    return any((workdir / "checkpoints").glob("*tmp*"))


def kill_once(training: Training, workdir: pathlib.Path, moment: str, latest: float, rng: random.Random) -> Kill | None:
    """Starts the run and kills it; None if it came to its end first.

    A moment that does not come (a corpus that is already whole) is replaced by the time limit, which is random.
    """
    process, began = training.start(workdir), time.monotonic()
    limit = rng.uniform(0.5, latest)
    wait_for = moment != "any"
    while time.monotonic() - began < (latest if wait_for else limit):
        if process.poll() is not None:
            if process.returncode != 0:
                raise SystemExit(f"status {process.returncode}:\n{workdir.with_suffix('.log').read_text()[-3000:]}")
            return None
        if wait_for and reached(workdir, moment):
            time.sleep(rng.uniform(0, 0.5 if moment == "prepare" else 0.02))
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return Kill(moment, time.monotonic() - began, last_step(workdir))


def last_step(workdir: pathlib.Path) -> int:
    """The newest whole checkpoint, 0 if there is none."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def metrics(workdir: pathlib.Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without what is measured by a clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def parameters(workdir: pathlib.Path) -> list[np.ndarray]:
    """The final checkpoint's averaged parameters."""
    from mlm_jax.inference import open_run

    with open_run(workdir) as run:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(run.params)]


def corpus_bytes(workdir: pathlib.Path) -> dict[str, bytes]:
    """Every file of the prepared corpus but the lock."""
    data = workdir / "data"
    files = (path for path in data.rglob("*") if path.is_file() and path.name != "prepare.lock")
    return {str(path.relative_to(data)): path.read_bytes() for path in files}


def check_equal(alone: pathlib.Path, killed: pathlib.Path) -> None:
    """Raises AssertionError unless both runs ended with the same bits."""
    assert corpus_bytes(alone) == corpus_bytes(killed), "the prepared corpora differ"
    assert metrics(alone) == metrics(killed), "the metrics differ"
    for one, other in zip(parameters(alone), parameters(killed), strict=True):
        np.testing.assert_array_equal(one, other)


def check_learned(workdir: pathlib.Path) -> None:
    """Raises AssertionError unless every logged number is finite and the loss has fallen by a tenth."""
    train = [line for line in metrics(workdir) if line["kind"] == "train"]
    losses = np.array([line["loss"] for line in train], float)
    assert np.isfinite([line["grad_norm"] for line in train]).all() and not any(line["skipped"] for line in train)
    assert losses[-3:].mean() < 0.9 * losses[0], f"the loss did not fall: {losses}"


def kill_resume(directory: pathlib.Path, kills: int, seed: int, training: Training) -> list[Kill]:
    """Kills runs until `kills` have been counted, lets each one finish, and compares it with the run left alone."""
    rng = random.Random(seed)
    alone = directory / "alone"
    seconds = training.finish(alone)
    check_learned(alone)
    done: list[Kill] = []
    while len(done) < kills:
        workdir = directory / f"killed{len(done)}"
        for index in range(10):
            kill = kill_once(training, workdir, MOMENTS[index % len(MOMENTS)], seconds, rng)
            if kill is None or len(done) == kills:
                break
            done.append(kill)
            print(f"kill {len(done)}: {kill}", flush=True)
        training.finish(workdir)
        check_equal(alone, workdir)
        print(f"{workdir.name}: bit-identical to the run left alone", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", choices=[*OBJECTIVES, "all"], default="smoke")
    options = parser.parse_args()
    for objective in OBJECTIVES if options.objective == "all" else [options.objective]:
        print(f"{objective}:", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            training = Training("builtin:python_docs", objective)
            done = kill_resume(pathlib.Path(directory), options.kills, options.seed, training)
        print(f"{len(done)} kills, every end bit-identical")


if __name__ == "__main__":
    main()
