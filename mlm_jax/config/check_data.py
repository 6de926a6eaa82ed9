"""What the fields of a config's sources, languages and filters mean to each other."""

import re
from collections.abc import Sequence

from mlm_jax.config.conversion import nearest
from mlm_jax.config.limits import require
from mlm_jax.config.sections import Config, DataConfig
from mlm_jax.segments import MOST_LANGUAGES


def check_data(cfg: Config) -> None:
    """See `checks.check`."""
    _check_mixture(cfg)
    _check_languages(cfg)
    _check_filters(cfg.data)


def _check_mixture(cfg: Config) -> None:
    data = cfg.data
    names = [source.name for source in data.sources]
    require(
        not names or data.source == DataConfig().source,
        f"data.source={data.source!r} and data.sources={names} are both given: put the one among the others",
    )
    for index, name in enumerate(names):
        require(
            bool(re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII)),
            f"data.sources[{index}].name={name!r} names a folder: letters, digits, '.', '_' and '-' only",
        )
        require(names.count(name) == 1, f"data.sources has the name {name!r} more than once: rename one of them")
    _check_weights("data.sources[…].weight", names, [source.weight for source in data.sources])
    for index, stage in enumerate(cfg.stages):
        if stage.weights:
            where = f"stages[{index}].weights"
            require(
                len(stage.weights) == len(names),
                f"{where}={stage.weights} must have one weight for each of data.sources={names}",
            )
            _check_weights(where, names, stage.weights)


def _check_languages(cfg: Config) -> None:
    known = cfg.model.languages
    require(
        len({*known}) == len(known) <= MOST_LANGUAGES and all(known) and not any("," in name for name in known),
        f"model.languages={known} must be up to {MOST_LANGUAGES} different names without commas",
    )
    for index, source in enumerate(cfg.data.sources):
        names = source.language.split(",") if source.language else []
        where = f"data.sources[{index}].language={source.language!r}"
        for name in names:
            require(name in known, f"{where} is not of model.languages={known}{nearest(name, known)}: add it there")
        count = 2 if source.uri.startswith("pairs:") else 1
        require(
            not names or len(names) == count,
            f"{where} must name {count} for {source.uri}, the first part's first: {'en,de' if count == 2 else 'en'}",
        )


def _check_filters(data: DataConfig) -> None:
    filters, where = data.filters, "data.filters."
    for least, most in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
        low, high = getattr(filters, least), getattr(filters, most)
        require(not high or low <= high, f"{where}{least}={low} and {where}{most}={high} leave no document: exchange them")
    require(
        not filters.min_language_probability or bool(filters.languages),
        f"{where}min_language_probability={filters.min_language_probability} is of {where}languages, which names none: add "
        "them, as in ('en',)",
    )
    pairs = [uri for uri in (data.source, *(source.uri for source in data.sources)) if uri.startswith("pairs:")]
    require(
        not (filters.languages and pairs),
        f"{where}languages={filters.languages} cannot be told of {', '.join(pairs)}, whose documents have two languages: "
        "leave it out",
    )
    require(
        not filters.near_duplicates or (data.deduplicate and filters.minhashes >= 16),
        f"{where}near_duplicates={filters.near_duplicates} needs data.deduplicate=True, not {data.deduplicate}, and "
        f"{where}minhashes of 16 or more, not {filters.minhashes}",
    )


def _check_weights(where: str, names: Sequence[str], weights: Sequence[float]) -> None:
    for name, weight in zip(names, weights, strict=True):
        require(weight >= 0, f"{where}: {name} has {weight}, and a weight is at least 0")
    require(not names or sum(weights) > 0, f"{where}: the weights of {', '.join(names)} sum to zero; make one positive")
