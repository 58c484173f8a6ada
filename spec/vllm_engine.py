"""Starting vLLM inside a process that has other work to do, and getting rid of it again."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spec.runtime import LARGEST_CACHE

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# Said at every start or sync, and either intended here or of no consequence.
_HARMLESS = {
    "vllm.engine.arg_utils": ("The global random seed is set to",),
    "vllm.config.vllm": ("Enforce eager set", "Inductor compilation was disabled", "Model Runner V2 requires Triton"),
    "vllm.platforms.cpu": ("Triton is not installed", "Reset SSM cache type"),
    "vllm.v1.worker.cpu_worker": ("is not found in LD_PRELOAD", "doesn't allow to use `torch.set_num_threads`"),
    "vllm.triton_utils.dispatcher": ("is already registered. Overwriting",),  # by the second engine of a process
    "vllm.platforms.interface": ("VLLM_DIST_IDENT",),  # which vLLM itself has set
    # No weights of its own; a tied head is dealt with in vllm_weights.
    "vllm.model_executor.model_loader.reload.layerwise": (
        "RotaryEmbedding: Failed to load weights",
        "ParallelLMHead: Failed to load weights",
    ),
    "vllm.utils.torch_utils": ("leaving Torch threads at",),  # wanted: the trainer uses them all
    "vllm.renderers.base": ("Using None for EOS token id",),
    "torch._library.triton": ("Triton not available",),
}


def checked(model_dir: str | Path) -> str:
    """The path or hub id as vLLM takes it; ValueError for a directory that holds no model."""
    path = Path(model_dir)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"'{path}' holds no config.json; give a Hugging Face checkpoint directory")
    return str(model_dir)


def start_engine(
    kv_cache_gib: float | None,
    building: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    **options: Any,
) -> LLMEngine:
    """An engine of the given ``EngineArgs``, in this process. ValueError when vLLM cannot be imported.

    ``building``: entered, once vLLM is imported, while the engine is built.

    ``kv_cache_gib`` None: what ``VLLM_CPU_KVCACHE_SPACE`` says, else room for as many of the longest requests as may
    run together, up to 4 GiB.
    """
    # In this process, whatever the user's environment says: sync and the token draw reach into the engine.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }.items():
        os.environ.setdefault(name, value)
    with quiet(), caller_state_kept():
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise ValueError(
                f"vLLM cannot be imported ({error}): install it with the extra 'cpu' or 'cuda', "
                "or choose the transformers sampler"
            ) from error
        _drop_harmless()
        survive_numba()
        arguments = EngineArgs(
            distributed_executor_backend="uni",
            skip_tokenizer_init=True,
            generation_config="vllm",  # the checkpoint's sampling defaults must not change ours
            disable_log_stats=True,
            async_scheduling=False,  # the draw needs to know how many tokens a request has
            use_tqdm_on_load=False,
            **options,
        )
        config = arguments.create_engine_config()
        if kv_cache_gib is not None:
            config.cache_config.kv_cache_memory_bytes = int(kv_cache_gib * 2**30)
        elif not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            config.cache_config.kv_cache_memory_bytes = min(_cache_bytes(config), LARGEST_CACHE)
        with contextlib.nullcontext() if building is None else building():
            return LLMEngine.from_vllm_config(config, disable_log_stats=True)


def _cache_bytes(config: Any) -> int:
    """Bytes of keys and values when every running request has ``max_model_len`` tokens."""
    model, block = config.model_config, config.cache_config.block_size
    heads = model.get_num_kv_heads(config.parallel_config) * model.get_num_layers(config.parallel_config)
    blocks = config.scheduler_config.max_num_seqs * -(-model.max_model_len // block) + 1  # vLLM keeps one empty
    return int(2 * heads * model.get_head_size() * model.dtype.itemsize * block * blocks)


@contextlib.contextmanager
def caller_state_kept() -> Iterator[None]:
    """Undo what starting an engine does to the whole process: vLLM seeds every global generator, and puts a stub in
    the place of ``torch.set_num_threads``."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back the warnings that vLLM and its libraries print at every start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class _Drop(logging.Filter):
    """Drops the lines that contain one of ``texts``."""

    def __init__(self, texts: tuple[str, ...]):
        super().__init__()
        self._texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self._texts)


def _drop_harmless() -> None:
    """Filter these lines for good. On the loggers themselves: vLLM replaces its handlers when an engine starts."""
    for name, texts in _HARMLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Drop) for present in logger.filters):
            logger.addFilter(_Drop(texts))


def survive_numba() -> None:
    """Let an engine start after numba was imported.

    On a CPU vLLM asks everything in every loaded module for ``vars(value).get("kernel")``. The ``__dict__`` of
    llvmlite's library handle, which numba brings, is no dictionary: AttributeError. So the name ``vars`` in that
    module of vLLM is given a meaning that passes over such objects.
    """
    from vllm.triton_utils import dispatcher

    def dictionaries_only(value: object) -> dict[str, Any]:
        found = builtins.vars(value)
        return found if isinstance(found, Mapping) else {}  # type: ignore[return-value]

    dispatcher.vars = dictionaries_only  # type: ignore[attr-defined]


def stop_engine(engine: LLMEngine) -> None:
    """Free weights, cache and process group. The caller must hold no other reference to ``engine``."""
    with quiet():
        engine.engine_core.shutdown()
    del engine
    gc.collect()
    _return_memory()


def _return_memory() -> None:
    """Give freed memory back to the system: glibc keeps it otherwise, and the next engine adds to it."""
    with contextlib.suppress(AttributeError, OSError):  # no glibc, or an allocator of another kind is preloaded
        ctypes.CDLL(None).malloc_trim(0)
