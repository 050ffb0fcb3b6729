"""The native CPU module built with AddressSanitizer and UBSan, and with ThreadSanitizer, under its
own tests (slow tier)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastbert

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# What a sanitizer finds ends the process with an error. Python frees little when it ends, and forks
# in its own tests: neither is ours to mend.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
}
# glibc frees the thread-local storage of a thread that has ended from whichever thread needs the
# space, under a lock that the sanitizer does not see.
SUPPRESSED = "race:_dl_deallocate_tls\n"


def runtime(name: str) -> str:
    """The sanitizer's runtime, which has to be in the process before anything else."""
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return path


def build(copy: Path, sanitizers: str) -> Path:
    """A copy of the sources with a module built for the sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    if not (ROOT / "csrc").exists():
        pytest.skip("the sources are not here")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    unbuilt = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("csrc", "fastbert", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=unbuilt, symlinks=True)
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all"
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy,
        env=os.environ
        | {
            "FASTBERT_CUDA": "0",
            "CXXFLAGS": f"{flags} -O1 -g1 -fno-omit-frame-pointer",
            "LDFLAGS": flags,
        },
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return copy


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), "address,undefined")


@pytest.fixture(scope="module")
def thread_sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("thread_sanitized"), "thread")


def run_tests(sanitized: Path, *arguments: str, library: str = "libasan.so") -> None:
    # libstdc++ beside it: the sanitizer looks __cxa_throw up when it starts.
    preload = f"{runtime(library)} {runtime('libstdc++.so.6')}"
    tsan = f"{OPTIONS['TSAN_OPTIONS']}:suppressions={sanitized / 'suppressed'}"
    options = OPTIONS | {"TSAN_OPTIONS": tsan}
    site = os.pathsep.join([str(sanitized), *(p for p in sys.path if p and p != str(ROOT))])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "--import-mode=importlib", f"--rootdir={ROOT}", *arguments],
        cwd=sanitized,
        env=os.environ | options | {"LD_PRELOAD": preload, "PYTHONPATH": site},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout


def test_the_engine(sanitized: Path) -> None:
    """Without torch in the process: its own threads are not built for a sanitizer."""
    tests = [str(path) for path in sorted(Path(__file__).parent.glob("test_cpu_engine*.py"))]
    run_tests(sanitized, *tests, "-k", "not fork and not memory")


def test_the_linears(sanitized: Path) -> None:
    run_tests(sanitized, str(Path(__file__).with_name("test_cpu_linear.py")), "-k", "not emulated")


def test_the_threads(thread_sanitized: Path) -> None:
    """Of the engine alone, in as many threads as the tests ask for, and of several callers."""
    tests = Path(__file__).with_name("test_cpu_engine.py")
    (thread_sanitized / "suppressed").write_text(SUPPRESSED)
    run_tests(thread_sanitized, str(tests), "-k", "thread and not fork", library="libtsan.so")


def test_the_module_under_test_is_the_sanitized_one(sanitized: Path) -> None:
    """Else the tests above would pass whatever a sanitizer has to say."""
    (module,) = (sanitized / "fastbert").glob("_cpu*.so")
    assert b"__asan_report" in module.read_bytes()
    assert Path(fastbert.__file__).parent != sanitized / "fastbert"
