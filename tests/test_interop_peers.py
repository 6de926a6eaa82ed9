"""Live parity with `transformers`: models and tokenizers carried both ways compute the same there and here.

What needs torch is imported where it is used, so that this file is collected without it.
"""

import pytest

pytestmark = pytest.mark.peer
pytest.importorskip("torch", reason="needs the extra peers")
transformers = pytest.importorskip("transformers", reason="needs the extra peers")

import interop_parity as parity  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402
from interop_runs import MODERNBERT, TEXTS, config, our_logits, rows, small_tokenizer, write_random_run  # noqa: E402

from mlm_jax.fill_mask import Filler  # noqa: E402
from mlm_jax.inference import open_run  # noqa: E402
from mlm_jax.interop.load import import_folder  # noqa: E402
from mlm_jax.interop.save import export_run  # noqa: E402

# Float32 through two layers of random weights, in two orders of summation; the logits reach 5.
LIMIT = 1e-4
ODD = [
    "",
    "  ",
    "a  b ",
    "Ünïcödé e\u0301 E\u0301",
    "👩\u200d👩\u200d👧 🇩🇪",
    "全角　空白 中文",
    "tab\tand\nline",
    "the <0x41> [SEP]?",
]


@pytest.mark.parametrize("name", parity.THEIRS)
def test_a_model_of_theirs_there_and_back(name, tmp_path):
    imported, exported, same = parity.carry_theirs(name, tmp_path)
    assert max(imported) < LIMIT and max(exported) < LIMIT
    assert same


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n.startswith("ModernBERT") else pytest.mark.slow) for n in parity.TASKS]
)
def test_a_fine_tuned_model_of_theirs_there_and_back(name, tmp_path):
    imported, exported, same = parity.carry_task(name, tmp_path)
    assert max(imported) < LIMIT and max(exported) < LIMIT
    assert same


def test_the_comparison_of_tasks_can_fail(tmp_path):
    """By the pooling alone: the weights are the same."""
    case = parity.TASKS["ModernBERT ForSequenceClassification, mean"]
    model = parity.build(case.name, tmp_path / "theirs", ending=case.ending, **case.fields)
    import_folder(tmp_path / "theirs", tmp_path / "workdir")
    model.config.classifier_pooling = "cls"
    assert max(parity.compare_task(model, tmp_path / "workdir")) > LIMIT


@pytest.mark.parametrize("name", parity.OURS)
def test_a_model_of_ours(name, tmp_path):
    assert max(parity.carry_ours(name, tmp_path)) < LIMIT


def test_neobert_by_its_formulas_in_torch(tmp_path):
    imported, exported = parity.carry_neobert(tmp_path)
    assert max(imported) < LIMIT and max(exported) < LIMIT


def test_the_comparison_can_fail(tmp_path):
    parity.build("BERT", tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "workdir")
    other = parity.build("BERT", tmp_path / "other")
    other.bert.embeddings.LayerNorm.weight.data[0] += 0.01
    assert max(parity.compare(other, tmp_path / "workdir", detection=False)) > LIMIT


@pytest.mark.parametrize("tied", [True, False])
def test_both_networks_of_electra(tied, tmp_path):
    """The detector beside its generator; where they share no tables the detector's are the other's and a difference."""
    generator = parity.build("ELECTRA generator", tmp_path / "generator")
    detector = parity.build("ELECTRA discriminator", tmp_path / "detector")
    if tied:
        detector.electra.embeddings.load_state_dict(generator.electra.embeddings.state_dict())
    else:
        detector.electra.embeddings.word_embeddings.weight.data *= 0.5
    detector.save_pretrained(tmp_path / "detector")
    import_folder(tmp_path / "detector", tmp_path / "workdir", generator=tmp_path / "generator")
    with open_run(tmp_path / "workdir") as run:
        assert run.cfg.rtd.embedding_sharing == ("tied" if tied else "disentangled")
    assert max(parity.compare(detector, tmp_path / "workdir", detection=True)) < LIMIT
    assert max(parity.compare(generator, tmp_path / "workdir", detection=False)) < LIMIT
    export_run(tmp_path / "workdir", tmp_path / "out", network="generator")
    again = parity.load(tmp_path / "out", detection=False)
    assert max(parity.compare(again, tmp_path / "workdir", detection=False)) < LIMIT


