"""A model directory or hub id to what the engine runs: the fast forward pass where it is right, or transformers."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spec.models.base import LanguageModel, Step
from spec.models.decoder import Decoder
from spec.models.linear import Quantization
from spec.models.transformers_model import TransformersModel
from spec.models.weights import UnsupportedModel, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 12  # tokens
# A wrong forward pass is off by the logits' own spread; bf16 by a few hundredths of it.
_ALIKE = 0.15


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantization: Quantization = "none",
    cache_tokens: int = 16384,
    vocabulary: Tensor | None = None,
) -> LanguageModel:
    """A causal LM ready for the engine, on ``device`` (default: a GPU where there is one).

    Args:
        name: a directory in Hugging Face layout, never looked up anywhere, or a hub id. No remote code is run.
        dtype: default bf16. quantization, cache_tokens, vocabulary: see :class:`spec.models.decoder.Decoder`.

    An architecture that the fast forward pass does not know runs by transformers, with a warning.
    Raises ValueError when nothing can be loaded, or for options only the fast forward pass has.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _from_pretrained(name, dtype or torch.bfloat16).to(device).eval()
    try:
        weights = read(model, str(name))
    except UnsupportedModel as reason:
        if quantization != "none" or vocabulary is not None:
            raise UnsupportedModel(
                f"{name} has no fast forward pass ({reason}), and only that has quantization and reduced vocabularies"
            ) from reason
        warnings.warn(f"{name} runs by transformers, several times slower: {reason}", stacklevel=2)
        return TransformersModel(model, name=str(name))
    open_decoder = partial(Decoder, weights, cache_tokens=cache_tokens, vocabulary=vocabulary)
    # Quantised logits are off by as much as a wrong forward pass may be: what is quantised afterwards is compared.
    decoder = open_decoder(quantization="none" if quantization == "none" else "unpacked")
    _check_alike(decoder, model, vocabulary)
    if quantization == "none":
        return decoder
    del decoder, model  # the matrices that ``read`` has fused lie in memory twice until then
    return open_decoder(quantization=quantization)


def _from_pretrained(name: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    local = Path(name).is_dir()
    if not local and (Path(name).is_absolute() or str(name).startswith(".") or str(name).count("/") != 1):
        raise ValueError(f"no such model directory '{name}': give a directory, or a hub id of the form owner/name")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            local_files_only=local,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except OSError as error:
        raise ValueError(f"cannot load the model '{name}': {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in transformers and safetensors
        raise ValueError(
            f"cannot load the model '{name}' ({type(error).__name__}: {error}): its configuration or weights are "
            "damaged, or do not belong together; copy or save it again"
        ) from error
    missing = sorted(info["missing_keys"])  # which transformers has filled with random numbers; tied ones are not here
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"the model '{name}' lacks the weight {missing[0]}{more}: its safetensors files are incomplete, or its "
            "config.json is another model's; copy or save it again"
        )
    return model


@torch.inference_mode()
def _check_alike(decoder: Decoder, model: PreTrainedModel, vocabulary: Tensor | None) -> None:
    """ValueError unless both forward passes give the same logits for a short text: a config may hide a difference."""
    count = min(_PROBE, decoder.max_positions)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, len(model.get_input_embeddings().weight), count))
    theirs = model(input_ids=ids[None].to(decoder.device), use_cache=False).logits[0].float()
    slot = decoder.open(count)
    assert slot is not None
    one = np.ones(1, np.int64)
    ours = decoder.forward(Step(ids, slot * one, 0 * one, count * one, np.arange(count)))
    decoder.close(slot)
    theirs = theirs if vocabulary is None else theirs[:, vocabulary.to(theirs.device)]
    off = float((ours - theirs).std() / theirs.std().clamp_min(1e-6))
    if not off < _ALIKE:
        raise ValueError(
            f"{decoder.name}: the fast forward pass differs from transformers' by {off:.2f} of the logits' spread; the "
            "model computes something it does not know. Run it with spec.models.transformers_model.TransformersModel"
        )
