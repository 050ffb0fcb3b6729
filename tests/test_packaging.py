"""What is shipped: sdist, wheels and editable installs, built here from a copy of the tree.

No test needs a network: builds run without isolation, on the build requirements of fastbert[test].
"""

import ast
import email
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastbert
from fastbert import _native, device

ROOT = Path(__file__).parents[1]
VERSION = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
FILES = [
    *("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"),
    *("Makefile", "constraints.txt", ".clang-format"),
]
FOLDERS = ["bench", "csrc", "fastbert", "kernels", "tests"]
BUILT = ["__pycache__", "*.pyc", "*.so", "_build.json", ".*_cache", ".hypothesis"]

# A module in place of csrc/, which other tests cover and which takes a minute to compile.
TINY_MODULE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", 0, 0, 0, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
"""
# It answers what it is, and then compiles nothing.
BROKEN_NVCC = """#!/bin/sh
case "$1" in --list-gpu-code) echo sm_90;; *) exit 1;; esac
"""

# In the command that ninja shows when it fails: wgmma is of sm_90a alone, whose PTX no later GPU
# takes.
FOR_HOPPER = (
    "-DFASTBERT_SM_90A -gencode arch=compute_90a,code=sm_90a "
    "-gencode arch=compute_90,code=compute_90 "
)


def copy_tree(to: Path) -> Path:
    """The sources of this repository, with what a build leaves behind planted among them."""
    to.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, to)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns(*BUILT))
    for left in (
        "build/lib/fastbert/deleted_since.py",
        "fastbert/_build.json",
        "fastbert/_cpu.cpython-39-x86_64-linux-gnu.so",
        "fastbert/__pycache__/device.cpython-39.pyc",
        "tests/__pycache__/test_packaging.cpython-39.pyc",
    ):
        (to / left).parent.mkdir(parents=True, exist_ok=True)
        (to / left).write_text("left behind")
    return to


def build(tree: Path, *kind: str, fails: bool = False, **env: str) -> str:
    """Runs the build frontend in ``tree``; what it builds comes to dist/. Returns its output."""
    command = [sys.executable, "-m", "build", "--no-isolation", *kind]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTBERT_")}
    done = subprocess.run(
        command, cwd=tree, env=inherited | env, text=True, stdout=subprocess.PIPE, stderr=-2
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def sources(tree: Path, *folders: str, name: str = "*") -> set[str]:
    """The paths of all files under ``folders`` of ``tree`` that no build made."""
    built = re.compile(r"__pycache__|\.pyc$|\.so$|_build\.json$|/\..*_cache/|/\.hypothesis/")
    found = (path for folder in folders for path in (tree / folder).rglob(name) if path.is_file())
    paths = {path.relative_to(tree).as_posix() for path in found}
    return {path for path in paths if not built.search(path)}


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def pure(tmp_path_factory) -> Path:
    """A tree whose dist/ holds an sdist and the pure-Python wheel built from that sdist."""
    tree = copy_tree(tmp_path_factory.mktemp("pure") / "tree")
    build(tree, FASTBERT_NATIVE="0")
    return tree


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tree whose C++ half is one tiny file and whose CUDA half is one empty file."""
    tree = copy_tree(tmp_path_factory.mktemp("tiny") / "tree")
    shutil.rmtree(tree / "csrc")
    for name, text in {"bindings/cpu.cpp": TINY_MODULE, "cuda/empty.cu": ""}.items():
        (tree / "csrc" / name).parent.mkdir(parents=True)
        (tree / "csrc" / name).write_text(text)
    nvcc = tree / "cuda_home/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(BROKEN_NVCC)
    nvcc.chmod(0o755)
    return tree


@pytest.fixture(scope="module")
def metadata(pure) -> email.message.Message:
    (wheel,) = pure.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_sdist_holds_all_that_builds_and_tests_itself(pure):
    with tarfile.open(pure / f"dist/fastbert-{VERSION}.tar.gz") as archive:
        members = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {m for m in members if m.startswith("fastbert.egg-info/")}
    assert members - made == set(FILES) | sources(pure, *FOLDERS)


def test_wheel_holds_the_package_and_nothing_else(pure):
    expected = sources(pure, "fastbert")
    expected |= {f"fastbert/{path}" for path in sources(pure, "kernels", name="*.py")}
    names = wheel_names(pure / f"dist/fastbert-{VERSION}-py3-none-any.whl")
    info = {name for name in names if name.startswith(f"fastbert-{VERSION}.dist-info/")}
    assert names - info == expected
    assert {name.partition("/")[2] for name in info} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }


