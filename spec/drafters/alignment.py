"""Whether a draft model's tokens are the target's, and which column of its head is which token.

Shape legend: D columns of the draft's head, V the target's vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spec.models.base import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_tokenizers(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where an id stands for different tokens in the two; ids that only one uses do no harm.

    A draft with another tokenizer would be exact all the same, but its proposals would be gibberish.
    """
    theirs = {id: token for token, id in draft.get_vocab().items()}
    differing = [(id, token, theirs[id]) for token, id in target.get_vocab().items() if theirs.get(id, token) != token]
    if differing:
        id, ours, other = min(differing)
        raise ValueError(
            f"draft and target have different tokenizers: {len(differing)} ids differ, the first is {id}, {ours!r} in "
            f"the target and {other!r} in the draft. Use a draft distilled from this target (or of its family), or "
            "draft by lookup (ngram, suffix), which needs no tokenizer of its own."
        )


def head_columns(model: LanguageModel, target: LanguageModel, vocabulary: Tensor | None) -> Tensor | None:
    """[D] int64 target id of each column of the draft's logits; None where they agree, perhaps with some to cut.

    ``vocabulary``: [D] of a reduced head, or None. Raises ValueError where it does not fit.
    """
    if vocabulary is None:
        return None if model.vocab_size >= target.vocab_size else torch.arange(model.vocab_size, device=model.device)
    if len(vocabulary) != model.vocab_size:
        raise ValueError(
            f"the reduced vocabulary names {len(vocabulary)} tokens and the draft's head has {model.vocab_size} "
            "columns: pass the vocabulary the draft was saved with"
        )
    known = vocabulary.unique()
    if len(known) < len(vocabulary) or int(known[0]) < 0 or int(known[-1]) >= target.vocab_size:
        raise ValueError(
            f"the reduced vocabulary repeats tokens or has some outside the target's {target.vocab_size}: pass the "
            "vocabulary the draft was saved with"
        )
    return vocabulary.to(model.device, torch.long)
