"""Where completions come from: one protocol, :class:`~onpolicy.rollouts.base.Sampler`, and its implementations.

``VLLMSampler`` (in process) is what training uses; ``TransformersSampler`` is the oracle it is tested against, and
serves machines without vLLM. Both are imported from their own modules: importing this package loads no engine.
"""

from onpolicy.rollouts.base import Sampler

__all__ = ["Sampler"]