def test_metadata_says_what_is_so(metadata):
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {
        *("hf", "train", "data", "demo", "plots", "search", "test", "bench")
    }


def test_version_is_the_same_everywhere():
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        assert fastbert.__version__ == importlib.metadata.version("fastbert") == VERSION
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastbert is not installed here")


def test_constraints_pin_every_direct_dependency(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    needed = {Requirement(text).name for text in metadata.get_all("Requires-Dist")}
    assert needed - {"fastbert"} <= {pin.name for pin in pins}
    assert all(re.fullmatch(r"==[\d.]+", str(pin.specifier)) for pin in pins)  # no local version
    for text in metadata.get_all("Requires-Dist"):
        required = Requirement(text)
        pinned = [str(p.specifier)[2:] for p in pins if p.name == required.name]
        assert all(required.specifier.contains(version) for version in pinned), text


def test_wheel_of_a_tree_that_was_built_before(tiny):
    """Adds the compiled module and the facts of its build; a file deleted since is not in it."""
    build(tiny, "--wheel", FASTBERT_CUDA="0")
    (wheel,) = tiny.glob("dist/*.whl")
    names = wheel_names(wheel)
    compiled = {name for name in names if re.match(r"fastbert/_cpu\.cpython-.*\.so$", name)}
    expected = {f"fastbert/{path}" for path in sources(tiny, "kernels", name="*.py")}
    expected |= sources(tiny, "fastbert") | {"fastbert/_build.json"} | compiled
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert len(compiled) == 1 and "none-any" not in wheel.name
    facts = json.loads(zipfile.ZipFile(wheel).read("fastbert/_build.json"))
    assert facts["version"] == VERSION and facts["cxx"]
    assert facts["cuda_skipped"] == "FASTBERT_CUDA=0 at build time"

    assert "no work to do" in build(tiny, "--wheel", FASTBERT_CUDA="0")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")
def test_instructions_that_the_compiler_does_not_know_are_left_out(tiny):
    old_compiler = tiny / "old-g++"
    old_compiler.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec g++ "$@"\n')
    old_compiler.chmod(0o755)
    unit = tiny / "csrc/cpu/linear_amx.cpp"
    unit.parent.mkdir()
    unit.touch()
    output = build(tiny, "--wheel", FASTBERT_CUDA="0", CXX=str(old_compiler))
    assert "csrc/cpu/linear_amx.cpp is left out" in output and "does not know" in output


def test_cuda_that_does_not_compile(tiny):
    """Left out with a warning by default, an error if asked for."""
    home = str(tiny / "cuda_home")
    output = build(tiny, "--wheel", CUDA_HOME=home)
    assert "WARNING: fastbert._cuda is left out" in output
    assert FOR_HOPPER in output
    (wheel,) = tiny.glob("dist/*.whl")
    facts = json.loads(zipfile.ZipFile(wheel).read("fastbert/_build.json"))
    assert "do not compile" in facts["cuda_skipped"] and facts["cuda_targets"] == []

    asked = {"FASTBERT_CUDA": "1", "FASTBERT_CUDA_ARCHS": "90"}
    output = build(tiny, "--wheel", fails=True, CUDA_HOME=home, **asked)
    assert FOR_HOPPER in output
    assert "FASTBERT_CUDA=1, but its sources do not compile" in output


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FASTBERT_NATIVE": "no"}, "FASTBERT_NATIVE='no': expected one of 1, 0"),
        ({"FASTBERT_CUDA": "yes"}, "FASTBERT_CUDA='yes': expected one of auto, 0, 1"),
        ({"CXX": "no-such-compiler"}, "set FASTBERT_NATIVE=0"),
        ({"FASTBERT_CUDA_ARCHS": "42"}, "does not know 42, only 90"),
    ],
)
def test_build_errors_say_what_to_do(tiny, env, message):
    home = str(tiny / "cuda_home")
    assert message in build(tiny, "--wheel", fails=True, CUDA_HOME=home, **env)


