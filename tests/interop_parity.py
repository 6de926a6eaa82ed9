"""Random models of `transformers` and ours, carried both ways: python tests/interop_parity.py prints the differences.

Needs the extra `peers`. test_interop_peers.py asserts what the table shows.
"""

import conftest  # noqa: F401, I001  (the environment comes first)

import functools
import json
import pathlib
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy
import tokenizers
import torch
import transformers
from golden.make_bert_golden import randomise
from golden.neobert import NeoBert
from interop_runs import LENGTH, MODERNBERT, NEOBERT, TEXTS, config, our_logits, rows, small_tokenizer, write_random_run

from mlm_jax.config import ShardingConfig
from mlm_jax.inference import read_params
from mlm_jax.interop.load import import_folder
from mlm_jax.interop.save import export_run
from mlm_jax.interop.tensors import layout
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_task
from mlm_jax.sharding import make_mesh
from mlm_jax.workdir import Workdir

LENGTHS = [LENGTH, 13, 7, 20, 5, 11, 9, 2]
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


class Case(NamedTuple):
    """A model of theirs: its config's and model's classes, fields, and what its tokenizer is."""

    config: str
    model: str
    tokenizer: str
    fields: dict

    @property
    def detection(self) -> bool:
        return self.model.endswith("ForPreTraining")


