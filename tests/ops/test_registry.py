"""The table: what it names exists, and choice, force, strictness and refusal do as they say."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import subprocess
import sys

import pytest
import torch

from fastbert import _native, device
from fastbert.ops import (
    BACKENDS,
    OPS,
    BackendError,
    _registry,
    bias_gelu,
    choices,
    embed_layer_norm,
    use_backend,
)

from ._targets import DEVICES

X = torch.ones(2, 8)


@pytest.fixture
def without_cpp(monkeypatch: pytest.MonkeyPatch):
    """As on a machine without fastbert._cpu and without Triton's interpreter."""
    monkeypatch.setattr(_native, "cpu_reason", lambda: "left out for this test")
    monkeypatch.setattr(device, "triton_interpreted", lambda: False)
    _registry.forget_choices()
    yield
    _registry.forget_choices()


@pytest.fixture(autouse=True)
def restored():
    with use_backend(None, strict=False):
        yield


# ----------------------------------------------------------------------------------- the table


def test_cpp_is_here() -> None:
    """An installation that compiled it must load it: nothing may skip the C++ tests silently."""
    if not _native.build_info():
        pytest.skip("installed with FASTBERT_NATIVE=0, or not installed at all")
    assert _native.cpu_reason() is None


@pytest.mark.gpu
def test_gpu_backends_are_here() -> None:
    if device.cuda_reason() is not None:
        pytest.skip(str(device.cuda_reason()))
    assert BACKENDS["triton"].reason("cuda") is None
    if _native.build_info().get("cuda_targets"):
        assert BACKENDS["cuda"].reason("cuda") is None


def test_tests_know_every_backend() -> None:
    assert set(DEVICES) == set(BACKENDS)
    assert {backend for op in OPS.values() for backend in op.modules} == set(BACKENDS)


@pytest.mark.parametrize("name", OPS)
def test_every_launcher_of_the_table_exists(name: str) -> None:
    """With one list of parameters in all backends, which dispatch relies on."""
    op = OPS[name]
    assert list(op.modules)[-1] == "reference", "the last resort"
    for half in op.halves:
        function = name if op.halves == ("fwd",) else f"{name}_{half}"
        parameters = {}
        for backend, module in op.modules.items():
            if module.startswith("fastbert.kernels") and not importlib.util.find_spec("triton"):
                continue
            launcher = getattr(importlib.import_module(module), function, None)
            assert launcher is not None, f"{module}.{function}"
            if backend != "reference":  # made from the ops' own functions, with *rest
                parameters[backend] = list(inspect.signature(launcher).parameters)
        assert len(set(map(tuple, parameters.values()))) <= 1, parameters


# ---------------------------------------------------------------------------------- the choice


def test_automatic_choice_takes_the_first_that_can() -> None:
    for name, op in OPS.items():
        usable = [
            backend
            for backend in op.modules
            if _registry.refusal(op, backend, "cpu", torch.float32, 64) is None
        ]
        row = next(row for row in choices("cpu", torch.float32, {}) if row["op"] == name)
        assert row["backend"] == usable[0]
        assert list(row["passed_over"]) == list(op.modules)[: list(op.modules).index(usable[0])]


def test_choices_under_force() -> None:
    with use_backend("reference"):
        for row in choices("cpu", torch.float32, {}):
            assert row["backend"] == "reference"
            assert set(row["passed_over"]) == set(OPS[row["op"]].modules) - {"reference"}
            assert all(row["passed_over"].values())


def test_refusals_say_why() -> None:
    attention, gather = OPS["attention"], OPS["gather_rows"]
    for reason, words in [
        (_registry.refusal(gather, "cuda", "cuda", torch.float32, 64), "no cuda kernel"),
        (_registry.refusal(attention, "cpp", "cuda", torch.float32, 64), "CPU tensors, not cuda"),
        (_registry.refusal(attention, "cpp", "cpu", torch.float16, 64), "do not take float16"),
        (_registry.refusal(attention, "triton", "cuda", torch.float64, 64), "float64"),
        (_registry.refusal(attention, "triton", "cuda", torch.float32, 257), "256, not 257"),
        (_registry.refusal(attention, "cuda", "cpu", torch.float32, 64), "CUDA tensors, not cpu"),
    ]:
        assert reason is not None and words in reason
    assert _registry.refusal(attention, "reference", "cpu", torch.float16, 64) is None


