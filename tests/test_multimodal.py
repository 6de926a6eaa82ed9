"""Texts with images: read from files, tars and TFDS, kept beside their text, shown to the model, and used by it."""

import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import tarfile

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tiny_step import QUICK

from mlm_jax.cli import main
from mlm_jax.config import Config, DataConfig, ModelConfig, ShardingConfig, StageConfig, TokenizerConfig, check
from mlm_jax.data import images, units
from mlm_jax.data.corpus import identity
from mlm_jax.data.loader import Rows, batches
from mlm_jax.data.mixture import Mixture, whole_parts
from mlm_jax.data.prepare import open_corpus, prepare
from mlm_jax.data.sources import open_source
from mlm_jax.errors import UserError
from mlm_jax.inference import open_run, pack_source
from mlm_jax.model import patches
from mlm_jax.model.encoder import Compute
from mlm_jax.model.patches import Image as Seen
from mlm_jax.objectives import make_objective
from mlm_jax.sharding import make_mesh

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 30), "blue": (20, 30, 220), "black": (0, 0, 0), "yellow": (240, 230, 10)}
THINGS = ("cup", "hat", "box", "key", "door", "lamp", "road", "ship")
SIDE = 12
# The thing is not to be seen; the colour is, and nothing else tells it.
RECORDS = [
    {"image": f"pictures/{number}.png", "caption": f"{colour} {thing}", "colour": colour}
    for number, (colour, thing, _) in enumerate(itertools.product(COLOURS, THINGS, range(6)))
]
RECIPE = r"""
import ml_collections
def get_config():
    return ml_collections.ConfigDict({{
        "name": "pictures",
        "objective": "image_text",
        "data": {{"source": {source!r}, "validation_fraction": 0.2, "max_segments": 1}},
        "tokenizer": {{"algorithm": "regex", "pattern": r" ?\w+", "vocab_size": 64}},
        "model": {{"vocab_size": 64, "num_layers": 1, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64, "max_positions": 16,
                  "init_std": 0.1, "image_size": 12, "patch_size": 6}},
        "masking": {{"rate": 0.25}},
        "optimizer": {{"learning_rate": 1e-2, "warmup_steps": 10}},
        "stages": ({{"steps": 120, "seq_len": 16, "batch_size": 32}},),
        "train": {{"log_every": 40, "checkpoint_every": 1000}},
        "evaluation": {{"every": 0, "max_rows": 64}},
    }}).lock()
"""


