"""Builds the compiled modules: fastbert._cpu with g++ and, where nvcc is found, fastbert._cuda.

csrc/ includes no torch header: the build needs no torch, and one build serves every version of it.
Ninja runs the compilers, in parallel and only for what changed; objects stay in build/native.

Variables read here:
  FASTBERT_NATIVE=0              compile nothing: a pure-Python installation
  FASTBERT_CUDA=auto|0|1         auto (default): build fastbert._cuda if nvcc is found, and go on
                                 without it, warning, if that fails; 1: fail then; 0: leave it out
  FASTBERT_CUDA_ARCHS="80 90"    compile for these GPU generations only (a quick build)
  CXX, CUDA_HOME                 another C++ compiler; where to look for bin/nvcc first
  CXXFLAGS, LDFLAGS              added to the flags of fastbert._cpu (a build for a sanitizer, say)
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build", "native")  # relative to ROOT, where ninja runs

CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -pthread"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"-mavx512f -mavx512bw -mavx512vl -mavx512dq {AVX2}"
# In order of age: see link_order(). A unit linear_* without its flags compiles to nothing.
ISA_FLAGS = {
    "isa_avx2": AVX2,
    "linear_avx2": AVX2,
    "isa_avx512": AVX512,
    "linear_avx512": AVX512,
    "linear_avx512_vnni": f"{AVX512} -mavx512vnni",
    "linear_avx2_vnni": f"{AVX2} -mavxvnni",
    "linear_amx": f"{AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16",
}
# --threads 0: the targets of one file side by side, on as many threads as there are CPUs.
NVCC_FLAGS = (
    "-O3 -std=c++17 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden,-Wall --threads 0"
)
# A100 (and, of the same generation, RTX 30, L4 and RTX 40, which run its code); H100, H200; B200.
CUDA_TARGETS = ["80", "90a", "100"]

NINJA_RULES = """\
rule compile
  command = $compiler $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $compiler $in -o $out $flags
