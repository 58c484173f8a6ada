"""What the README says of the code is what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_file_tree_is_todays() -> None:
    """If this fails: ``python scripts/tree.py --write``."""
    spec = importlib.util.spec_from_file_location("tree", ROOT / "scripts" / "tree.py")
    assert spec is not None and spec.loader is not None
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    written = (ROOT / "README.md").read_text().partition(tree.BEGIN)[2].partition(tree.END)[0]
    assert written.strip() == tree.tree()
    for name in tree.PACKAGES:
        for path in (ROOT / name).rglob("*.py"):
            assert path.name == "__init__.py" or path.name in written, path
