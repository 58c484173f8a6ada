"""From what a user names (a directory, a hub id, ``ngram``, a length) to the engine's parts, for every program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from spec.draft_length import DraftLength
    from spec.drafters.base import Drafter
    from spec.models.base import LanguageModel
    from spec.models.linear import Quantization

LOOKUPS = ("ngram", "suffix")
Drafting = Literal["probabilistic", "greedy"]
DraftQuantization = Literal["auto", "none", "int8", "int4"]
DRAFT_HELP = (
    "model directory or hub id, ngram or suffix (lookup in the text so far), or a lookup that falls back to a model: "
    "ngram+DIR"
)


@dataclass(frozen=True)
class ModelOptions:
    """How models are loaded."""

    dtype: str = "bfloat16"
    device: str | None = None  # cpu or cuda; None: a GPU where there is one
    cache_tokens: int = 16384  # see spec.models.decoder.Decoder


@dataclass(frozen=True)
class DrafterOptions:
    """How a draft model drafts. Nothing here changes the law of the output."""

    drafting: Drafting = "probabilistic"
    # Of the draft's weights. auto: int8 where there is such a product. It is faster for one or two texts at a time,
    # which wait for the weights to be read, and slower for many, since it takes as long for every row.
    quantization: DraftQuantization = "auto"


def check_names(target: str, draft: str | None) -> None:
    """Raises ValueError, before anything heavy is imported, for a name that nothing can be."""
    _check_model(target, "target")
    for part in _parts(draft):
        if part not in LOOKUPS:
            _check_model(part, "draft", instead=f", or {' or '.join(LOOKUPS)}")


def draft_models(draft: str | None) -> list[str]:
    """The directories and hub ids in a drafter's name: ``ngram+DIR`` -> [DIR]."""
    return [part for part in _parts(draft) if part not in LOOKUPS]


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """From a directory without a look at any hub, or from a hub id. No remote code is run.

    Raises ValueError for one that is not there or damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir(), trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in transformers and tokenizers
        raise ValueError(
            f"cannot load the tokenizer of '{name}' ({type(error).__name__}: {error}): its tokenizer files are missing "
            "or damaged; copy or save them again"
        ) from error


def open_target(name: str, options: ModelOptions, quantization: Quantization = "none") -> LanguageModel:
    """See :func:`spec.models.load.load`. Raises ValueError for a device that is not there."""
    return _load(name, options, quantization)


def open_drafter(
    name: str | None,
    target: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    models: ModelOptions,
    options: DrafterOptions | None = None,
) -> Drafter | None:
    """The drafter of this name (``DRAFT_HELP``), None for None.

    Raises ValueError for a draft model with another tokenizer than the target's.
    """
    if name is None:
        return None
    options = options or DrafterOptions()
    return open_drafters(name, target, tokenizer, models, options.quantization, (options.drafting,))[0]


def open_drafters(
    name: str,
    target: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    models: ModelOptions,
    quantization: DraftQuantization,
    draftings: Sequence[Drafting],
) -> list[Drafter]:
    """One drafter for each way of drafting. They share a draft model: its weights are there once, its cache for all.

    Raises ValueError as :func:`open_drafter` does.
    """
    makers = [_maker(part, target, tokenizer, models, quantization) for part in _parts(name)]
    made = [[make(drafting) for make in makers] for drafting in draftings]
    if len(makers) == 1:
        return [members[0] for members in made]
    from spec.drafters.fallback import Fallback

    return [Fallback(*members) for members in made]


def draft_length(text: str) -> DraftLength:
    """``auto`` or a number. Raises ValueError for anything else."""
    from spec.draft_length import Adaptive, Fixed

    if text == "auto":
        return Adaptive()
    if not text.lstrip("-").isdigit():
        raise ValueError(f"draft length {text!r}: give a number (0 for plain decoding) or auto")
    return Fixed(int(text))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a user's message, as text alone where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _parts(draft: str | None) -> list[str]:
    """ngram+DIR -> [ngram, DIR]; a plus sign elsewhere belongs to a name."""
    if draft is None:
        return []
    first, plus, rest = draft.partition("+")
    return [first, *_parts(rest)] if plus and first in LOOKUPS else [draft]


def _check_model(name: str, role: str, instead: str = "") -> None:
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"{role} {name} has no config.json: give a directory in the Hugging Face layout{instead}")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"unknown {role} {name!r}: there is no such directory; give a model directory or hub id{instead}"
        )


def _maker(
    name: str,
    target: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    models: ModelOptions,
    quantization: DraftQuantization,
) -> Callable[[Drafting], Drafter]:
    """What makes drafters of this name; a draft model is loaded here, once."""
    if name == "ngram":
        from spec.drafters.ngram import NgramDrafter

        return lambda _: NgramDrafter()
    if name == "suffix":
        from spec.drafters.suffix import SuffixDrafter

        return lambda _: SuffixDrafter()
    import torch

    from spec.drafters.alignment import check_tokenizers
    from spec.drafters.model import ModelDrafter
    from spec.drafters.vocabulary import DraftVocabulary
    from spec.models.weights import UnsupportedModel

    check_tokenizers(tokenizer, open_tokenizer(name))
    reduced = DraftVocabulary.load(Path(name), target.vocab_size)
    vocabulary = None if reduced is None else torch.from_numpy(reduced.ids)
    quick = target.device.type == "cpu" and models.dtype == "bfloat16"
    chosen: Quantization = ("int8" if quick else "none") if quantization == "auto" else quantization
    try:
        draft = _load(name, models, chosen, vocabulary)
    except UnsupportedModel:  # read by transformers, which has neither a reduced head nor quantised weights
        if quantization not in ("auto", "none"):
            raise
        draft, vocabulary = _load(name, models, "none"), None
    return lambda drafting: ModelDrafter(draft, target, drafting=drafting, vocabulary=vocabulary)


def _load(
    name: str,
    options: ModelOptions,
    quantization: Quantization,
    vocabulary: torch.Tensor | None = None,
) -> LanguageModel:
    import torch

    from spec.models.load import load

    if (options.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine has no CUDA device that torch can use; give --device cpu")
    return load(
        name,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        quantization=quantization,
        cache_tokens=options.cache_tokens,
        vocabulary=vocabulary,
    )
