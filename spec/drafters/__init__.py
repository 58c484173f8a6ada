"""Who proposes tokens: a draft model, lookups in the text itself, and combinations. One protocol, in ``base``."""

from __future__ import annotations