ROBERTA = {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
MODERN = {"num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
MODERN |= {"bos_token_id": 2, "eos_token_id": 3}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
THEIRS = {
    "ModernBERT": Case("ModernBertConfig", "ModernBertForMaskedLM", "wordpiece", MODERN),
    "ModernBERT, decoder of its own, all layers global, biases of norms": Case(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        "wordpiece",
        MODERN | {"tie_word_embeddings": False, "layer_types": ["full_attention"] * 4, "norm_bias": True},
    ),
    "DistilBERT": Case("DistilBertConfig", "DistilBertForMaskedLM", "wordpiece", DISTIL),
    "BERT": Case("BertConfig", "BertForMaskedLM", "wordpiece", {}),
    "BERT, gelu_new, decoder of its own": Case(
        "BertConfig", "BertForMaskedLM", "wordpiece", {"hidden_act": "gelu_new", "tie_word_embeddings": False}
    ),
    "RoBERTa": Case("RobertaConfig", "RobertaForMaskedLM", "bytes", ROBERTA),
    "XLM-R": Case("XLMRobertaConfig", "XLMRobertaForMaskedLM", "unigram", ROBERTA),
    "ELECTRA generator": Case("ElectraConfig", "ElectraForMaskedLM", "wordpiece", {"embedding_size": 16}),
    "ELECTRA generator, decoder of its own": Case(
        "ElectraConfig", "ElectraForMaskedLM", "wordpiece", {"embedding_size": 16, "tie_word_embeddings": False}
    ),
    "ELECTRA discriminator": Case("ElectraConfig", "ElectraForPreTraining", "wordpiece", {"embedding_size": 16}),
    "ELECTRA discriminator, width of its tables": Case(
        "ElectraConfig", "ElectraForPreTraining", "wordpiece", {"embedding_size": 32, "hidden_act": "gelu_new"}
    ),
}
# Ours: config, and what is asked of `export`.
OURS = {
    "no token types": (config(), {}),
    "exact GELU, as RoBERTa": (config(activation="gelu_erf", position_offset=2), {}),
    "exact GELU, as XLM-R": (config(activation="gelu_erf", num_token_types=1), {"model_type": "xlm-roberta"}),
    "positions behind 2, as BERT": (config(position_offset=2, num_token_types=2), {"model_type": "bert"}),
    "decoder of its own": (config(tie_embeddings=False, activation="relu"), {}),
    "narrow tables": (config(table_dim=16, activation="gelu_erf"), {}),
    "span": (config("span"), {}),
    "as DistilBERT": (config(activation="relu"), {"model_type": "distilbert"}),
    "ModernBERT": (config(**MODERNBERT), {}),
    "rtd, discriminator": (config("rtd", table_dim=16), {}),
    "rtd, generator": (config("rtd", activation="gelu_erf"), {"network": "generator"}),
}


class TaskCase(NamedTuple):
    """A fine-tuned model of theirs: a name of `THEIRS`, what its class ends in, and fields of its config."""

    name: str
    ending: str
    fields: dict


_LABELS = {"id2label": dict(enumerate("xyz")), "label2id": {name: index for index, name in enumerate("xyz")}}
_TAGS = {"id2label": dict(enumerate(("O", "B-X", "I-X"))), "label2id": {"O": 0, "B-X": 1, "I-X": 2}}
_ENDINGS = {"ForSequenceClassification": _LABELS, "ForTokenClassification": _TAGS, "ForQuestionAnswering": {}}
_MEAN = {"classifier_pooling": "mean"}
_BIASES = {"classifier_bias": True, "norm_bias": True}
# Of ModernBERT also what its head can be.
TASKS = {
    f"{name} {ending}": TaskCase(name, ending, fields)
    for name in ("BERT", "RoBERTa", "XLM-R", "ELECTRA generator", "DistilBERT", "ModernBERT")
    for ending, fields in _ENDINGS.items()
} | {
    "ModernBERT ForSequenceClassification, mean": TaskCase("ModernBERT", "ForSequenceClassification", _MEAN | _LABELS),
    "ModernBERT ForSequenceClassification, mean, biases, tanh, a number": TaskCase(
        "ModernBERT",
        "ForSequenceClassification",
        _MEAN | _BIASES | {"classifier_activation": "tanh", "num_labels": 1, "problem_type": "regression"},
    ),
    "ModernBERT ForTokenClassification, biases, gelu_new": TaskCase(
        "ModernBERT", "ForTokenClassification", _BIASES | _TAGS | {"classifier_activation": "gelu_new"}
    ),
    "ModernBERT ForQuestionAnswering, relu": TaskCase(
        "ModernBERT", "ForQuestionAnswering", {"classifier_activation": "relu", "classifier_dropout": 0.25}
    ),
}


class Differences(NamedTuple):
    """The largest absolute differences of logits."""

    whole: float
    padded: float
    packed: float


def build(name: str, folder: pathlib.Path, ending: str = "", **fields) -> torch.nn.Module:
    """A random model of theirs, saved with a tokenizer of its kind.

    Args:
        ending: of another class of its family.
        fields: of its config.
    """
    case = THEIRS[name]
    kind = case.config.removesuffix("Config") + ending if ending else case.model
    shape = (SHAPE if "n_layers" not in case.fields else {"vocab_size": 400}) | {"max_position_embeddings": LENGTH}
    shape |= case.fields | fields
    model = getattr(transformers, kind)(getattr(transformers, case.config)(**shape)).eval()
    randomise(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    build_tokenizer(case.tokenizer).save_pretrained(folder)
    return model


@functools.cache
def build_tokenizer(kind: str) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer of the class that a family has, trained on a few words."""
    if kind == "wordpiece":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        made = transformers.BertTokenizer().backend_tokenizer
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=names, show_progress=False)
        made.train_from_iterator(TEXTS, trainer)
        return transformers.BertTokenizer(vocab=made.get_vocab())
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "bytes":
        made = transformers.RobertaTokenizer().backend_tokenizer
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=330, special_tokens=[*names, "<mask>"], initial_alphabet=alphabet
        )
        made.train_from_iterator(TEXTS, trainer)
        model = json.loads(made.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        return transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges)
    pieces = [small_tokenizer("unigram").piece(index) for index in range(5, small_tokenizer("unigram").vocab_size)]
    regular = [(piece, -1.0 - 0.01 * rank) for rank, piece in enumerate(pieces) if not piece.startswith("<0x")]
    return transformers.XLMRobertaTokenizer(vocab=[*((name, 0.0) for name in names), *regular, ("<mask>", 0.0)])


def load(folder: pathlib.Path, *, detection: bool) -> torch.nn.Module:
    """An exported model as a user loads it; nothing may be missing or left over."""
    auto = transformers.AutoModelForPreTraining if detection else transformers.AutoModelForMaskedLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def compare(model: torch.nn.Module, workdir: pathlib.Path, *, detection: bool) -> Differences:
    """Their logits against ours: of a row without padding, of padded rows, and of packed ones against theirs one by one."""
    with torch.no_grad():
        is_neobert = isinstance(model, NeoBert)
        pad_id, vocab_size = (0, 400) if is_neobert else (model.config.pad_token_id, model.config.vocab_size)
        tokens, segment_ids = rows(vocab_size, {pad_id}, LENGTHS, pad_id)

        def theirs(tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            more = {} if mask is None else {"attention_mask": torch.tensor(mask.astype(np.int64))}
            found = model(input_ids=torch.tensor(tokens.astype(np.int64)), **more)
            return (found if is_neobert else found.logits).numpy()

        ours = our_logits(workdir, tokens, segment_ids, detection=detection)
        whole = np.abs(ours[:1] - theirs(tokens[:1])).max()
        real = segment_ids > 0
        padded = np.abs(ours - theirs(tokens, segment_ids))[real].max()
        # Rows of 13 + 7 + 2 tokens in one.
        parts = [tokens[row, : LENGTHS[row]] for row in (1, 2, 7)]
        ids = np.repeat([1, 2, 3], [len(part) for part in parts]).astype(np.int32)
        packed = our_logits(workdir, np.concatenate(parts)[None], ids[None], detection=detection)[0]
        alone = np.concatenate([theirs(part[None])[0] for part in parts])
        return Differences(float(whole), float(padded), float(np.abs(packed - alone).max()))


def our_task_logits(workdir: pathlib.Path, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """The logits of a fine-tuned run: [B, 1, C] of texts, [B, L, C] of tokens."""
    cfg = Workdir(workdir).read_config()
    batch = {"tokens": tokens, "segment_ids": segment_ids}
    if cfg.objective == "question_answering":
        batch["allowed"] = np.ones_like(tokens)
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        task = make_task(cfg, Compute.resolve(cfg.compute))
        params, _ = read_params(Workdir(workdir), task)
        return np.asarray(jax.jit(task.outputs)(params, batch))


def compare_task(model: torch.nn.Module, workdir: pathlib.Path) -> tuple[float, float]:
    """Their logits of a task against ours, as `compare` has them: of a row without padding, and of padded rows."""
    pad_id = model.config.pad_token_id
    tokens, segment_ids = rows(model.config.vocab_size, {pad_id}, LENGTHS, pad_id)

    def theirs(count: int, **more: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            found = model(input_ids=torch.tensor(tokens[:count].astype(np.int64)), **more)
        if "start_logits" in found:
            return torch.stack([found.start_logits, found.end_logits], -1).numpy()
        return found.logits.numpy().reshape(count, -1, found.logits.shape[-1])

    ours = our_task_logits(workdir, tokens, segment_ids)
    whole = np.abs(our_task_logits(workdir, tokens[:1], segment_ids[:1]) - theirs(1)).max()
    padded = np.abs(ours - theirs(len(tokens), attention_mask=torch.tensor(segment_ids.astype(np.int64))))
    return float(whole), float(padded[segment_ids[:, : ours.shape[1]] > 0].max())


def carry_task(name: str, base: pathlib.Path) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """`carry_theirs` of a fine-tuned model."""
    case = TASKS[name]
    model = build(case.name, base / "theirs", ending=case.ending, **case.fields)
    import_folder(base / "theirs", base / "workdir")
    imported = compare_task(model, base / "workdir")
    export_run(base / "workdir", base / "out", model_type=model.config.model_type)
    auto = getattr(transformers, f"AutoModel{case.ending}")
    again, info = auto.from_pretrained(base / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(model)
    for field in case.fields:
        assert getattr(again.config, field) == getattr(model.config, field), field
    exported = compare_task(again.eval(), base / "workdir")
    before, after = (safetensors.numpy.load_file(base / part / "model.safetensors") for part in ("theirs", "out"))
    same = before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)
    return imported, exported, same


def carry_theirs(name: str, base: pathlib.Path) -> tuple[Differences, Differences, bool]:
    """Differences after the import and after the export that follows it, and whether every tensor has its bytes again."""
    case, folder = THEIRS[name], base / "theirs"
    model = build(name, folder)
    import_folder(folder, base / "workdir", fresh=case.detection)
    imported = compare(model, base / "workdir", detection=case.detection)
    model_type = model.config.model_type
    export_run(base / "workdir", base / "out", model_type=model_type)
    exported = compare(load(base / "out", detection=case.detection), base / "workdir", detection=case.detection)
    before, after = (safetensors.numpy.load_file(base / part / "model.safetensors") for part in ("theirs", "out"))
    # BERT has a second bias that nothing reads where the decoder is its own.
    tied = model.config.tie_word_embeddings
    unread = layout(model_type, "detection" if case.detection else "masked", tied=tied).copies
    read = before.keys() - unread.keys()
    same = before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in read)
    return imported, exported, same


def carry_neobert(base: pathlib.Path) -> tuple[Differences, Differences]:
    """Differences of NeoBERT's formulas, as torch computes them, from ours after the import, and after an export of ours."""
    shape = {"vocab_size": 400, "num_layers": 2, "num_heads": 4, "width": 48, "eps": 1e-5}
    model = NeoBert(dim=32, **shape).randomise().eval()
    (base / "theirs").mkdir(parents=True)
    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
    settings = {"model_type": "neobert", "vocab_size": 400, "max_length": LENGTH, "norm_eps": 1e-5, **names}
    (base / "theirs" / "config.json").write_text(json.dumps(settings))
    weights = {name: weight.detach().numpy() for name, weight in model.tensors().items()}
    safetensors.numpy.save_file(weights, base / "theirs" / "model.safetensors")
    build_tokenizer("wordpiece").save_pretrained(base / "theirs")
    import_folder(base / "theirs", base / "workdir")
    imported = compare(model, base / "workdir", detection=False)
    write_random_run(base / "ours", config(**NEOBERT))
    export_run(base / "ours", base / "out")
    with torch.no_grad():
        for name, weight in safetensors.numpy.load_file(base / "out" / "model.safetensors").items():
            model.tensors()[name].copy_(torch.tensor(weight))
    return imported, compare(model, base / "ours", detection=False)


def carry_ours(name: str, base: pathlib.Path) -> Differences:
    """Differences after the export of a random model of ours."""
    cfg, options = OURS[name]
    workdir = write_random_run(base / "workdir", cfg)
    detection = cfg.objective == "rtd" and "network" not in options
    export_run(workdir, base / "out", **options)
    return compare(load(base / "out", detection=detection), workdir, detection=detection)


def main() -> None:
    """Prints the table in Markdown."""
    transformers.utils.logging.disable_progress_bar()
    print("| model | direction | one row | padded rows | packed rows | bytes of all tensors again |")
    print("|--|--|--|--|--|--|")
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(THEIRS):
            imported, exported, same = carry_theirs(name, pathlib.Path(folder) / f"theirs{number}")
            for direction, found, kept in (("import", imported, ""), ("import, export", exported, "yes" if same else "no")):
                print(f"| {name} | {direction} | {' | '.join(f'{value:.1e}' for value in found)} | {kept} |", flush=True)
        for direction, found in zip(("import", "export"), carry_neobert(pathlib.Path(folder) / "neobert"), strict=True):
            print(f"| NeoBERT, formulas in torch | {direction} | {' | '.join(f'{value:.1e}' for value in found)} | |")
        for number, name in enumerate(TASKS):
            *found, same = carry_task(name, pathlib.Path(folder) / f"task{number}")
            for direction, values, kept in zip(
                ("import", "import, export"), found, ("", "yes" if same else "no"), strict=True
            ):
                print(f"| {name} | {direction} | {' | '.join(f'{value:.1e}' for value in values)} | | {kept} |", flush=True)
        for number, name in enumerate(OURS):
            found = carry_ours(name, pathlib.Path(folder) / f"ours{number}")
            print(f"| ours: {name} | export | {' | '.join(f'{value:.1e}' for value in found)} | |", flush=True)


if __name__ == "__main__":
    main()
