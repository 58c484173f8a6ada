"""On-policy distillation of language models: from prompts to a trained student."""

__version__ = "0.1.0"
