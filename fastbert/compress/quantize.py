"""quantize: a float model to one for inference, in int8 or bf16, as good as was asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastbert.compress import source as files
from fastbert.compress.batches import as_batches, random_batches
from fastbert.compress.calibrate import METHODS, input_scales
from fastbert.compress.encoder import QuantizedEncoder
from fastbert.compress.model import QuantizedModel, Report
from fastbert.compress.sensitivity import rank_layers
from fastbert.compress.smooth import smoothing
from fastbert.compress.weights import FloatWeights, chosen, engine_tensors, gather
from fastbert.hf.quantized import HuggingFaceSource
from fastbert.models import BertPreTrained
from fastbert.models.quantized import NativeSource
from fastbert.packed import PackedBatch

Tensor = torch.Tensor

SCHEMES = ("int8-dynamic", "int8-static", "bf16")

Evaluate = Callable[[nn.Module], float]


def quantize(
    model: nn.Module,
    scheme: str = "int8-dynamic",
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    calibrate: str = "mse",
    smooth_quant: float | None = 0.5,
    keep_float: Iterable[str | int] = (),
    evaluate: Evaluate | None = None,
    max_loss: float = 0.5,
) -> QuantizedModel:
    """A model for inference with the same arguments and outputs, its encoder in int8 or bf16.

    model: a model of fastbert's, or a bare or task model of ``transformers``, accelerated or not,
        of the families that ``accelerate`` knows; LoRA is merged. It stays as it is.
    scheme: "int8-dynamic", int8 weights by channel and int8 activations, each token by its own
        range; "int8-static", one scale a tensor, which ``calibration`` gives: less exact, with
        outliers far less; "bf16".
    calibration: texts, or batches as the model takes them (dicts with input_ids and attention_mask)
        or PackedBatches: a few hundred typical inputs. "int8-static" needs them; for smooth_quant
        random tokens do without.
    tokenizer: of those texts, a tokenizers.Tokenizer or a fast one of transformers; None takes that
        of the folder that the model came from. It is saved with the model.
    calibrate: how a static scale is found: "max", "percentile" (99.999% of the values fit in),
        "entropy" (least Kullback-Leibler divergence) or "mse" (least squared error).
    smooth_quant: alpha of SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4) for QKV and the first
        FFN matrix, or None.
    keep_float: layers and Linears to keep in bf16: 0, "layers.3", "layers.3.down", "down" (in all
        layers; of qkv, attention_output, up, down).
    evaluate: model -> score, higher is better. It is called with the float model and with the
        quantised one; while the score is more than ``max_loss`` lower, the layers that cost most
        are kept in bf16, one more at a time; ``report`` says which.
    max_loss: in the unit of the score.

    Heads and embedding sums stay in fp32; the tables are stored in bf16.
    Raises ValueError for what cannot be quantised, and where not even bf16 holds ``max_loss``.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: got {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if calibrate not in METHODS:
        raise ValueError(f"calibrate: got {calibrate!r}, expected one of {', '.join(METHODS)}")
    if smooth_quant is not None and not 0.0 <= smooth_quant <= 1.0:
        raise ValueError(f"smooth_quant: got {smooth_quant}, expected 0 <= alpha <= 1")
    if scheme == "int8-static" and calibration is None:
        raise ValueError("calibration: got None, expected texts or batches for int8-static")
    plan = Plan(model, scheme, tokenizer, keep_float)
    plan.prepare(calibration, calibrate, smooth_quant)
    if evaluate is None:
        return plan.build()
    return _gated(plan, model, evaluate, max_loss)


class Plan:
    """How to quantise one model: its weights, what is known of it, and which Linears are int8."""

    def __init__(
        self, model: nn.Module, scheme: str, tokenizer: Any = None, keep_float: Iterable[Any] = ()
    ) -> None:
        self.scheme = scheme
        self.source = source_of(model)
        self.weights: FloatWeights = gather(*self.source.parts())
        self.scales: Mapping[str, float] = {}
        self.smoothing: Mapping[str, Tensor] = {}
        linears = self.weights.linears
        kept = chosen(keep_float, linears)
        self.integer = [n for n in linears if scheme != "bf16" and n not in kept]
        self.facts = self.source.facts()
        config: Any = self.source.model.config
        positions = len(self.weights.tensors["embeddings.position"])
        labels = dict(getattr(config, "id2label", None) or {})
        folder = self.source.folder
        self.facts.update(
            library=self.source.library,
            labels=[str(labels[i]) for i in sorted(labels)],
            problem_type=getattr(config, "problem_type", None),
            config_json=self.source.config_json(),
            tokenizer_json=files.tokenizer_json(tokenizer, folder),
            **files.text_settings(folder, positions - self.facts["position_offset"]),
        )

    def prepare(self, data: Iterable[Any] | None, calibrate: str, alpha: float | None) -> None:
        """Find what quantising activations takes: factors of SmoothQuant, and static scales."""
        if not self.integer:
            return
        if data is not None:
            batches = as_batches(data, self.facts)
        elif alpha is not None:
            batches = random_batches(len(self.weights.tensors["embeddings.word"]), self.facts)
        if alpha is not None:
            self.smoothing = smoothing(self.weights, batches, alpha)
        if self.scheme == "int8-static":
            self.scales = input_scales(self.weights, batches, calibrate, self.smoothing)

    def encoder(self, integer: Collection[str]) -> QuantizedEncoder:
        """The encoder with these Linears in int8."""
        arrays = engine_tensors(self.weights, integer, self.scales, self.smoothing)
        return QuantizedEncoder(self.weights.config, arrays)

    def build(self, kept: Collection[str] = ()) -> QuantizedModel:
        """The quantised model, the layers ``kept`` in bf16."""
        return self.model([n for n in self.integer if n.rpartition(".")[0] not in kept], kept)

    def model(self, integer: Collection[str], kept: Collection[str] = ()) -> QuantizedModel:
        """The model with these Linears in int8."""
        encoder = self.encoder(integer)
        report = Report(
            scheme=self.scheme,
            integer=list(integer),
            floating=[n for n in self.weights.linears if n not in integer],
            encoder_bytes=sum(x.nbytes for x in encoder.tensors.values()),
            float_bytes=sum(x.nbytes for x in self.weights.tensors.values()),
            kept=list(kept),
        )
        return QuantizedModel(self.source.twin(encoder), encoder, report, dict(self.facts))


def source_of(model: nn.Module) -> NativeSource | HuggingFaceSource:
    """What knows where the parts of ``model`` are; ValueError for a model of no known kind."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, QuantizedModel):
        raise ValueError("model: is quantised already")
    if hasattr(model, "config"):
        files.check_plain(model.config)
    if isinstance(model, BertPreTrained):
        return NativeSource(model)
    base: Any = model
    if hasattr(base, "get_base_model"):  # peft's
        base = base.get_base_model()
    return HuggingFaceSource(base)


_WATCHED_TOKENS = 4096  # of evaluate's own batches, by which layers are ranked


def _gated(plan: Plan, model: nn.Module, evaluate: Evaluate, max_loss: float) -> QuantizedModel:
    """The quantised model with as few layers in bf16 as the score allows."""
    before = float(evaluate(model))
    seen: list[PackedBatch] = []

    def watch(batch: PackedBatch) -> None:
        if sum(b.num_tokens for b in seen) < _WATCHED_TOKENS:
            seen.append(batch)

    def scored(kept: Collection[str] = ()) -> QuantizedModel:
        result = plan.build(kept)
        result.encoder.watch = None if seen else watch
        result.report.score_before, result.report.score_after = before, float(evaluate(result))
        result.encoder.watch = None
        return result

    def holds(result: QuantizedModel) -> bool:
        after = result.report.score_after
        return after is not None and before - after <= max_loss  # not so for nan

    result = scored()
    if holds(result):
        return result
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in plan.integer))
    least = scored(layers) if layers else result
    if not holds(least):
        raise ValueError(
            f"max_loss: got {max_loss}, but the score falls from {before:.6g} to "
            f"{least.report.score_after:.6g} even with every Linear in bf16"
        )
    rows = rank_layers(plan, seen) if seen else [{"name": name} for name in layers]
    for count in range(1, len(layers)):
        result = scored([row["name"] for row in rows[:count]])
        if holds(result):
            break
    else:
        result = least
    result.report.sensitivity = rows
    return result
