"""Causal language models as the engine runs them: one protocol, a fast forward pass and the transformers one."""

from __future__ import annotations
