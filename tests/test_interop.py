"""Hugging Face folders are read and written exactly, and what cannot be is refused by name.

No torch: the models are the frozen ones of golden/ and random ones of ours. test_interop_peers.py compares live.
"""

import errno
import json
import pathlib
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from interop_runs import LENGTH, MODERNBERT, NEOBERT, TEXTS, config, our_logits, rows, small_tokenizer, write_random_run
from test_golden import golden

from mlm_jax.cli import main
from mlm_jax.config import Config, ShardingConfig
from mlm_jax.errors import MachineError, UserError
from mlm_jax.inference import open_run
from mlm_jax.interop.folder import check_tokenizer, open_folder
from mlm_jax.interop.load import import_folder
from mlm_jax.interop.save import export_run
from mlm_jax.objectives import make_objective
from mlm_jax.sharding import ROWS, make_mesh, place
from mlm_jax.train.begin import begin
from mlm_jax.train.optimizer import make_optimizer
from mlm_jax.train.state import init_state

# The frozen models' config.json, as `transformers` writes it.
SHAPE = {
    "vocab_size": 72,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "max_position_embeddings": 20,
    "transformers_version": "5.24.0",
    "use_cache": True,
}
ELECTRA = {"model_type": "electra", "embedding_size": 16, "pad_token_id": 0, **SHAPE}
FROZEN = {
    "bert": ("bert", "", {"model_type": "bert", "pad_token_id": 0, **SHAPE}),
    "roberta": (
        "roberta",
        "",
        SHAPE
        | {"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        | {"max_position_embeddings": 22},
    ),
    "generator": (
        "electra",
        "generator/",
        ELECTRA | {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2},
    ),
    "discriminator": ("electra", "discriminator/", ELECTRA),
    "distilbert": (
        "distilbert",
        "",
        {"model_type": "distilbert", "vocab_size": 72, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}
        | {"activation": "gelu", "max_position_embeddings": 20, "pad_token_id": 0, "dropout": 0.1},
    ),
    "modernbert": (
        "modernbert",
        "",
        {"model_type": "modernbert", "vocab_size": 72, "hidden_size": 24, "num_hidden_layers": 4, "norm_eps": 1e-5}
        | {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 20, "hidden_activation": "gelu"}
        | {"global_attn_every_n_layers": 3, "local_attention": 8, "global_rope_theta": 200.0, "local_rope_theta": 30.0}
        | {"classifier_activation": "gelu", "norm_bias": False, "pad_token_id": 0, "transformers_version": "5.24.0"},
    ),
    "neobert": (
        "neobert",
        "",
        {"model_type": "neobert", "vocab_size": 72, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"intermediate_size": 60, "dim_head": 6, "max_length": 20, "norm_eps": 1e-5, "pad_token_id": 0},
    ),
}


def frozen_tensors(name: str) -> dict[str, np.ndarray]:
    """The weights of a frozen model by the names that `transformers` gives them."""
    file, network, _ = FROZEN[name]
    prefix, arrays = f"{network}weight/", golden(file)
    short = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    if name == "discriminator":  # the frozen one computes with the generator's
        short |= {
            key.removeprefix("generator/weight/"): array
            for key, array in arrays.items()
            if key.startswith("generator/weight/embeddings.")
        }
    is_short = file in ("bert", "roberta", "electra")  # these were kept without the prefix
    return {
        (f"{file}." if is_short and key.startswith(("embeddings", "encoder.")) else "") + key: short[key] for key in short
    }


def write_folder(folder: pathlib.Path, config: dict, tensors: dict[str, np.ndarray], vocab_size: int = 72) -> pathlib.Path:
    """A folder with a WordPiece tokenizer whose padding is where the config says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    if config.get("pad_token_id") == 1:
        special[:2] = special[1], special[0]
    pieces = [*special, *(f"w{index}" for index in range(vocab_size - 5))]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.save(str(folder / "tokenizer.json"))
    return folder


def frozen_folder(name: str, folder: pathlib.Path, **fields) -> pathlib.Path:
    return write_folder(folder, FROZEN[name][2] | fields, frozen_tensors(name))


def logits_with_types(workdir: pathlib.Path, file: str, *, detection: bool, tokens: np.ndarray) -> np.ndarray:
    """Ours for the frozen inputs, whose token types differ."""
    with open_run(workdir) as run:
        objective, rows = run.objective, 8
        arrays = [golden(file)[f"input/{key}"] for key in ("attention_mask", "token_type_ids")]
        placed = place(tuple(np.resize(x, (rows, x.shape[1])) for x in (tokens, *arrays)), jax.P(ROWS))

        def apply(params, tokens_BL, segment_ids_BL, types_BL):
            if detection:
                model = objective.discriminator.bind(objective.discriminator_params(params))
                return model.head(model.encoder(tokens_BL, segment_ids_BL, None, types_BL))
            model = objective.network.bind(params)
            return model.predict(model.encoder(tokens_BL, segment_ids_BL, None, types_BL))

        return np.asarray(jax.device_get(jax.jit(apply)(run.params, *placed)))[: len(tokens)]


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_model_there_and_back(name, tmp_path):
    """The logits are those that `transformers` computed, every tensor has its bytes again, and config.json its values."""
    file, network, config = FROZEN[name]
    detection = name == "discriminator"
    folder = frozen_folder(name, tmp_path / "theirs")
    found = import_folder(folder, tmp_path / "workdir", fresh=detection)
    assert found["objective"] == ("rtd" if detection else "mlm")
    arrays = golden(file)
    tokens, labels = arrays["input/input_ids"], arrays["input/labels"]
    tokens = np.where(labels >= 0, labels, tokens) if detection else tokens
    logits = logits_with_types(tmp_path / "workdir", file, detection=detection, tokens=tokens)
    expected = arrays[f"{network}logits" if network else "gelu_erf/logits"]
    real = arrays["input/attention_mask"] == 1
    # Float32 through two layers, in two orders of summation; the logits reach 4.
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=0)

    # A distilbert is a bert too, of one token type.
    export_run(tmp_path / "workdir", tmp_path / "out", model_type="distilbert" if name == "distilbert" else None)
    before, after = frozen_tensors(name), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() and before[key].shape == after[key].shape for key in before)
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = config.items() - {("use_cache", True), ("transformers_version", "5.24.0")}
    assert {key: again[key] for key, _ in kept} == dict(kept)
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("cfg", "options"),
    [
        (config(num_token_types=2), {}),
        (config(num_token_types=1, activation="gelu_erf", position_offset=1), {}),
        (config(num_token_types=2, tie_embeddings=False), {}),
        (config(num_token_types=2, table_dim=16, activation="gelu_erf"), {}),
        (config("rtd", num_token_types=2, table_dim=16), {"fresh": True}),
        (config(**MODERNBERT), {}),
        (config(**NEOBERT), {}),
    ],
    ids=["bert", "roberta", "untied", "narrow", "rtd", "modernbert", "neobert"],
)
def test_a_run_of_ours_there_and_back(cfg, options, tmp_path):
    """The same architecture, tokenizer, logits and bytes; and no part of a folder is left when it is not whole."""
    detection = cfg.objective == "rtd"
    write_random_run(tmp_path / "run", cfg)
    export_run(tmp_path / "run", tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "again", **options)
    export_run(tmp_path / "again", tmp_path / "out2")
    first, second = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "out2")
    assert first.keys() == second.keys() and all(first[key].tobytes() == second[key].tobytes() for key in first)
    tokens, segment_ids = rows(cfg.model.vocab_size, set(), [LENGTH, 9], 0)
    before, after = (our_logits(tmp_path / name, tokens, segment_ids, detection=detection) for name in ("run", "again"))
    np.testing.assert_array_equal(before, after)
    with open_run(tmp_path / "again") as run:
        names = ("vocab_size", "num_layers", "embedding_dim", "position_offset", "num_token_types", "activation", "norm_eps")
        names += ("positions", "rope_base", "local_rope_base", "local_window", "global_every", "max_positions", "mlp_dim")
        assert all(getattr(run.cfg.model, name) == getattr(cfg.model, name) for name in names)
        for text in TEXTS[:4]:
            assert run.tokenizer.encode(text).tolist() == small_tokenizer().encode(text).tolist()
        np.testing.assert_array_equal(run.tokenizer.word_starts(), small_tokenizer().word_starts())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "out2", "run"]


def test_every_verb_reads_an_imported_model(tmp_path, capsys):
    frozen_folder("bert", tmp_path / "theirs")
    workdir = str(tmp_path / "workdir")
    assert main(["import", "--from", str(tmp_path / "theirs"), "--workdir", workdir]) == 0
    count = f"{sum(array.size for array in frozen_tensors('bert').values()):,}"
    assert f"bert, {count} parameters, objective mlm" in capsys.readouterr().out
    assert main(["fill-mask", "--workdir", workdir, "w1 [MASK] w3"]) == 0
    assert "[MASK] 1: w" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("\n\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(60)))
    source = f"files:{tmp_path}/text.txt?documents=blank_line"
    assert main(["evaluate", "--workdir", workdir, "--source", source, "--seq-len", "16"]) == 0
    assert main(["export", "--workdir", workdir, "--out", str(tmp_path / "out")]) == 0
    assert f"BertForMaskedLM, {count} parameters of step 0" in capsys.readouterr().out


def test_training_begins_with_the_imported_parameters(tmp_path):
    """By the recipe that lies beside the model; a rate of almost nothing leaves the parameters where they were."""
    frozen_folder("bert", tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "workdir")
    (tmp_path / "text.txt").write_text("\n\n".join(f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4}" for i in range(60)))
    overrides = {
        "data.source": f"files:{tmp_path}/text.txt?documents=blank_line",
        "data.validation_fraction": "0.1",
        "optimizer.learning_rate": "1e-9",
        "stages[0].steps": "2",
        "stages[0].batch_size": "8",
        "stages[0].seq_len": "16",
    }
    arguments = ["train", "--config", str(tmp_path / "workdir" / "recipe.py"), "--workdir", str(tmp_path / "continued")]
    assert main([*arguments, *(f"--config.{name}={value}" for name, value in overrides.items())]) == 0
    with open_run(tmp_path / "workdir") as before, open_run(tmp_path / "continued") as after:
        assert (before.step, after.step) == (0, 2)
        for one, other in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, r"model\.num_layers=1, and init_from=.*run has 2"),
        ({"activation": "relu"}, r"model\.activation='relu', and init_from=.*run has 'gelu_tanh'"),
        ({"objective": "rtd"}, "is a run of objective='mlm', which has other parameters than 'rtd'"),
        ({"tokenizer": "unigram"}, r"has another tokenizer, with other ids: set tokenizer\.algorithm=pretrained"),
        ({"source": "absent"}, "is not a run's workdir: it has no config.json"),
    ],
)
def test_a_run_that_cannot_be_begun_with(changes, message, tmp_path):
    write_random_run(tmp_path / "run", config())
    changes = dict(changes)
    tokenizer = small_tokenizer(changes.pop("tokenizer", "bpe"))
    source = changes.pop("source", "run")
    cfg = config(changes.pop("objective", "mlm"), **changes)
    cfg = Config(**vars(cfg) | {"init_from": str(tmp_path / source)})
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])), open_run(tmp_path / "run") as run:
        objective = make_objective(cfg, run.objective.compute)
        state = init_state(objective.init(jax.random.key(0)), make_optimizer(cfg), ema=False, names=())
        with pytest.raises(UserError, match=message):
            begin(state, objective, tokenizer)


def broken(folder: pathlib.Path, how: str) -> None:
    """Damages a folder of the frozen BERT."""
    file = folder / "model.safetensors"
    tensors = tensors_of(folder)
    if how == "missing":
        del tensors["bert.encoder.layer.1.output.dense.bias"]
    elif how == "headless":
        tensors = {name: array for name, array in tensors.items() if not name.startswith("cls.")}
    elif how == "unexpected":
        tensors["classifier.weight"] = np.zeros((2, 24), np.float32)
    elif how == "more layers":
        tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(24, np.float32)
    elif how == "shape":
        tensors["bert.embeddings.position_embeddings.weight"] = np.zeros((21, 24), np.float32)
    elif how == "untied":
        tensors["cls.predictions.decoder.weight"] = np.zeros((72, 24), np.float32)
    elif how == "quantised":
        tensors["cls.predictions.bias"] = tensors["cls.predictions.bias"].astype(np.int8)
    file.unlink()
    if how == "other framework":
        (folder / "tf_model.h5").write_bytes(b"")
    elif how == "lost shard":
        index = {"weight_map": {"cls.predictions.bias": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "damaged":
        file.write_bytes(b"no such thing")
    elif how != "no weights":
        safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"the tensor bert\.encoder\.layer\.1\.output\.dense\.bias is missing; did you mean"),
        ("headless", "has an encoder and no head for pre-training: --fresh draws a new one"),
        ("unexpected", r"the tensor classifier\.weight is unexpected in a bert of 2 layers"),
        ("more layers", r"the tensor bert\.encoder\.layer\.2\.output\.dense\.bias is unexpected"),
        ("shape", r"position_embeddings\.weight is \[21, 24\], and by config\.json it is \[20, 24\]"),
        ("untied", r"config\.json ties cls\.predictions\.decoder\.weight to .* set tie_word_embeddings to false"),
        ("quantised", r"cls\.predictions\.bias is int8: quantised weights cannot be imported"),
        ("other framework", r"has no weights: none of .*; tf_model\.h5 is of another framework"),
        ("lost shard", r"index\.json names model-00001-of-00002\.safetensors, which is not there"),
        ("damaged", r"model\.safetensors cannot be read"),
        ("no weights", r"has no weights: none of model\.safetensors, pytorch_model\.bin"),
    ],
)
def test_weights_that_cannot_be_imported(how, message, tmp_path):
    broken(frozen_folder("bert", tmp_path / "theirs"), how)
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "theirs", tmp_path / "workdir")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_pre_training_does_without_is_left_out(tmp_path):
    """Copies of tied tensors, the pooler, the head for next sentences; and a bare encoder gets a new head when asked."""
    folder, tensors = tmp_path / "theirs", frozen_tensors("bert")
    more = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "cls.seq_relationship.weight": np.zeros((2, 24), np.float32),
        "bert.pooler.dense.weight": np.zeros((24, 24), np.float32),
        "bert.embeddings.position_ids": np.arange(20)[None],
    }
    write_folder(folder, FROZEN["bert"][2], tensors | more)
    import_folder(folder, tmp_path / "workdir")
    export_run(tmp_path / "workdir", tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()

    encoder = {name.removeprefix("bert."): array for name, array in tensors.items() if name.startswith("bert.")}
    write_folder(folder, FROZEN["bert"][2], encoder)
    import_folder(folder, tmp_path / "bare", fresh=True)
    export_run(tmp_path / "bare", tmp_path / "out2")
    again = tensors_of(tmp_path / "out2")
    assert all(again[f"bert.{name}"].tobytes() == array.tobytes() for name, array in encoder.items())
    assert again["cls.predictions.transform.dense.weight"].std() > 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "t5"},
            "model_type='t5', and only bert, roberta, xlm-roberta, electra, distilbert, modernbert, n",
        ),
        ({"model_type": "robert"}, "did you mean 'roberta'"),
        ({"rotary_dim": 8}, "config.json has rotary_dim=8, a field of which is not known whether it changes what bert"),
        ({"hidden_sizes": 24}, "hidden_sizes=24, .* did you mean 'hidden_size'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key', and only 'absolute' is computed here"),
        ({"is_decoder": True}, "is_decoder=True, and only False is computed here"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh', and only gelu, .* are computed here"),
        ({"num_hidden_layers": "two"}, r"model\.num_layers='two' is not a whole number"),
        ({"num_attention_heads": 5}, r"model\.embed_dim=24 is no multiple of model\.num_heads=5"),
        ({"vocab_size": 71}, "the tokenizer has 72 ids and the model 71: they do not belong together"),
        ({"num_hidden_layers": 3}, r"the tensor bert\.encoder\.layer\.2\..* is missing"),
    ],
)
def test_a_config_that_cannot_be_imported(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        import_folder(frozen_folder("bert", tmp_path / "theirs", **fields), tmp_path / "workdir")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("modernbert", {"attention_bias": True}, "attention_bias=True, and only False is computed here"),
        ("modernbert", {"mlp_dropout": 0.1}, r"mlp_dropout=0\.1, and only 0\.0 is computed here"),
        (
            "modernbert",
            {"hidden_act": "gelu"},
            "hidden_act='gelu', a field of which .* mean 'hidden_activation'",
        ),
        ("modernbert", {"classifier_activation": "relu"}, "classifier_activation='relu' and hidden_activation='gelu', and"),
        (
            "modernbert",
            {"classifier_bias": True},
            "classifier_bias=True, and the masked-language-model head is computed here w",
        ),
        ("modernbert", {"rope_scaling": {"factor": 2.0}}, "rope_scaling=.*, and only None is computed here"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
            "rope_parameters.full_attention=.*yarn.* and only rope_theta is computed here",
        ),
        (
            "modernbert",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"][::-1]},
            "layer_types=.*the first layer and then one in every few sees the whole text",
        ),
        ("modernbert", {"local_attention": "wide"}, "config.json is none of a modernbert"),
        (
            "modernbert",
            {"num_hidden_layers": 3},
            r"the tensor model\.layers\.3\.\S+ is unexpected in a modernbert",
        ),
        ("neobert", {"hidden_act": "gelu"}, "hidden_act='gelu', and only 'SwiGLU' is computed here"),
        ("neobert", {"rms_norm": False}, "rms_norm=False, and only True is computed here"),
        ("neobert", {"intermediate_size": 96}, r"ffn\.w3\.weight is \[24, 40\], and by config.json it is \[24, 64\]"),
        ("distilbert", {"hidden_size": 24}, "hidden_size=24, a field of which is not known whether it changes what distil"),
        ("roberta", {"hidden_act": "gelu_new"}, "the masked-language-model head of roberta is gelu_erf whatever"),
        ("roberta", {"pad_token_id": 2}, "has pad_token_id=2, and the tokenizer's is 0: they do not belong together"),
        ("roberta", {"pad_token_id": None}, "roberta counts positions from behind the first, a whole number"),
        ("generator", {"hidden_act": "relu"}, "the masked-language-model head of electra is gelu_erf whatever"),
        ("discriminator", {}, "is a detector of replaced tokens, .* with --generator, or draw a new one with --fresh"),
    ],
)
def test_a_family_s_own_rules(name, fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        import_folder(frozen_folder(name, tmp_path / "theirs", **fields), tmp_path / "workdir")


def test_a_tokenizer_of_far_fewer_ids_is_worth_a_warning(tmp_path, caplog):
    """Tables padded by a few rows are not."""
    folder = open_folder(frozen_folder("bert", tmp_path / "theirs"))
    for ids, expected in (
        (66, []),
        (10, ["the tokenizer has 10 ids and the model 72: look whether it is this model's own"]),
    ):
        caplog.clear()
        check_tokenizer(types.SimpleNamespace(vocab_size=ids, pad_id=0), folder)
        assert [record.getMessage().removeprefix(f"{folder.path}: ") for record in caplog.records] == expected


def test_a_generator_that_does_not_belong(tmp_path):
    detector, generator = (frozen_folder(name, tmp_path / name) for name in ("discriminator", "generator"))
    import_folder(detector, tmp_path / "workdir", generator=generator)
    with open_run(tmp_path / "workdir") as run:
        assert (run.cfg.rtd.generator_size, run.cfg.rtd.embedding_sharing) == (0.5, "tied")
    with pytest.raises(UserError, match="--generator is for a detector of replaced tokens, and is a masked language"):
        import_folder(generator, tmp_path / "other", generator=detector)
    config = json.loads((generator / "config.json").read_text())
    (generator / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"its norm_eps is 1e-05, and that of a generator of 0\.5 of the detector's width"):
        import_folder(detector, tmp_path / "other", generator=generator)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, "has no config.json: it is no Hugging Face folder"),
        ({"config.json": "{"}, "config.json is not JSON"),
        ({"config.json": "[]"}, "config.json is not a dictionary"),
        ({"tokenizer.json": None}, "has no tokenizer: none of tokenizer.json, vocab.txt"),
        ({"tokenizer.json": "{"}, "this is not a tokenizer.json"),
        ({"tokenizer.json": None, "sentencepiece.bpe.model": ""}, "whose ids are not the model's"),
        ({"tokenizer.json": None, "vocab.txt": "a\nb\n"}, "its vocabulary has no pad token"),
    ],
)
def test_a_folder_that_lacks_something(files, message, tmp_path):
    folder = frozen_folder("bert", tmp_path / "theirs")
    for name, content in files.items():
        (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        import_folder(folder, tmp_path / "workdir")


def test_nothing_is_overwritten(tmp_path):
    folder = frozen_folder("bert", tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    import_folder(folder, tmp_path / "empty")
    for out, act in (("empty", import_folder), ("theirs", import_folder)):
        with pytest.raises(UserError, match="is not an empty folder, and nothing in it is overwritten"):
            act(folder, tmp_path / out)
    with pytest.raises(UserError, match="is not an empty folder, and nothing in it is overwritten"):
        export_run(tmp_path / "empty", tmp_path / "theirs")
    with pytest.raises(UserError, match="there is no folder"):
        import_folder(tmp_path / "absent", tmp_path / "new")
    with pytest.raises(UserError, match="import works on local folders"):
        import_folder(folder, "gs://bucket/run")
    with pytest.raises(UserError, match="export writes a local folder"):
        export_run(tmp_path / "empty", "gs://bucket/out")


@pytest.mark.parametrize(
    ("cfg", "options", "message"),
    [
        (config("diffusion"), {}, "objective='diffusion' cannot be exported"),
        (config("hybrid"), {}, "objective='hybrid' cannot be exported"),
        (config(), {"network": "generator"}, "--network=generator is for objective='rtd', and this run's is 'mlm'"),
        (config("rtd"), {"network": "both"}, "--network=both is none of discriminator, generator"),
        (config(), {"model_type": "brt"}, "--model-type=brt is none of bert, .* did you mean 'bert'"),
        (config(), {"model_type": "roberta"}, "'gelu_tanh', but the masked-language-model head of roberta is gelu_erf"),
        (config(table_dim=16), {"model_type": "bert"}, "this model's are 16 wide and projected to 32: use electra"),
        (config(table_dim=16), {}, "'gelu_tanh', but the masked-language-model head of electra is gelu_erf"),
        (config(positions="alibi"), {}, "model.positions='alibi', and bert computes with 'learned'"),
        (config(gated_mlp=True), {}, "model.gated_mlp=True, and bert computes with False"),
        (config(), {"model_type": "modernbert"}, "model.positions='learned', and modernbert computes with 'rope'"),
        (config(num_token_types=2), {"model_type": "distilbert"}, "num_token_types=2, and distilbert computes with 0"),
        (config(norm_eps=1e-5), {"model_type": "distilbert"}, "norm_eps=1e-05, and distilbert computes with 1e-12"),
        (config(**NEOBERT | {"mlp_dim": 44}), {}, "mlp_dim=44 is no multiple of 8, as every neobert's is"),
        (config("rtd"), {"model_type": "bert"}, "--model-type=bert has no class that detects replaced tokens"),
    ],
)
def test_a_run_that_cannot_be_exported(cfg, options, message, tmp_path):
    write_random_run(tmp_path / "run", cfg)
    with pytest.raises(UserError, match=message):
        export_run(tmp_path / "run", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    write_random_run(tmp_path / "run", config())

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlm_jax.interop.save.save_file", full)
    with pytest.raises(MachineError, match=r"cannot write .*out: No space left on device; start again, nothing was written"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