@pytest.mark.parametrize(
    ("targets", "serves", "refuses"),
    [
        (["sm_80", "sm_89", "compute_89"], [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
        (["sm_90", "sm_100"], [(9, 0), (10, 0), (10, 3)], [(8, 0), (8, 9), (12, 0)]),
        (["sm_90a", "compute_90a"], [(9, 0)], [(8, 0), (10, 0)]),
        (["sm_100f", "compute_100f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
    ids=lambda value: str(value[0]) if isinstance(value[0], str) else "",
)
def test_cuda_kernels_built_for_other_gpus_are_passed_over(
    targets: list[str],
    serves: list[tuple[int, int]],
    refuses: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They would load, and fail at the first launch."""
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_targets": targets})
    monkeypatch.setattr(_native, "cuda_reason", lambda: None)
    monkeypatch.setattr(device, "cuda_reason", lambda: None)
    for capability in serves + refuses:
        monkeypatch.setattr(device, "cuda_capability", lambda index, c=capability: c)
        reason = BACKENDS["cuda"].reason("cuda")
        if capability in serves:
            assert reason is None
        else:
            assert f"built for {', '.join(targets)}" in str(reason)
            assert "sm_{}{}".format(*capability) in str(reason)


def test_use_backend_nests_and_restores() -> None:
    def chosen() -> str:
        return choices("cpu", torch.float32, {})[0]["backend"]

    automatic = chosen()
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("auto"):
            assert chosen() == automatic
        assert chosen() == "reference"
        with pytest.raises(KeyError), use_backend(None, strict=True):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == automatic
    use_backend("reference")
    assert chosen() == "reference"


# ----------------------------------------------------------------------------------- the force


@pytest.mark.parametrize("name", ["cpu", "", "Triton", 3])
def test_unknown_backend(name: object) -> None:
    with pytest.raises(ValueError, match=rf"^backend: unknown name '{name}'.*'cpp'.*'triton'"):
        use_backend(name)


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_that_cannot_run_here_is_refused_at_once(name: str) -> None:
    reasons = [BACKENDS[name].reason(kind) for kind in ("cpu", "cuda")]
    if None in reasons:
        with use_backend(name):
            return
    with pytest.raises(BackendError, match=f"backend '{name}' cannot run here: ") as caught:
        use_backend(name)
    assert all(str(reason) in str(caught.value) for reason in reasons)


def test_forced_backend_that_is_not_there(without_cpp: None) -> None:
    with pytest.raises(BackendError, match="'cpp' cannot run here: left out for this test"):
        use_backend("cpp")


def test_forced_backend_that_cannot_serve_the_call() -> None:
    if _native.cpu_reason() is not None:
        pytest.skip(str(_native.cpu_reason()))
    half = X.half().requires_grad_()
    with use_backend("cpp"):
        with pytest.raises(BackendError, match="^bias_gelu: backend 'cpp' is forced.*float16"):
            bias_gelu(half)
        with pytest.raises(BackendError, match="^embed_layer_norm: "):
            ids = torch.arange(2)
            embed_layer_norm(ids, ids, None, half, half, None, half[0], half[0])
    assert bias_gelu(half).dtype == torch.float16, "the automatic choice finds the reference"


# ----------------------------------------------------------------------------- the last resort


def test_fall_back_is_told_once(without_cpp: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        bias_gelu(X)
        bias_gelu(X)
    (record,) = caplog.records
    assert "bias_gelu" in record.getMessage()
    assert "left out for this test" in record.getMessage()


def test_strict_mode_refuses_to_fall_back(without_cpp: None) -> None:
    with use_backend(strict=True):
        with pytest.raises(BackendError, match="^bias_gelu: strict mode.*left out for this test"):
            bias_gelu(X)
        with use_backend("reference"):
            bias_gelu(X)  # asked for by name: nothing silent about it
        with pytest.raises(BackendError):
            bias_gelu(X)
    bias_gelu(X)


# ------------------------------------------------------------------------------ the environment


def test_auto_in_the_environment_forces_nothing() -> None:
    code = "from fastbert.ops import _registry; print(_registry._forced)"
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "FASTBERT_BACKEND": "auto"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "None\n", done.stderr


def test_environment() -> None:
    """In a process of its own: the variables are read once, when the table is imported."""
    code = """
import os
for name, value in (("FASTBERT_BACKEND", "cudnn"), ("FASTBERT_STRICT", "yes")):
    os.environ[name] = value
    try:
        import fastbert.ops
    except ValueError as error:
        print(error)
    del os.environ[name]

os.environ |= {"FASTBERT_BACKEND": "reference", "FASTBERT_STRICT": "1"}
import torch
from fastbert import _native, device, ops
_native.cpu_reason = lambda: "left out for this test"
device.triton_interpreted = lambda: False
print({row["backend"] for row in ops.choices("cpu", torch.float32, {})})
ops.use_backend("auto")
try:
    ops.bias_gelu(torch.ones(2, 2))
except ops.BackendError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    bad_backend, bad_strict, forced, strict = done.stdout.splitlines()
    assert bad_backend.startswith("FASTBERT_BACKEND='cudnn': expected one of auto, cpp, ")
    assert bad_strict.startswith("FASTBERT_STRICT='yes': expected one of ")
    assert forced == "{'reference'}"
    assert strict.startswith("bias_gelu: strict mode, and only the reference can serve")


@pytest.mark.parametrize(
    ("op", "size", "words"),
    [
        ("attention", 128, None),
        ("attention", 256, "the triton kernel of attention for sizes above 128 is for sm_80"),
        ("feed_forward", 768, "the triton kernel of feed_forward is for sm_80 and later"),
        ("linear_int8", 768, "the triton kernel of linear_int8 is for sm_80 and later"),
        ("add_layer_norm", 768, None),
    ],
)
def test_what_earlier_gpus_run(
    op: str, size: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "triton_reason", lambda: None)
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(device, "cuda_capability", lambda index, found=capability: found)
        why = _registry.refusal(OPS[op], "triton", "cuda", torch.float16, size)
        if words is None or capability == (8, 0):
            assert why is None
        else:
            assert why is not None and why.startswith(words)
