"""The README's file tree, one line a file, from the files' own first sentences: ``python scripts/tree.py --write``."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin: python scripts/tree.py --write -->", "<!-- end of the tree -->"
PACKAGES = ("onpolicy", "spec")
_COLUMN, _WIDTH = 32, 120


def tree() -> str:
    """All modules of the packages as a text block; a package's line is the docstring of its ``__init__.py``."""
    return "\n".join(["```", *(line for name in PACKAGES for line in _lines(ROOT / name, 0)), "```"])


def _lines(folder: Path, depth: int) -> list[str]:
    """A folder's line, then those of its files and folders."""
    lines = [_line(f"{folder.name}/", folder / "__init__.py", depth)]
    entries = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    for path in sorted(entries, key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir():
            lines += _lines(path, depth + 1)
        elif path.name != "__init__.py":
            lines.append(_line(path.name, path, depth + 1))
    return lines


def _line(name: str, source: Path, depth: int) -> str:
    label = "  " * depth + name
    return f"{label:{_COLUMN}}{_shortened(summary(source), _WIDTH - _COLUMN)}".rstrip()


def summary(source: Path) -> str:
    """The first sentence of a module's docstring; ValueError where there is none."""
    text = ast.get_docstring(ast.parse(source.read_text()))
    if not text:
        raise ValueError(f"{source}: begin it with a docstring that says what it is")
    first = " ".join(text.split("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".").replace("``", "").replace(":mod:", "").replace("`", "")


def _shortened(text: str, width: int) -> str:
    """At most ``width`` characters: cut at the last clause that fits, else after a word."""
    if len(text) <= width:
        return text
    head = text[: width + 1]
    for mark in ("; ", ": ", ", "):
        at = head.rfind(mark)
        if at > width // 2:
            return head[:at]
    return head[: width - 1].rpartition(" ")[0] + " …"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md, in place of the tree that is there")
    if not parser.parse_args().write:
        print(tree())
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{tree()}\n{END}{after}")


if __name__ == "__main__":
    main()