def png(colour: tuple[int, ...], mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (9, 9), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pictures of one colour each, as files and in a tar, with their captions as JSONL, TSV and CSV."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "pictures").mkdir()
    for number, record in enumerate(RECORDS):
        shade = np.clip(np.array(COLOURS[record["colour"]]) + number % 7, 0, 255)
        (folder / record["image"]).write_bytes(png(tuple(shade.tolist())))
    (folder / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    head = ["caption", "colour", "image"]
    rows = [head, *([record[name] for name in head] for record in RECORDS)]
    (folder / "labels.tsv.gz").write_bytes(gzip.compress("".join("\t".join(row) + "\n" for row in rows).encode()))
    (folder / "labels.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        tar.add(folder / "pictures", "./pictures")
    return folder


@pytest.fixture(scope="module")
def uri(folder: pathlib.Path) -> str:
    return f"images:{folder}/labels.jsonl?field=caption"


@pytest.fixture(scope="module")
def workdir(folder: pathlib.Path, uri: str) -> pathlib.Path:
    """A run that was trained from the command line."""
    (folder / "recipe.py").write_text(RECIPE.format(source=uri))
    assert main(["train", "--config", str(folder / "recipe.py"), "--workdir", str(folder / "run"), "--workers", "1"]) == 0
    return folder / "run"


def config(**data: object) -> Config:
    return Config(
        name="test",
        objective="image_text",
        data=DataConfig(**{"max_segments": 1} | data),
        model=ModelConfig(
            vocab_size=384,
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            mlp_dim=64,
            max_positions=16,
            image_size=12,
            patch_size=6,
        ),
        tokenizer=TokenizerConfig(algorithm="regex", pattern=r" ?\w+", vocab_size=64),
        stages=(StageConfig(seq_len=16),),
    )


# --- where texts and images come from ---------------------------------------------------------------------------------


def test_every_kind_of_file_and_a_tar_give_the_same_pairs(folder: pathlib.Path, uri: str) -> None:
    wanted = [(record["caption"], record["image"]) for record in RECORDS]
    content = [(folder / record["image"]).read_bytes() for record in RECORDS]
    others = [f"images:{folder}/{name}?field=caption" for name in ("labels.tsv.gz", "labels.csv")]
    for one in (uri, *others, f"{uri}&tar={folder}/*.tar"):
        source = pickle.loads(pickle.dumps(open_source(one)))  # as the workers of `prepare` have it
        assert [images.split(document) for document in source.documents()] == wanted
        assert [source.images.read(name) for _, name in wanted] == content


def test_images_of_several_files_are_named_from_their_common_folder(tmp_path: pathlib.Path) -> None:
    for part in ("a", "b/c"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "x.png").write_bytes(png((1, 2, 3)))
        (tmp_path / part / "y.jsonl").write_text(json.dumps({"text": part, "image": "x.png"}))
    source = open_source(f"images:{tmp_path}/**/y.jsonl")
    assert [images.split(document) for document in source.documents()] == [("a", "a/x.png"), ("b/c", "b/c/x.png")]
    assert source.images.read("b/c/x.png") == png((1, 2, 3))


def test_several_fields_make_one_text_and_a_list_in_one_field_several() -> None:
    record = {"name": "fox", "words": ["red", "", "tail"], "captions": {"text": ["a fox", b"two foxes"]}, "no": None}
    assert images.texts_of(record, ["name", "words", "no"], "here") == ["fox, red, tail"]
    assert images.texts_of(record, ["words"], "here") == ["red", "tail"]
    assert images.texts_of(record, ["captions/text"], "here") == ["a fox", "two foxes"]
    assert images.texts_of(record, ["no"], "here") == []
    with pytest.raises(UserError, match=r"here: no field 'txt'; there are 'text' \(\?field=NAME chooses\)"):
        images.texts_of(record, ["captions/txt"], "here")
    with pytest.raises(UserError, match="here: field 'captions' holds dict, not text"):
        images.texts_of(record, ["captions"], "here")


class Captioned(tfds.core.GeneratorBasedBuilder):
    """As coco_captions: an image and several texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
        features = {"image": tfds.features.Image(encoding_format="png"), "captions": captions}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(6):
            captions = [{"id": index, "text": f"picture {number} {index}"} for index in range(2)]
            yield number, {"image": io.BytesIO(png((number, 0, 0))), "captions": captions}


def test_tfds_gives_the_captions_of_each_image(tmp_path: pathlib.Path) -> None:
    Captioned(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    found = f"tfds:captioned#train?data_dir={tmp_path}&field=captions/text"
    source = pickle.loads(pickle.dumps(open_source(f"{found}&image=image")))
    pairs = [images.split(document) for document in source.documents()]
    assert sorted(text for text, _ in pairs) == [f"picture {number} {index}" for number in range(6) for index in range(2)]
    for text, name in pairs:
        assert source.images.read(name) == png((int(text.split()[1]), 0, 0))
    with pytest.raises(UserError, match=r"no image 'captions'; there are .*\(\?image=NAME chooses\)"):
        open_source(f"{found}&image=captions")


@pytest.mark.parametrize(
    ("line", "option", "message"),
    [
        ({"text": "a", "image": "none.png"}, "", r"y.jsonl, line 2: no image file .*/none.png"),
        ({"text": "a", "image": "none.png"}, "tar=x.tar", r"y.jsonl, line 2: x.tar has no member 'none.png'"),
        ({"text": "a", "image": None}, "", "y.jsonl, line 2: the field 'image' names no image"),
        ({"text": "a", "picture": "x.png"}, "", r"line 2: no field 'image'; there are 'text', 'picture' \(\?image=NAME"),
        ({"text": "a", "image": 3}, "", r"line 2: field 'image' holds int, not text \(\?image=NAME"),
        ({"image": "x.png"}, "", r"line 2: no field 'text'; there are 'image' \(\?field=NAME"),
        ({"text": "\ud800", "image": "x.png"}, "", "line 2: no valid text"),
        ({}, "tar=x.tar.gz", "x.tar.gz is no tar, or a compressed one"),
        ({}, "tar=none.tar", "no file matches none.tar"),
        ({}, "pixels=3", "no option 'pixels' here, there are field, image, tar"),
    ],
)
def test_mistakes_in_records(line, option, message, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(png((1, 2, 3)))
    with tarfile.open("x.tar", "w") as tar, tarfile.open("x.tar.gz", "w:gz") as packed:
        tar.add("x.png")
        packed.add("x.png")
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": "fine", "image": "x.png"}) + "\n" + json.dumps(line))
    with pytest.raises(UserError, match=message):
        list(open_source(f"images:{tmp_path}/y.jsonl{option and '?'}{option}").documents())


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_whatever_is_in_a_file_becomes_rgb_on_white() -> None:
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    transparent = Image.new("P", (9, 9), 1)
    transparent.putpalette([0, 0, 0, 200, 100, 50])
    made = {
        "RGB": (Image.new("RGB", (9, 9), (200, 100, 50)), (200, 100, 50)),
        "opaque": (Image.new("RGBA", (9, 9), (200, 100, 50, 255)), (200, 100, 50)),
        "half": (Image.new("RGBA", (9, 9), (200, 100, 50, 51)), (244, 224, 214)),
        "none": (Image.new("RGBA", (9, 9), (200, 100, 50, 0)), (255, 255, 255)),
        "grey": (Image.new("L", (9, 9), 77), (77, 77, 77)),
        "grey and alpha": (Image.new("LA", (9, 9), (77, 0)), (255, 255, 255)),
        "16 bits": (Image.fromarray(np.full((9, 9), 77 * 256 + 3, np.uint16)), (77, 77, 77)),
        "1 bit": (Image.new("1", (9, 9), 0), (0, 0, 0)),
        "palette": (palette, (200, 100, 50)),
        "transparent palette": (transparent, (255, 255, 255)),
    }
    for name, (image, colour) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **({"transparency": 1} if name == "transparent palette" else {}))
        pixels = images.decode(buffer.getvalue(), name, 4, "stretch")
        assert pixels.dtype == np.uint8 and pixels.shape == (4, 4, 3)
        np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(colour), (4, 4, 3)), err_msg=name)


def test_an_oblong_is_padded_cropped_or_stretched_and_turned_as_the_camera_says() -> None:
    oblong = np.zeros((4, 8, 3), np.uint8)
    oblong[:, :2], oblong[:, 6:] = (255, 0, 0), (0, 0, 255)  # red, black, blue from left to right

    def found(resize: str, **options: object) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(oblong).save(buffer, "PNG", **options)
        return images.decode(buffer.getvalue(), "x", 4, resize)

    padded, cropped, stretched = (found(resize) for resize in ("pad", "crop", "stretch"))
    assert (padded[[0, 3]] == 255).all() and (padded[1:3, 0, 1:] < 60).all()
    assert (cropped == 0).all()
    assert (stretched[:, 0, 0] > 200).all() and (stretched[:, 3, 2] > 200).all() and (stretched[:, 1:3] < 60).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # the left side is up
    assert (found("stretch", exif=turned)[0, :, 0] > 200).all()


def test_what_is_no_image_is_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for content in (b"", b"no image", png((1, 2, 3))[:45]):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError, match=r"/x.png cannot be read as an image: .*; repair it, or take its record out"):
            images.Decoder(images.Folder(str(tmp_path)), 8, "pad")("x.png")


def test_patches_are_cut_from_left_to_right_and_top_to_bottom() -> None:
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        pixels = jax.device_put(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(1, 4, 4, 3))
        found = np.asarray(patches.cut(pixels, 2))
        targets = np.asarray(patches.normalised(patches.cut(pixels, 2)))
    numbers = np.arange(48).reshape(4, 4, 3)
    wanted = [numbers[y : y + 2, x : x + 2].ravel() for y in (0, 2) for x in (0, 2)]
    np.testing.assert_allclose(found[0], np.array(wanted) / 127.5 - 1.0, atol=1e-6)
    np.testing.assert_allclose(targets.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(targets.std(-1), 1.0, atol=1e-3)  # but for 1e-6 beside a variance of 0.003


# --- rows -------------------------------------------------------------------------------------------------------------


def colour_of(pixels: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: np.abs(pixels.reshape(-1, 3).mean(0) - COLOURS[name]).sum())


def test_a_row_has_the_image_of_its_text_in_both_splits(workdir: pathlib.Path) -> None:
    corpus = open_corpus(workdir / "data")
    seen = []
    for split in ("train", "validation"):
        rows = Rows(corpus.path, 16, split)
        read = rows.read(range(len(rows)))
        assert read["images"].dtype == np.uint8 and read["images"].shape == (len(rows), SIDE, SIDE, 3)
        assert read["segment_ids"].max() == 1
        for tokens, pixels in zip(read["tokens"], read["images"], strict=True):
            seen.append((*tokens[1:3].tolist(), colour_of(pixels)))
    encode = corpus.tokenizer.encode
    assert sorted(seen) == sorted((*encode(record["caption"]).tolist(), record["colour"]) for record in RECORDS)


def test_all_texts_of_an_image_are_in_one_split() -> None:
    documents = [images.join(f"text {number}", f"{number % 40}.png").encode() for number in range(200)]
    halves = [(units.document_hash(document)[:8], units.document_hash(document)[8:]) for document in documents]
    assert len({first for first, _ in halves}) == 40 and len({last for _, last in halves}) == 200
    assert all(first == halves[number % 40][0] for number, (first, _) in enumerate(halves))


def test_each_piece_of_a_long_text_has_its_image(tmp_path: pathlib.Path) -> None:
    texts = {name: " ".join(f"{name} {thing}" for thing in THINGS) for name in COLOURS}
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    lines = [json.dumps({"text": text, "image": f"{name}.png"}) + "\n" for name, text in texts.items()]
    (tmp_path / "long.jsonl").write_text("".join(lines))
    uri = f"images:{tmp_path}/long.jsonl"
    corpus = prepare(config(source=uri, validation_fraction=0.0), tmp_path / "corpus", workers=1)
    rows, tokenizer = Rows(corpus.path, 16), corpus.tokenizer
    read = rows.read(range(len(rows)))
    lengths = dict.fromkeys(COLOURS, 0)
    for tokens, segment_ids, pixels in zip(*read.values(), strict=True):
        ids, piece = tokenizer.encode(texts[colour_of(pixels)]).tolist(), tokens[segment_ids > 0][1:-1].tolist()
        assert any(ids[start : start + len(piece)] == piece for start in range(len(ids)))
        lengths[colour_of(pixels)] += len(piece)
    assert lengths == {name: len(tokenizer.encode(text)) for name, text in texts.items()} and len(rows) >= 2 * len(texts)
    # The corpus knows how its images were made.
    with pytest.raises(UserError, match=r"data\.image_resize='pad', and the config has 'crop'"):
        prepare(config(source=uri, validation_fraction=0.0, image_resize="crop"), corpus.path)


def test_text_alone_knows_nothing_of_images() -> None:
    assert not {"image_size", "image_resize"} & identity(Config(name="text"))["data"].keys()
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        text = Config(name="text")
        params = jax.eval_shape(make_objective(text, Compute.resolve(text.compute)).init, jax.random.key(0))
    assert "patches" not in params["encoder"]


# --- another's image --------------------------------------------------------------------------------------------------


def test_half_of_the_examples_are_shown_anothers_image_whatever_is_around_them() -> None:
    ids, epochs = np.arange(2000, dtype=np.int32), np.zeros(2000, np.int32)
    exchanged, others = images.draw_others(ids, epochs, 2000, 0.5, seed=3)
    assert abs(exchanged.mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert (others != ids).all() and others.min() >= 0 and others.max() < 2000 and len({*others.tolist()}) > 1000
    part = slice(700, 900)
    for one, other in zip(images.draw_others(ids[part], epochs[part], 2000, 0.5, 3), (exchanged, others), strict=True):
        np.testing.assert_array_equal(one, other[part])
    for changed in ((ids, epochs + 1, 2000, 0.5, 3), (ids, epochs, 2000, 0.5, 4)):
        assert (images.draw_others(*changed)[1] != others).mean() > 0.9
    assert not images.draw_others(ids, epochs, 2000, 0.0, 3)[0].any()
    assert not images.draw_others(ids[:1], epochs[:1], 1, 0.5, 3)[0].any()


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_are_the_same_after_a_resume_and_on_two_processes(mixed: bool, workdir: pathlib.Path) -> None:
    rows = Rows(workdir / "data", 16)
    if mixed:
        parts = {"a": rows, "b": Rows(workdir / "data", 16, "validation")}
        rows = Mixture(parts, whole_parts([0.7, 0.3]))
    arguments = {"batch_size": 16, "first_position": 0, "seed": 5, "exchanged": 0.5}
    whole = list(batches(rows, start_step=0, num_steps=20, **arguments))
    for step, resumed in enumerate(batches(rows, start_step=7, num_steps=13, **arguments), start=7):
        halves = [
            next(batches(rows, start_step=step, num_steps=1, local_rows=local, **arguments))
            for local in (range(8), range(8, 16))
        ]
        for name, array in whole[step].items():
            np.testing.assert_array_equal(resumed[name], array)
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)
    own = rows.read(np.arange(len(rows)))["images"]
    for batch in whole:
        is_own = (batch["images"] == own[batch["example_ids"]]).all((1, 2, 3))
        assert is_own[batch["matches"] == 1].all()
        _, others = images.draw_others(batch["example_ids"], batch["epochs"], len(rows), 0.5, 5)
        shown = np.where(batch["matches"] == 1, batch["example_ids"], others)
        np.testing.assert_array_equal(batch["images"], own[shown])
    assert 0.35 < np.mean([batch["matches"].mean() for batch in whole]) < 0.65


# --- the model and the verbs ------------------------------------------------------------------------------------------


def test_masked_text_is_better_with_its_image_than_with_anothers_or_none(workdir: pathlib.Path, capsys) -> None:
    assert main(["evaluate", "--workdir", str(workdir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Half of the masked words are colours, each of them one of five, and the image alone tells which.
    assert found["loss"] + 0.5 < found["loss_no_image"] < found["unigram_loss"]
    assert found["loss"] + 0.5 < found["loss_shuffled_image"]
    assert found["accuracy"] > max(found["accuracy_no_image"], found["accuracy_shuffled_image"])
    trained = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert trained["loss_no_image"] == pytest.approx(found["loss_no_image"], rel=1e-5)


def test_a_source_of_images_can_be_evaluated_and_one_without_is_refused(workdir: pathlib.Path, uri: str, capsys) -> None:
    with open_run(workdir) as run:
        rows = pack_source(run, uri, 16)
        named = {run.tokenizer.encode(name)[0]: name for name in COLOURS}
    assert len(rows["images"]) == len(rows["tokens"]) == run.cfg.evaluation.max_rows
    assert [colour_of(pixels) for pixels in rows["images"]] == [named[token] for token in rows["tokens"][:, 1]]
    assert main(["evaluate", "--workdir", str(workdir), "--source", "builtin:python_docs"]) == 2
    assert "model.image_size=12 wants an image with each text, and builtin:python_docs has none" in capsys.readouterr().err


def test_fill_mask_sees_the_image(workdir: pathlib.Path, folder: pathlib.Path, capsys) -> None:
    picture = next(record["image"] for record in RECORDS if record["colour"] == "blue")
    assert main(["fill-mask", "--workdir", str(workdir), "--image", str(folder / picture), "[MASK] cup", "[MASK] hat"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("[MASK] 1: blue") == 2 and "--image" not in shown.err
    assert main(["fill-mask", "--workdir", str(workdir), "[MASK] cup"]) == 0
    assert "without --image the model sees the text alone" in capsys.readouterr().err


def test_generate_and_score_say_that_they_show_no_image(workdir: pathlib.Path, folder: pathlib.Path, capsys) -> None:
    said = "mlm-jax: .*this run was trained on texts with images, and here it sees the text alone\n"
    (folder / "pairs.jsonl").write_text('{"sentence_good": "red cup", "sentence_bad": "red red"}\n')
    for arguments in (["generate", "--prompt", "[MASK] cup", "--json"], ["score", "--pairs", str(folder / "pairs.jsonl")]):
        assert main([*arguments, "--workdir", str(workdir)]) == 0
        shown = capsys.readouterr()
        assert re.fullmatch(said, shown.err)
        assert "--json" not in arguments or "sees the text alone" in json.loads(shown.out.splitlines()[-1])["caution"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fill-mask", "[MASK]", "--image", "none.png"], "--image: no image file none.png"),
        (["fill-mask", "[MASK]", "--image", "labels.jsonl"], "labels.jsonl cannot be read as an image"),
        (["export", "--out", "exported"], "reads images and cannot be exported"),
    ],
)
def test_mistakes_with_a_run(arguments, message, workdir, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert main([*arguments, "--workdir", str(workdir)]) == 2
    assert message in capsys.readouterr().err and not os.path.exists("exported")


def test_the_text_alone_is_what_an_image_out_of_sight_leaves() -> None:
    """Without an image the program has no patches; its text is as if the text saw none of them."""
    cfg = config()
    tokens, segment_ids = np.full((2, 16), 7, np.int32), np.ones((2, 16), np.int32)
    segment_ids[1] = 2  # the image is the first segment's
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def encode(params, pixels):
        encoder = objective.network.bind(params).encoder
        return encoder(tokens, segment_ids), encoder(tokens, segment_ids, image=Seen(pixels))

    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        objective = make_objective(cfg, Compute.resolve(cfg.compute))
        rng, shapes = np.random.default_rng(1), jax.eval_shape(objective.init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.1, leaf.shape).astype(np.float32), shapes)
        alone, beside = jax.device_get(encode(params, pixels))
    assert beside.shape == (2, 16 + cfg.model.num_patches, 32)
    difference = np.abs(beside[:, :16] - alone).max((1, 2))
    assert difference[0] > 1e-3 and difference[1] < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"patch_size": 5}}, r"model.image_size=12 is no multiple of model.patch_size=5: .* one of 15"),
        ({"model": {"image_size": 0}}, "objective='image_text' reads an image with each text, and model.image_size=0"),
        ({"objective": "mlm"}, "model.image_size=12 is for objective='image_text', and this is objective='mlm'"),
        ({"model": {"positions": "rope"}}, "patches have learned positions"),
        ({"data": {"max_segments": 16}}, "data.max_segments=16, and a row that has an image has one text: set it to 1"),
        (
            {"data": {"image_resize": "croop"}},
            "data.image_resize='croop' is none of pad, crop, stretch; did you mean 'crop'",
        ),
        ({"image_text": {"patch_mask_rate": 0.1}}, "patch_mask_rate=0.1 hides none or all of an image's 4 patches"),
        ({"image_text": {"exchange_rate": 0.0}}, r"image_text.exchange_rate=0.0 must be in \(0, 1\)"),
    ],
)
def test_mistakes_in_a_config(changes: dict, message: str) -> None:
    cfg = config()
    for section, fields in changes.items():
        new = fields if isinstance(fields, str) else dataclasses.replace(getattr(cfg, section), **fields)
        cfg = dataclasses.replace(cfg, **{section: new})
    with pytest.raises(UserError, match=message):
        check(cfg)
