"""``make audit``: every engine installed here, inside its verifier where that can be, and by its text.

The target is the one named (``make audit``: the default teacher), the draft the quickstart's student where one has been
trained, else n-gram lookup alone. Each audit is a process of its own, because vLLM changes the one it runs in. Exit
status: 0 if none differs, 2 for wrong usage.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from spec.audit.verdict import EXIT

STUDENT = Path("runs/quickstart/student")
TOKENS, EPSILON = "20000", "0.03"


def commands(target: str, drafts: list[str], engines: list[str]) -> list[list[str]]:
    """Arguments of ``python -m spec.audit``, quick ones first."""
    found = [["--mode", "exact", "--engine", engine] for engine in engines]
    limits = ["--max-tokens-audited", TOKENS, "--epsilon", EPSILON]
    for engine in engines:
        base = ["--engine", engine, "--target", target]
        found += [[*base, *limits], *([*base, *limits, "--draft", draft] for draft in drafts)]
        found.append([*base, "--mode", "greedy", "--max-tokens-audited", "1000", "--draft", drafts[-1]])
        if engine == "torch":
            found += [[*base, *limits, "--draft", draft, "--verification", "token"] for draft in drafts]
    return found


def main() -> int:
    """Runs them all, whatever each answers."""
    if len(sys.argv) != 2:
        print("usage: python -m spec.audit.everything TARGET_DIR", file=sys.stderr)
        return 2
    target = sys.argv[1]
    drafts = ["ngram", *([str(STUDENT)] if (STUDENT / "config.json").exists() else [])]
    engines = ["torch", "hf", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    different = failed = 0
    for arguments in commands(target, drafts, engines):
        print("python -m spec.audit", *arguments, flush=True)
        status = subprocess.run([sys.executable, "-m", "spec.audit", *arguments], check=False).returncode
        different += status == EXIT["different"]
        failed += status not in EXIT.values()
    print(f"{different} different, {failed} could not be audited")
    return EXIT["different"] if different else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
