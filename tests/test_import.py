"""``import fastbert`` is cold, and its names appear when asked for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastbert
from fastbert import _native

ROOT = Path(fastbert.__file__).parents[1]
HEAVY = ("torch", "numpy", "triton", "transformers", "safetensors", "tokenizers", "rich", "typer")


def run(code):
    """What ``code`` prints as JSON, in a fresh interpreter that finds this same fastbert."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.anchor)
    return json.loads(done.stdout)


COLD = """
import json, time
before = set(sys.modules)
start = time.process_time()  # of this process alone, however busy the machine
import fastbert
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def test_import_loads_nothing_heavy_and_is_quick():
    results = [run(COLD) for _ in range(3)]
    modules = set(results[0][1])
    assert {name.partition(".")[0] for name in modules}.isdisjoint(HEAVY)
    # No other module of the package either: no native library, no look at the machine.
    assert {name for name in modules if name.startswith("fastbert")} == {"fastbert"}
    assert min(seconds for seconds, _ in results) < 0.05


def test_looking_at_the_names_loads_nothing_either():
    code = "import json, fastbert; dir(fastbert); print(json.dumps('torch' in sys.modules))"
    assert run(code) is False


def test_a_config_needs_no_torch():
    code = "import json, fastbert; fastbert.BertConfig(); print(json.dumps('torch' in sys.modules))"
    assert run(code) is False


def test_models_need_no_transformers_and_no_native_library():
    code = "import json, fastbert; fastbert.BertForMaskedLM; print(json.dumps(list(sys.modules)))"
    loaded = set(run(code))
    assert loaded.isdisjoint({"transformers", "triton", "fastbert._cpu", "fastbert._cuda"})


def test_names():
    assert set(fastbert.__all__) == {*fastbert._HOMES, "__version__"}
    assert list(fastbert.__all__) == sorted(fastbert.__all__)
    assert set(fastbert.__all__) <= set(dir(fastbert))
    for name, home in fastbert._HOMES.items():
        if importlib.util.find_spec(home) is not None:
            assert getattr(fastbert, name).__name__ == name
    assert "BertModel" in vars(fastbert)  # kept: the second look is an ordinary one


def test_version_is_a_string():
    assert isinstance(fastbert.__version__, str) and fastbert.__version__


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'fastbert' has no attribute 'Bort'"):
        fastbert.Bort  # noqa: B018
    with pytest.raises(ImportError):
        from fastbert import Bort  # noqa: F401


def test_the_kernels_that_were_built_load() -> None:
    """All native tests are skipped where there is no module: this is what fails if it is broken."""
    if _native.build_info():
        assert _native.cpu_reason() is None
