"""Peak memory of a masked-LM training step, each candidate in a process of its own.

``bench/model.py --task memory`` runs all of them; ``python bench/model_memory.py NAME DEVICE``
prints one as JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from masked_lm import Shape  # noqa: E402
from model_candidates import build, make_batch  # noqa: E402

import fastbert  # noqa: E402

CANDIDATES = ("HF SDPA", "fastbert, skip_logits", "fastbert native")


def memory_of(name: str, where: str) -> dict[str, float]:
    """Peak bytes of two MLM training steps, B 8 S 128, fp32, above parameters and gradients."""
    batch, _ = make_batch(Shape("B8 S128", 8, 128), where)
    labels = torch.full_like(batch["input_ids"], -100)
    chosen = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) < 0.15
    labels[chosen.to(where)] = batch["input_ids"][chosen.to(where)]
    if name == "fastbert native":
        torch.manual_seed(0)
        with torch.device(where):
            module: Any = fastbert.BertForMaskedLM(fastbert.BertConfig.preset("base"))
    else:
        module = build("HF", "BertForMaskedLM", "sdpa", where, torch.float32, "base")
        if name == "fastbert, skip_logits":
            fastbert.accelerate(module, skip_logits=True)
    module.train()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)  # touched, so that its pages count as there
    gc.collect()
    start = _current_bytes(where)
    _reset_peak(where)
    for _ in range(2):
        module(**batch, labels=labels).loss.backward()
    return {"peak_bytes": _peak_bytes(where) - start}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _current_bytes(where: str) -> int:
    return torch.cuda.memory_allocated() if where == "cuda" else _status_bytes("VmRSS")


def _reset_peak(where: str) -> None:
    if where == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(where: str) -> int:
    return torch.cuda.max_memory_allocated() if where == "cuda" else _status_bytes("VmHWM")


def memory(where: str) -> dict[str, Any]:
    """``memory_of`` every candidate, each in its own process, and the ratios to Hugging Face."""
    rows = {}
    for name in CANDIDATES:
        command = [sys.executable, __file__, name, where]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    base = rows["HF SDPA"]["peak_bytes"]
    for row in rows.values():
        row["percent_of_hf"] = 100 * row["peak_bytes"] / base
    return rows


if __name__ == "__main__":
    print(json.dumps(memory_of(*sys.argv[1:])))
