"""QuantizedModel: what ``fastbert.quantize`` and ``fastbert.load`` return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastbert.compress.encoder import QuantizedEncoder

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Report:
    """What ``quantize`` did.

    scheme: as asked for.
    integer, floating: names of the Linears in int8 and in bf16; ``kept`` names the layers that the
        quality gate put among the latter.
    score_before, score_after: of ``evaluate`` with the float and with the quantised model.
    sensitivity: rows of ``fastbert.compress.sensitivity`` by which the gate chose.
    encoder_bytes: of all tensors of the encoder.  float_bytes: of the same in fp32.
    """

    scheme: str
    integer: list[str]
    floating: list[str]
    encoder_bytes: int
    float_bytes: int
    kept: list[str] = field(default_factory=list)
    score_before: float | None = None
    score_after: float | None = None
    sensitivity: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.scheme}: {len(self.integer)} Linears in int8, {len(self.floating)} in bf16; "
            f"encoder {self.encoder_bytes / 1e6:.1f} MB, {self.float_bytes / 1e6:.1f} MB in fp32"
        ]
        if self.score_before is not None and self.score_after is not None:
            lines.append(f"score {self.score_after:.4g}, before {self.score_before:.4g}")
        if self.kept:
            lines.append(f"kept in bf16 to hold the score: {', '.join(self.kept)}")
        return "\n".join(lines)


class QuantizedModel(nn.Module):
    """A model for inference: the arguments and outputs of the float one, its encoder quantised.

    model: the task or bare model's heads in fp32 on ``encoder``.
    report: what was done.  facts: what ``save_pretrained`` writes about the model.
    The same bits come out whatever stands beside a sequence in its batch.
    """

    def __init__(
        self, model: nn.Module, encoder: QuantizedEncoder, report: Report, facts: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.encoder = encoder
        self.report = report
        self.facts = facts
        self.eval()

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The model's own, with its signature. Raises ValueError for output_attentions=True."""
        return self.model.forward

    @property
    def config(self) -> Any:
        """The float model's config."""
        return self.model.config

    @property
    def scheme(self) -> str:
        """ "int8-dynamic", "int8-static" or "bf16"."""
        return self.report.scheme

    @property
    def device(self) -> torch.device:
        """Where the heads are, and so where inputs belong."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def train(self, mode: bool = True) -> Self:
        """Only ``train(False)``: raises RuntimeError otherwise."""
        if mode:
            raise RuntimeError(
                "a quantised model is for inference: train the float model, then call "
                "fastbert.quantize again"
            )
        return super().train(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to ``folder``, for ``fastbert.load`` and ``fastbert.runtime.Encoder``.

        config.json, model.safetensors (int8 as int8, bf16 as bf16, heads in fp32), fastbert.json
        and, if the tokenizer is known, tokenizer.json. Every file is complete before the first
        takes its place: a save that fails leaves the folder as it was.
        """
        from fastbert.compress import saved

        saved.save(self, Path(folder))