def test_editable_install_maps_kernels(tiny, tmp_path):
    """``fastbert.kernels`` is the folder kernels/, and there is no top-level ``kernels``."""
    hook = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    env = os.environ | {"FASTBERT_NATIVE": "1", "FASTBERT_CUDA": "0"}
    subprocess.run([sys.executable, "-c", hook], cwd=tiny, env=env, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import importlib.util, site; site.addsitedir('site'); import fastbert.kernels;"
        "print(fastbert.kernels.__file__);"
        "print(importlib.util.find_spec('fastbert.kernels.attention').origin);"
        "print(importlib.util.find_spec('fastbert._cpu').origin);"
        "print(importlib.util.find_spec('kernels'))"
    )
    # -S: none of this environment's packages, so that only the install under test answers.
    command = [sys.executable, "-S", "-E", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    assert done.stdout.splitlines() == [
        str(tiny / "kernels/__init__.py"),
        str(tiny / "kernels/attention.py"),
        str(tiny / f"fastbert/_cpu{suffix}"),
        "None",
    ], done.stderr


def test_kernels_init_is_only_a_docstring():
    """Were the repository's root on sys.path, transformers' probe for `kernels` would import it."""
    (statement,) = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def test_build_knows_no_torch():
    imports = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert "json" in names and "torch" not in names

    header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)')
    for path in sources(ROOT, "csrc"):
        assert not header.search((ROOT / path).read_text()), path


@pytest.mark.parametrize("name", device.SETTINGS)
def test_unset_and_empty_settings_are_none(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    assert device.setting(name) is None
    monkeypatch.setenv(name, " ")
    assert device.setting(name) is None


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("FASTBERT_BACKEND", "triton", "tritno"),
        ("FASTBERT_STRICT", "1", "yes"),
        ("FASTBERT_CPU_ISA", "avx2", "avx-2"),
        ("FASTBERT_NUM_THREADS", "4", "0"),
        ("FASTBERT_NUM_THREADS", "1", "-1"),
        ("FASTBERT_NUM_THREADS", "16", "2.5"),
    ],
)
def test_settings_are_checked(name, good, bad, monkeypatch):
    monkeypatch.setenv(name, good)
    assert device.setting(name) == good
    monkeypatch.setenv(name, bad)
    with pytest.raises(ValueError, match=f"{name}='{bad}': expected "):
        device.setting(name)


def test_unknown_setting_is_a_key_error():
    with pytest.raises(KeyError, match="FASTBERT_COLOUR"):
        device.setting("FASTBERT_COLOUR")


def test_machine_properties_are_sensible():
    assert 1 <= device.physical_cores() <= device.num_cpus() <= (os.cpu_count() or 1)
    assert device.cpu_name()
    assert device.memory_bytes() is None or device.memory_bytes() > 2**20


@pytest.fixture
def unbuilt(monkeypatch):
    """``_native`` as if neither module were built; returns how to set the facts of the build."""

    def set_facts(**facts):
        caches = _native._load, _native.cpu
        for function in caches:
            function.cache_clear()
        monkeypatch.setattr(_native, "build_info", lambda: facts)

    for name in ("fastbert._cpu", "fastbert._cuda"):
        monkeypatch.setitem(sys.modules, name, None)  # its import raises ModuleNotFoundError
    set_facts()
    yield set_facts
    _native._load.cache_clear()
    _native.cpu.cache_clear()


def test_missing_modules_have_reasons(unbuilt):
    assert "FASTBERT_NATIVE=0" in _native.cpu_reason()
    with pytest.raises(_native.NativeUnavailable, match="fastbert._cpu is not built"):
        _native.cpu()

    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    unbuilt(python=here, cuda_skipped="no nvcc at build time")
    assert _native.cuda_reason() == "fastbert._cuda is not built: no nvcc at build time"
    assert "install fastbert again" in _native.cpu_reason()
    with pytest.raises(_native.NativeUnavailable, match="no nvcc"):
        _native.cuda()

    unbuilt(python="3.9", cuda_skipped=None)
    assert f"Python 3.9 only, and this is {here}" in _native.cpu_reason()


def test_module_that_fails_to_load_has_a_reason(unbuilt, monkeypatch):
    def fail(name):
        raise ImportError("libm.so.6: version `GLIBC_2.99' not found")

    monkeypatch.setattr(_native.importlib, "import_module", fail)
    assert "fails to load: libm.so.6: version `GLIBC_2.99' not found" in _native.cpu_reason()


def test_isa_that_the_cpu_lacks(unbuilt, monkeypatch):
    """FASTBERT_CPU_ISA reaches the module when that is first loaded, if it can run it."""
    chosen = []
    module = types.ModuleType("fastbert._cpu")
    module.available_isas = lambda: ["avx2", "portable"]
    module.set_isa = chosen.append
    monkeypatch.setitem(sys.modules, "fastbert._cpu", module)

    monkeypatch.setenv("FASTBERT_CPU_ISA", "avx512")
    with pytest.raises(ValueError, match="='avx512': expected one of avx2, portable here"):
        _native.cpu()

    monkeypatch.setenv("FASTBERT_CPU_ISA", "portable")
    assert _native.cpu() is module and _native.cpu() is module
    assert chosen == ["portable"]
