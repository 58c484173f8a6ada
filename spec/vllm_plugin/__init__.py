"""What makes vLLM's own speculative decoding exact: loaded by every vLLM process, by itself.

vLLM calls :func:`register` through the entry point ``vllm.general_plugins``, in front ends, engine cores and workers
alike. It costs nothing there, not even an import of torch: it waits until vLLM itself imports a rejection sampler.

- :mod:`~spec.vllm_plugin.guard` acts when a rejection sampler is built, which only happens with a speculative
  configuration: repairs, tests, and refuses to start where the test fails.
- :mod:`~spec.vllm_plugin.configuration` acts when speculation is configured: refuses a vLLM without such a sampler.
- :mod:`~spec.vllm_plugin.repairs` holds what is wrong in which version, and the cure.
- :mod:`~spec.vllm_plugin.selftest` compares what vLLM commits with the definition, for given noise and as a law.
- :mod:`~spec.vllm_plugin.imports` is the waiting.

``VLLM_PLUGINS=""`` in the environment leaves all plugins out, this one too: vLLM is then as it was installed.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Let the guards act on vLLM's samplers and configuration, now or once imported. May be called repeatedly."""
    from spec.vllm_plugin import configuration, guard, imports

    imports.once_imported("vllm.config.speculative", configuration.watch)
    imports.once_imported(configuration.V1, guard.watch)
    imports.once_imported(configuration.V2, guard.refuse_untested)