@pytest.mark.parametrize("file", ["shards", "pytorch_model.bin", "bare encoder", "BertForPreTraining", "float16"])
def test_other_forms_of_the_same_weights(file, tmp_path):
    import torch

    model = parity.build("BERT", tmp_path / "theirs")
    folder, limit = tmp_path / "other", LIMIT
    if file == "shards":
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    elif file == "BertForPreTraining":
        whole = transformers.BertForPreTraining(model.config)
        whole.load_state_dict(model.state_dict(), strict=False)
        whole.save_pretrained(folder)
    elif file == "float16":
        model.half().save_pretrained(folder)
        model.float()
    elif file == "bare encoder":
        model.bert.save_pretrained(folder)
    else:
        folder.mkdir()
        model.config.save_pretrained(folder)
        # As BERT's first checkpoints: norms by other names, and copies of what is tied.
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = {}
        for key, value in model.state_dict().items():
            for new, name in old.items():
                key = key.replace(new, name)
            state[key] = value
        torch.save(state | {"bert.embeddings.position_ids": torch.arange(24)}, folder / file)
    parity.build_tokenizer("wordpiece").save_pretrained(folder)
    import_folder(folder, tmp_path / "workdir", fresh=file == "bare encoder")
    if file == "bare encoder":
        export_run(tmp_path / "workdir", tmp_path / "out")
        again = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
        for name, value in model.bert.state_dict().items():
            np.testing.assert_array_equal(again[f"bert.{name}"], value.numpy())
        return
    assert max(parity.compare(model, tmp_path / "workdir", detection=False)) < limit


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_their_tokenizers_are_read(kind, files, tmp_path):
    theirs = parity.build_tokenizer(kind)
    name = {"wordpiece": "BERT", "bytes": "RoBERTa", "unigram": "XLM-R"}[kind]
    parity.build(name, tmp_path / "theirs")
    if files == "vocab.txt":
        if kind == "unigram":
            pytest.skip("has no such files")
        (tmp_path / "theirs" / "tokenizer.json").unlink()
        theirs.backend_tokenizer.model.save(str(tmp_path / "theirs"))
    import_folder(tmp_path / "theirs", tmp_path / "workdir")
    with open_run(tmp_path / "workdir") as run:
        ours = run.tokenizer
    for text in [*TEXTS[:4], *ODD]:
        special = {theirs.cls_token_id, theirs.sep_token_id}
        expected = [ours.unk_id if id in special else id for id in theirs(text, add_special_tokens=False).input_ids]
        assert ours.encode(text).tolist() == expected, text
    export_run(tmp_path / "workdir", tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*TEXTS[:4], *ODD, f"the {theirs.mask_token} sat"]:
        assert again(text).input_ids == theirs(text).input_ids, text
    assert again("a", "b").input_ids == theirs("a", "b").input_ids
    for role in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(again, f"{role}_token_id") == getattr(theirs, f"{role}_token_id") == getattr(ours, f"{role}_id")


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("num_token_types", [0, 2])
def test_our_tokenizers_are_theirs_too(algorithm, num_token_types, tmp_path, caplog):
    ours = small_tokenizer(algorithm)
    write_random_run(tmp_path / "workdir", config(num_token_types=num_token_types), ours)
    export_run(tmp_path / "workdir", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not caplog.records
    for text in [*TEXTS[:4], *ODD[:-1]]:
        assert theirs(text).input_ids == [ours.cls_id, *ours.encode(text).tolist(), ours.sep_id], text
    for text in ("the [MASK] sat", "[MASK]", "a[MASK] [MASK]  [MASK]b", " [MASK] the"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode_with_masks(text).tolist(), text
    pair = theirs("the cat", "the dog")
    assert pair.input_ids.count(ours.sep_id) == 2
    types = pair.get("token_type_ids")
    assert types is None if num_token_types == 0 else set(types) == {0, 1}
    assert theirs.decode(theirs(TEXTS[0]).input_ids, skip_special_tokens=True) == TEXTS[0]
    padded = theirs(["the cat", "a"], padding=True)
    assert padded.input_ids[1][-1] == ours.pad_id and padded.attention_mask[1][-1] == 0


@pytest.mark.parametrize(("algorithm", "family"), [("bpe", "bert"), ("unigram", "modernbert")])
def test_the_fill_mask_pipeline_gives_the_same(algorithm, family, tmp_path):
    """The five best regular tokens, and their probabilities."""
    cfg = config(**MODERNBERT) if family == "modernbert" else config()
    write_random_run(tmp_path / "workdir", cfg, small_tokenizer(algorithm))
    assert export_run(tmp_path / "workdir", tmp_path / "out")["model_type"] == family
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "out"), top_k=40)
    for text in ("the [MASK] sat on the mat", "[MASK] dog ran", "a dog and a [MASK]"):
        with open_run(tmp_path / "workdir") as run:
            tokenizer = run.tokenizer
            ((ours,),) = Filler(run.objective, tokenizer)(run.params, [text], top_k=5)
        regular = [
            fill
            for fill in pipeline(text)
            if fill["token"] < tokenizer.vocab_size and fill["token"] not in tokenizer.special_ids
        ][:5]
        assert [fill["token"] for fill in ours] == [tokenizer.decode([fill["token"]]) for fill in regular]
        np.testing.assert_allclose([f["probability"] for f in ours], [f["score"] for f in regular], rtol=1e-3)


def test_rows_with_token_types_of_two_texts(tmp_path):
    """What a pair of texts gets there is computed with here as type 0, which is all that pre-training has."""
    write_random_run(tmp_path / "workdir", config(num_token_types=2))
    export_run(tmp_path / "workdir", tmp_path / "out")
    import torch

    model = parity.load(tmp_path / "out", detection=False)
    tokens, segment_ids = rows(400, {0}, [12], 0)
    theirs = model(input_ids=torch.tensor(tokens.astype(np.int64)), token_type_ids=torch.zeros((1, 12), dtype=torch.int64))
    ours = our_logits(tmp_path / "workdir", tokens, segment_ids)
    assert np.abs(ours - theirs.logits.detach().numpy()).max() < LIMIT
