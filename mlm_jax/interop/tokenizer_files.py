"""Tokenizers of Hugging Face folders: read into ours from whatever files there are, and written as `transformers` reads."""

import json
import logging
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.data.tokenizer_models import SentencePieceModel
from mlm_jax.errors import UserError
from mlm_jax.interop.fast import fast_tokenizer, surround

logger = logging.getLogger(__name__)

_SENTENCEPIECE = ("spiece.model", "spm.model", "tokenizer.model")


def read_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        UserError: there is none, or none that can be used.
    """
    if (folder / "tokenizer.json").exists():
        return load_tokenizer(folder / "tokenizer.json")
    if (folder / "vocab.txt").exists():
        return _built(folder / "vocab.txt", _word_piece(folder))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _built(folder / "vocab.json", _byte_level(folder))
    if (folder / "sentencepiece.bpe.model").exists():
        raise UserError(
            f"{folder} has a sentencepiece.bpe.model, whose ids are not the model's, and no tokenizer.json: write one with "
            "transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    for name in _SENTENCEPIECE:
        if (folder / name).exists():
            return load_tokenizer(folder / name)
    raise UserError(
        f"{folder} has no tokenizer: none of tokenizer.json, vocab.txt, vocab.json with merges.txt, spiece.model"
    )


def _built(file: pathlib.Path, fast: tokenizers.Tokenizer) -> Tokenizer:
    try:
        return Tokenizer("tokenizer.json", fast.to_str().encode())
    except UserError as error:
        raise UserError(f"tokenizer {file}: {error}") from error


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def _word_piece(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """BERT's tokenizer of a vocab.txt, with its defaults for what tokenizer_config.json leaves out."""
    settings = _settings(folder)
    lowercase = bool(settings.get("do_lower_case", True))
    logger.info("vocab.txt without a tokenizer.json: BERT's tokenizer, do_lower_case=%s", lowercase)
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    pieces = pieces[:-1] if pieces and not pieces[-1] else pieces
    vocab = {piece.rstrip("\r"): index for index, piece in enumerate(pieces)}
    fast = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=lowercase,
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece("##")
    return fast


def _byte_level(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """RoBERTa's tokenizer of a vocab.json and a merges.txt."""
    try:
        core = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the package raises bare Exceptions for all that it cannot parse
        raise UserError(f"{folder / 'vocab.json'} and merges.txt cannot be read: {error}") from error
    fast = tokenizers.Tokenizer(core)
    prefix = bool(_settings(folder).get("add_prefix_space", False))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    cls, sep = fast.token_to_id("<s>"), fast.token_to_id("</s>")
    if cls is not None and sep is not None:  # else it is told which of the special tokens is not there
        fast.post_processor = processors.RobertaProcessing(("</s>", sep), ("<s>", cls), add_prefix_space=prefix)
    return fast


def write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path, *, max_length: int, num_token_types: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises:
        UserError: the tokenizer has no counterpart.
    """
    roles = {role: tokenizer.piece(index) for role, index in tokenizer.model.special.items()}
    (folder / "tokenizer.json").write_text(_tokenizer_json(tokenizer, roles, num_token_types), encoding="utf-8")
    # Where a user writes a mask behind a space, the masked word takes that space along.
    mask = {"content": roles["mask"], "lstrip": tokenizer.model.lone_space_id is not None, "rstrip": False}
    mask |= {"normalized": False, "single_word": False}
    special = {f"{role}_token": roles[role] for role in ("pad", "unk", "cls", "sep")}
    inputs = ["input_ids", *(["token_type_ids"] if num_token_types > 1 else []), "attention_mask"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **special,
        "mask_token": {"__type": "AddedToken", **mask, "special": True},
    }
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", {**special, "mask_token": mask})):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_json(tokenizer: Tokenizer, roles: dict[str, str], num_token_types: int) -> str:
    model, second_type = tokenizer.model, int(num_token_types > 1)
    if isinstance(model, SentencePieceModel):
        fast = fast_tokenizer(model)
    else:
        text = model.blob.decode()
        fast = tokenizers.Tokenizer.from_str(text)
        declared = {token.content for token in fast.get_added_tokens_decoder().values()}
        lacking = [name for name in roles.values() if name not in declared]
        if fast.post_processor is not None and not lacking:
            return text
        fast.add_special_tokens(lacking)
        if fast.post_processor is not None:
            return str(fast.to_str(pretty=True))
    fast.post_processor = surround(roles["cls"], roles["sep"], fast, second_type=second_type)
    return str(fast.to_str(pretty=True))
