"""What may draft bytes for a model, whatever the framework."""

from typing import Any, Literal

from bytelm.config import require
from bytelm.generation.draft_table import DraftTable

DraftKind = Literal["none", "ngram", "self", "table", "model"]

_KNOWN = "give none, ngram, self, a draft table or a model"


def draft_kind(model: Any, speculate: Any, longest: int) -> DraftKind:
    """What `speculate` is: a name or None, a `DraftTable`, or a smaller model than `model`.

    `longest` is the length in bytes of the longest prompt and of what is to follow it. Raises
    `ValueError` for a draft that this model cannot use.
    """
    if speculate is None or isinstance(speculate, str):
        match speculate:
            case None | "none":
                return "none"
            case "ngram":
                return "ngram"
            case "self":
                name = type(model).__name__
                require(
                    hasattr(model, "draft"),
                    f"speculate='self': {name} has no part that could draft alone; only a Byte "
                    "Latent Transformer's local stacks do; give ngram, table or a smaller model",
                )
                return "self"
        raise ValueError(f"speculate={speculate!r}: {_KNOWN}")
    require(
        model.has_cached_decoding,
        f"speculate: {type(model).__name__} decodes without a cache, which drafts cannot speed up",
    )
    if isinstance(speculate, DraftTable):
        return "table"
    require(hasattr(speculate, "config"), f"speculate={speculate!r}: {_KNOWN}")
    mine, theirs = model.config.vocab, speculate.config.vocab
    require(
        mine == theirs,
        f"speculate: the drafting model's vocabulary {theirs} is not this model's, {mine}",
    )
    limit = speculate.config.longest_input
    require(
        limit is None or longest <= limit,
        f"speculate: the drafting model has max_length={limit}, but prompt and new bytes make "
        f"{longest}; give fewer, or a draft without that limit",
    )
    require(speculate.config.causal, "speculate: the drafting model is not causal")
    return "model"
