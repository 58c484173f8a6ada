"""The bound that memory sets to plain decoding: every token reads every weight of a matrix product once."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

_BYTES = 2  # of a bf16 weight
_BUFFER = 2**30  # bytes read at once: more than any cache holds


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights that a token of a bf16 model reads: all but an embedding that is not also the head.

    Raises ValueError for a directory without model*.safetensors.
    """
    from safetensors import safe_open

    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ValueError(
            f"{directory} holds no model*.safetensors: give --target a directory in the Hugging Face layout"
        )
    sizes: dict[str, int] = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    tied = json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", False)
    looked_up = 0 if tied else sum(size for name, size in sizes.items() if name.endswith("embed_tokens.weight"))
    duplicate = sum(size for name, size in sizes.items() if tied and name.endswith("lm_head.weight"))
    return _BYTES * (sum(sizes.values()) - looked_up - duplicate)


def read_bandwidth(repeat: int = 10) -> float:
    """Bytes a second of the fastest ``torch.sum`` over 1 GiB of float32, with all threads, on a GPU where there is one.

    The fastest: what slows a read down is not the memory.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffer = torch.ones(_BUFFER // 4, device=device)
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        buffer.sum().item()  # waits for the result
        seconds.append(time.perf_counter() - begin)
    return _BUFFER / min(seconds)