"""


class CudaBuildError(Exception):
    """The CUDA half cannot be built; the text says why."""


def choice(name, *allowed):
    """The environment variable `name`, by default the first of `allowed`; others end the build."""
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        sys.exit(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    return value


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def sources(*patterns):
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def isa_flags(source, compiler):
    """The flags of the source's instruction set; none where the compiler does not know them."""
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ISA_FLAGS.get(Path(source).stem, "") if on_x86 else ""
    if not flags:
        return ""
    probe = [compiler, *flags.split(), "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return flags
    print(f"{source} is left out: {compiler} does not know {flags}", file=sys.stderr)
    return ""


def link_order(source):
    """Plain files first, then the older instruction sets.

    An inline function compiled in several files is kept once, from the first file that has it. In
    this order no caller gets a copy made of instructions that its CPU may lack.
    """
    stem = Path(source).stem
    return list(ISA_FLAGS).index(stem) if stem in ISA_FLAGS else -1


def find_cxx():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        sys.exit(
            f"fastbert needs a C++17 compiler and finds none ({', '.join(names)}). Install one "
            "(`apt-get install g++`), or set FASTBERT_NATIVE=0 for a pure-Python installation."
        )
    return found


def find_nvcc():
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    names = [*(home / "bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, (shutil.which(str(name)) for name in names)), None)
    if found is None:
        raise CudaBuildError("no nvcc at build time (looked in CUDA_HOME, PATH, /usr/local/cuda)")
    return found


def find_ninja():
    found = shutil.which("ninja")  # in an isolated build pip puts it on PATH
    if found is None and importlib.util.find_spec("ninja"):
        from ninja import BIN_DIR  # the environment's own, when that is not activated

        found = shutil.which("ninja", path=BIN_DIR)
    return found or sys.exit("ninja is missing: `pip install ninja`, or let pip isolate the build")


def binding_flags():
    """Where bindings find pybind11 and Python; kernels need neither, and so no rebuild for it."""
    try:
        import pybind11
    except ImportError:
        sys.exit("pybind11 is missing: `pip install pybind11`, or let pip isolate the build")
    python_headers = sysconfig.get_path("include")
    if not Path(python_headers, "Python.h").exists():
        sys.exit(
            f"Python's headers are missing ({python_headers}/Python.h). Install them "
            "(`apt-get install python3-dev`), or set FASTBERT_NATIVE=0 to install without them."
        )
    return " ".join(f"-isystem {shlex.quote(p)}" for p in (pybind11.get_include(), python_headers))


def cuda_targets(nvcc):
    """The GPU generations to compile for: those asked for, else those of ours that nvcc knows."""
    asked = os.environ.get("FASTBERT_CUDA_ARCHS", "").replace(",", " ").split()
    known = {code.removeprefix("sm_") for code in output_of(nvcc, "--list-gpu-code").split()}
    # wgmma is in code for 90a alone, which every GPU of 9.0 runs.
    asked = list(dict.fromkeys("90a" if target == "90" else target for target in asked))
    unknown = [target for target in asked if target.rstrip("af") not in known]
    if unknown:
        names = " ".join(sorted(known, key=int))
        sys.exit(f"FASTBERT_CUDA_ARCHS: this nvcc does not know {' '.join(unknown)}, only {names}")
    targets = asked or [target for target in CUDA_TARGETS if target.rstrip("af") in known]
    if not targets:
        raise CudaBuildError(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_TARGETS)}")
    return targets


class FreshBuildPy(build_py):
    """Removes what an earlier build left, so that no stale module is installed or imported."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        if self.editable_mode:  # compiled modules stand in fastbert/ itself
            modules = ROOT.glob("fastbert/_*" + sysconfig.get_config_var("EXT_SUFFIX"))
            for stale in [ROOT / "fastbert/_build.json", *modules]:
                stale.unlink(missing_ok=True)
        super().run()


class NinjaBuildExt(build_ext):
    """Hands the extensions to ninja and writes to fastbert/_build.json what came of it."""

    def run(self):
        super().run()  # calls build_extensions, and copies the modules to fastbert/ if editable
        if self.extensions:
            facts = json.dumps(self.facts, indent=2) + "\n"
            for folder in [Path(self.build_lib)] + [ROOT] * bool(self.inplace):
                (folder / "fastbert/_build.json").write_text(facts)

    def build_extensions(self):
        (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
        cxx = find_cxx()
        self.facts = {
            "version": self.distribution.get_version(),
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "cxx": output_of(cxx, "--version").splitlines()[0],
            "nvcc": None,
            "cuda_targets": [],
            "cuda_skipped": "FASTBERT_CUDA=0 at build time" if CUDA == "0" else None,
        }
        cpu, *cuda = self.extensions
        cxx_flags = f"{CXX_FLAGS} {os.environ.get('CXXFLAGS', '')}"
        link_flags = f"-shared -pthread -ldl {os.environ.get('LDFLAGS', '')}"
        if not self.ninja(cpu, cxx, cxx_flags, link_flags):
            sys.exit("fastbert._cpu does not compile (see above). FASTBERT_NATIVE=0 leaves it out.")
        for extension in cuda:
            try:
                self.build_cuda(extension, cxx)
            except (CudaBuildError, subprocess.CalledProcessError) as error:
                if CUDA == "1":
                    sys.exit(f"FASTBERT_CUDA=1, but {error}")
                print(f"\n*** WARNING: fastbert._cuda is left out: {error}\n", file=sys.stderr)
                self.facts["cuda_skipped"] = str(error)
                self.extensions.remove(extension)

    def build_cuda(self, extension, cxx):
        nvcc = find_nvcc()
        targets = cuda_targets(nvcc)
        # As PTX too, for the GPUs that come after it: they refuse that of 90a or 100f.
        newest = f"compute_{targets[-1].rstrip('af')}"
        gencode = [f"-gencode arch=compute_{t},code=sm_{t}" for t in targets]
        gencode.append(f"-gencode arch={newest},code={newest}")
        host = f"-ccbin {shlex.quote(cxx)}"
        hopper = "-DFASTBERT_SM_90A" if "90a" in targets else ""
        flags = " ".join([host, NVCC_FLAGS, hopper, *gencode])
        # torch brings another CUDA runtime into the process: keep the symbols of this one inside.
        link = f"{host} -shared -cudart static -Xlinker --exclude-libs,ALL -ldl -lrt -lpthread"
        if not self.ninja(extension, nvcc, flags, link):
            raise CudaBuildError(f"its sources do not compile with {nvcc}")
        self.facts["nvcc"] = re.search(r"V[\d.]+", output_of(nvcc, "--version")).group()
        self.facts["cuda_targets"] = [*(f"sm_{t}" for t in targets), newest]

    def ninja(self, extension, compiler, flags, link_flags):
        """Compiles and links `extension`; False where a compiler fails."""
        name = extension.name.rpartition(".")[2]
        objects = []
        lines = [NINJA_RULES, f"builddir = {OBJECTS / name}", f"compiler = {shlex.quote(compiler)}"]
        for source in sorted(extension.sources, key=link_order):
            objects.append((OBJECTS / name / f"{source}.o").as_posix())
            bindings = "/bindings/" in source
            own = binding_flags() if bindings else isa_flags(source, compiler)
            lines.append(f"build {objects[-1]}: compile {source}\n  flags = {flags} -Icsrc {own}")
        module = (OBJECTS / Path(self.get_ext_filename(extension.name)).name).as_posix()
        lines.append(f"build {module}: link {' '.join(objects)}\n  flags = {link_flags}\n")
        build_file = OBJECTS / f"{name}.ninja"
        (ROOT / build_file).write_text("\n".join(lines))
        command = [find_ninja(), "-j", str(os.cpu_count()), "-f", str(build_file)]
        if subprocess.run(command, cwd=ROOT).returncode:
            return False
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / module, target)
        return True


NATIVE = choice("FASTBERT_NATIVE", "1", "0")
CUDA = choice("FASTBERT_CUDA", "auto", "0", "1")

extensions = []
if NATIVE == "1":
    bindings = [path for path in sources("csrc/bindings/*.cpp") if not path.endswith("/cuda.cpp")]
    extensions.append(Extension("fastbert._cpu", sources("csrc/cpu/*.cpp") + bindings))
if NATIVE == "1" and CUDA != "0":
    cuda_sources = sources("csrc/cuda/*.cu", "csrc/bindings/cuda.cpp")
    extensions.append(Extension("fastbert._cuda", cuda_sources))

setup(
    packages=[*find_packages(include=["fastbert", "fastbert.*"]), "fastbert.kernels"],
    package_dir={"fastbert.kernels": "kernels"},  # kernels/ stands beside fastbert/, not inside
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuildExt, "build_py": FreshBuildPy},
)
