"""What a `model_type` of Hugging Face is here, and the fields of config.json that all of them have.

A field that is in none of the lists may change what is computed, and is refused by its name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mlm_jax.config import ModelConfig


def _nothing_more(*_: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        masked, detection: its classes of a masked language model and of a detector of replaced tokens.
        fields: theirs: ours, of the same meaning and value.
        defaults: what a field is that a config.json leaves out; the fields' own and those that are translated.
        fixed: theirs: the only values that we compute.
        harmless: theirs that change nothing of the encoder and its pre-training heads.
        architecture: ours: the value that each of its models has.
        activation: theirs of the activation's name; empty where `architecture` has it.
        positions_follow_padding: whether its position table begins with as many unused rows as the padding id plus one.
        head_activation: what its masked head computes whatever the activation is.
        read: what else there is of ours, from the fields of a config.json with `defaults`, and which network it is of.
        write: what else there is of theirs, from our architecture.
    """

    masked: str
    detection: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    harmless: frozenset[str]
    architecture: Mapping[str, Any]
    activation: str
    positions_follow_padding: bool = False
    head_activation: str = ""
    read: Callable[[Mapping[str, Any], str], dict[str, Any]] = _nothing_more
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing_more

    @property
    def classes(self) -> tuple[str, ...]:
        """Those for pre-training that are read."""
        return (self.masked, self.detection) if self.detection else (self.masked,)

    @property
    def known(self) -> set[str]:
        """The fields of a config.json that are understood."""
        return {"model_type", *self.fields, *self.defaults, *self.fixed, *self.harmless}


# Source of all defaults: transformers' configuration classes.
FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
}
# Heads for other tasks, names, ids that the tokenizer
# has too, how something is run or returned, the generation of text.
HARMLESS = frozenset(
    {
        *("architectures", "_name_or_path", "transformers_version", "tokenizer_class", "torch_dtype", "dtype", "language"),
        *("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id"),
        *("decoder_start_token_id", "prefix", "classifier_dropout", "num_labels", "id2label", "label2id", "problem_type"),
        *("finetuning_task", "task_specific_params", "directionality", "pooler_fc_size", "pooler_num_attention_heads"),
        *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels", "use_cache"),
        *("gradient_checkpointing", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "torchscript"),
        *("output_hidden_states", "output_attentions", "output_past", "output_scores", "return_dict", "use_bfloat16"),
        *(
            "return_dict_in_generate",
            "tf_legacy_loss",
            "max_length",
            "min_length",
            "do_sample",
            "early_stopping",
            "num_beams",
        ),
        *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens"),
    }
)
