"""Attention over rows in which several completions share one prompt.

A row is [prompt, completion, completion, ...]. Everything but attention treats its positions alike; attention first
lays every completion out as the sequence it would be alone (prompt, then itself), runs plain causal attention on those,
and puts the results back. So prompts cost their matrix products once, no mask is needed (padding stands at the end,
where a causal query never looks), and the work of attention is that of the completions alone: a mask over the whole row
would make it grow with the square of the row.

Shape legend: R rows, L positions of a row, S completions, M positions of the longest of them with its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from onpolicy.layers.causal_attention import causal_attention, fits

NAME = "onpolicy_shared_prompts"  # of this attention among transformers' implementations


@dataclass(frozen=True)
class Layout:
    """Where the positions of rows stand in the completions laid out alone, and back."""

    gather: torch.Tensor  # [S, M] int64 into R*L; padding points anywhere
    scatter: torch.Tensor  # [R*L] int64 into S*M; a prompt's positions point into its first completion
    spans: torch.Tensor  # [S, 2] int64: the positions that are scattered, from the first on, and where padding begins

    @staticmethod
    def plain(rows: int, length: int) -> Layout:
        """Every row one sequence without padding."""
        order = torch.arange(rows * length)
        return Layout(order.view(rows, length), order, torch.tensor([0, length]).expand(rows, 2).contiguous())

    def to(self, device: torch.device) -> Layout:
        return Layout(self.gather.to(device), self.scatter.to(device), self.spans.to(device))

    @cached_property
    def sources(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places [places] in S*M that hold position 0 of R*L, position 1, ..., and where each one's begin [R*L + 1].

        Padding is left out.
        """
        filled = (torch.arange(self.gather.shape[1]) < self.spans[:, 1:].cpu()).flatten().nonzero()[:, 0]
        positions = self.gather.cpu().flatten()[filled]
        order = positions.argsort(stable=True)
        counts = positions.bincount(minlength=len(self.scatter))
        return filled[order], torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def register() -> str:
    """Make the attention known to transformers; returns its name, for ``attn_implementation``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, shared_prompt_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls without a layout, which are ordinary ones
    return NAME


def shared_prompt_attention(
    module: nn.Module,
    query: torch.Tensor,  # [R, H, L, D]
    key: torch.Tensor,  # [R, H_kv, L, D]
    value: torch.Tensor,  # [R, H_kv, L, D]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    shared_prompts: Layout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """[R, L, H, D]: what transformers' attention functions return. Without a layout this is SDPA."""
    if shared_prompts is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    window = options.get("sliding_window")
    if window is not None and shared_prompts.gather.shape[1] > window:
        raise ValueError(
            f"{type(module).__name__} attends to a window of {window} tokens, which shared prompts do not support; "
            "set batching.share_prompts: false"
        )
    rows, heads, length, size = query.shape
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
    q, k, v = (_lay_out(states.to(dtype), shared_prompts.gather) for states in (query, key, value))
    scale = size**-0.5 if scaling is None else scaling
    return attend_laid_out(q, k, v, scale, shared_prompts).view(rows, length, heads, size), None


def attend_laid_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layout: Layout
) -> torch.Tensor:
    """Causal attention of [S, M, H, D] and keys and values [S, M, H_kv, D], back in rows: [R*L, H, D]."""
    flat = _attend(query, key, value, scale, layout.spans).reshape(-1, *query.shape[2:])
    return flat.index_select(0, layout.scatter)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, spans: torch.Tensor
) -> torch.Tensor:
    """[S, M, H, D], by the faster of two ways."""
    if fits(query):
        return causal_attention(query, key, value, scale, spans)
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


def _lay_out(states: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
    """[R, H, L, D] -> [S, M, H, D]."""
    flat = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
    return flat.index_select(0, gather.flatten()).view(*gather.shape, *flat.shape[1:])
