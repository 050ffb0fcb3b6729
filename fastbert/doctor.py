"""doctor: the facts about this installation and machine that explain a speed or its absence."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from fastbert import _native, device

_PACKAGES = ("fastbert", "torch", "triton", "transformers", "numpy")


def doctor() -> dict[str, Any]:
    """Facts as plain data: ``fastbert doctor --json`` prints exactly this.

    Keys: versions; cpu (name, cores, memory, instruction sets: usable ones and the one in use);
    native (what was compiled, or why not); gpu; settings (the FASTBERT_* variables that are set);
    ops: for each device and dtype, the backend of each op at BERT-base's sizes and why every better
    placed backend was passed over.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "native": {
            "cpu_kernels": _native.cpu_reason() or "built",
            "cuda_kernels": _native.cuda_reason() or "built for " + ", ".join(_cuda_targets()),
        },
        "gpu": _gpu(),
        "settings": {n: v for n in device.SETTINGS if (v := device.setting(n)) is not None},
        "ops": _ops(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cpu() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "cpu": device.cpu_name(),
        "cores": device.physical_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round((device.memory_bytes() or 0) / 2**30, 1),
        "matrix_flags": sorted(
            flag
            for flag in device.cpu_flags()
            if flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni")
            or flag.startswith("amx")
        ),
    }
    if _native.cpu_reason() is None:
        native = _native.cpu()
        facts["instruction_set"] = native.isa()
        facts["instruction_sets"] = list(native.available_isas())
    return facts


def _cuda_targets() -> list[str]:
    return _native.build_info().get("cuda_targets", [])


def _gpu() -> dict[str, Any]:
    reason = device.cuda_reason()
    if reason is not None:
        return {"gpu": f"none: {reason}"}
    import torch

    names = {}
    for index in range(torch.cuda.device_count()):
        major, minor = device.cuda_capability(index)
        names[f"gpu_{index}"] = f"{device.cuda_name(index)} (sm_{major}{minor})"
    return names


def _ops() -> list[dict[str, Any]]:
    import torch

    from fastbert.ops import choices

    sizes = {"attention": 64, "bias_gelu": 3072, "cross_entropy_rows": 30522}
    sizes |= dict.fromkeys(
        (
            "add_layer_norm",
            "embed_layer_norm",
            "gather_rows",
            "scatter_rows",
            "quantize_rows",
            "linear_int8",
        ),
        768,
    )
    kinds = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if device.cuda_reason() is None:
        kinds = [("cuda", torch.bfloat16), ("cuda", torch.float32), *kinds]
    return [
        {
            "device": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "choices": choices(kind, dtype, sizes),
        }
        for kind, dtype in kinds
    ]
