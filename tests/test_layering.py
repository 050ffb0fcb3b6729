"""Imports run one way, only ops touch kernels, only hf imports transformers, only device reads the
environment: read from the source of every module."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import fastbert

ROOT = Path(fastbert.__file__).parents[1]

# Part of the package -> the parts that it may import (and itself). A part is the first name under
# fastbert: a module or a folder.
_MODEL = {"config", "packed", "ops", "nn"}
_LIBRARY = {*_MODEL, "models", "device", "atomic"}
ALLOWED: dict[str, set[str]] = {
    "atomic": set(),
    "device": set(),
    "config": set(),
    "_native": {"device"},
    "kernels": {"device"},
    "ops": {"device", "_native", "kernels"},
    "packed": {"ops"},
    "nn": {"config", "packed", "ops"},
    "models": {*_MODEL, "atomic"},
    "hf": _LIBRARY,
    "runtime": {"atomic", "config", "device", "_native"},
    "data": {"atomic", "config", "packed", "device"},
    "train": {*_LIBRARY, "hf", "data"},
    "pretrain": {*_LIBRARY, "hf", "data", "train"},
    "finetune": {*_LIBRARY, "hf", "data", "train"},
    "compress": {*_LIBRARY, "hf", "data", "train", "runtime"},
    "analyze": {*_LIBRARY, "hf", "data"},
    "doctor": {*_LIBRARY, "_native", "hf"},
    "demo": {*_LIBRARY, "hf"},
    "cli": {*_LIBRARY, "hf", "runtime", "data", "train", "pretrain", "finetune", "compress",
            "analyze", "doctor", "demo"},
}  # fmt: skip

FILES = sorted([*ROOT.glob("fastbert/**/*.py"), *ROOT.glob("kernels/*.py")])
PACKAGE = ROOT / "fastbert/__init__.py"


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to."""
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[0] if relative[0] == "kernels" else relative[1]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below ``node``, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes_that_run(child)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Full names that a file imports, anywhere in it; ``a`` and ``a.b`` for ``from a import b``.

    A string that is the name of a module of ours counts too: importlib gets names so.
    """
    found: set[str] = set()
    for node in nodes_that_run(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found.update({str(node.module), *(f"{node.module}.{a.name}" for a in node.names)})
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split()
            if len(words) == 1 and words[0].startswith("fastbert."):
                found.add(words[0])
    return frozenset(found)


def top_names(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def files_of(*parts: str) -> list[Path]:
    return [path for path in FILES if path != PACKAGE and part_of(path) in parts]


def test_every_part_has_its_place():
    parts = {part_of(path) for path in FILES if path != PACKAGE}
    assert parts <= ALLOWED.keys(), "say in ALLOWED what the new part may import"
    assert {"ops", "nn", "models", "kernels"} <= parts


def test_the_table_has_no_cycle():
    placed: set[str] = set()
    while len(placed) < len(ALLOWED):
        free = {p for p, below in ALLOWED.items() if p not in placed and below <= placed}
        assert free, f"a cycle among {sorted(ALLOWED.keys() - placed)}"
        placed |= free


def test_imports_run_one_way():
    wrong = []
    for path in files_of(*ALLOWED):
        part = part_of(path)
        used = {name.split(".")[1] for name in imports(path) if name.startswith("fastbert.")}
        above = (used & ALLOWED.keys()) - ALLOWED[part] - {part}
        wrong += [f"{path}: {part} imports {name}" for name in sorted(above)]
    assert not wrong


def test_the_package_itself_imports_nothing():
    body = tree_of(PACKAGE).body
    imported = [ast.unparse(n) for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert imported == [
        "from __future__ import annotations",
        "import importlib",
        "from typing import TYPE_CHECKING, Any",
    ]


def test_only_hf_imports_transformers():
    """And the demo, which stands the two side by side, and what makes fine-tuning's methods of it:
    the callback for its Trainer, and LoRA, which is peft's."""
    foreign = {"transformers", "sentence_transformers", "peft", "accelerate"}
    adapters = {ROOT / "fastbert/finetune/methods" / name for name in ("callback.py", "lora.py")}
    others = set(files_of(*(ALLOWED.keys() - {"hf", "demo", "train"}))) - adapters
    assert not [path for path in others if top_names(path) & foreign]


def test_kernels_know_torch_and_triton_only():
    known = {*sys.stdlib_module_names, "torch", "triton", "fastbert"}
    assert not {path: top_names(path) - known for path in files_of("kernels")
                if top_names(path) - known}  # fmt: skip
    body = tree_of(ROOT / "kernels/__init__.py").body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)  # one docstring


def test_what_must_not_load_torch_does_not():
    for path in files_of("runtime", "config", "device", "_native"):
        top = [n for n in tree_of(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("torch" in ast.unparse(n).replace(".", " ").split() for n in top), path
    assert not [path for path in files_of("runtime") if "torch" in top_names(path)]


def test_only_device_reads_the_environment():
    names = ("environ", "environb", "getenv", "getenvb")
    wrong = []
    for path in FILES:
        for node in nodes_that_run(tree_of(path)):
            read = isinstance(node, ast.Attribute) and node.attr in names
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                read = any(alias.name in names for alias in node.names)
            if read and part_of(path) != "device":
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong


def test_nothing_imports_tests_or_benches():
    assert not [path for path in FILES if top_names(path) & {"tests", "bench"}]
