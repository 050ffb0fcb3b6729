"""Masked-LM training of BERT as it is usually done, and one step after another towards ours.

Each way is a whole training step: forward, backward, optimiser; all start from the same random
weights, and read the same batch with 15% of its tokens masked. The steps, each with all before it:

    HF eager                     Hugging Face's BertForMaskedLM, attention by matrix products
    + SDPA                       torch's scaled_dot_product_attention
    + fused LayerNorm and GELU   fastbert's add_layer_norm and bias_gelu, on padded tokens
    + packed                     fastbert.accelerate: no padding, packed QKV, its attention
    + gathered head              the head on masked tokens alone, without the logits' matrix
    + graphs                     fastbert's own BertForMaskedLM, a step one CUDA graph a bucket
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from problem import lengths_of

import fastbert
from fastbert import ops
from fastbert.train import AdamW, Graphs, Pad, masked_lm_loss

Run = Callable[[], Any]
Tensor = torch.Tensor

STEPS = (
    "HF eager",
    "+ SDPA",
    "+ fused LayerNorm and GELU",
    "+ packed",
    "+ gathered head",
    "+ graphs",
)
PEERS = ("torch.compile", "torch.compile, max-autotune", "torch.compile, gathered head")
MASKED = 0.15
LR = 1e-4
SIZES = {  # layers, hidden size, heads, inner size
    "tiny": (2, 128, 2, 512),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}


@dataclass(frozen=True)
class Shape:
    name: str
    sequences: int
    longest: int
    kind: str = "dense"


@dataclass(frozen=True)
class Batch:
    """padded: what Hugging Face's model takes, with labels.  packed, labels: what ours takes.
    tokens: the real ones."""

    padded: dict[str, Tensor]
    packed: fastbert.PackedBatch
    labels: Tensor
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def make_batch(shape: Shape, where: str) -> Batch:
    lengths = lengths_of(shape.kind, shape.sequences, shape.longest)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (sum(lengths),), generator=generator)
    chosen = torch.rand(len(ids), generator=generator) < MASKED
    labels = torch.where(chosen, ids, -100)
    packed = fastbert.PackedBatch.from_flat(torch.where(chosen, 103, ids), lengths)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    padded = {
        "input_ids": packed.unpack(packed.input_ids[:, None]).squeeze(-1),
        "attention_mask": mask.long(),
        "labels": torch.full(mask.shape, -100).masked_scatter(mask, labels),
    }
    return Batch(
        {name: x.to(where) for name, x in padded.items()},
        packed.to(where),
        labels.to(where),
        lengths,
    )


def flops(size: str, lengths: list[int]) -> int:
    """Of a training step's products: 3 x (24 L H^2 a token and 4 L H n^2 a sequence of n, and the
    head's transform and decoder over the masked tokens)."""
    layers, hidden, _, inner = SIZES[size]
    linears = 2 * layers * (4 * hidden * hidden + 2 * hidden * inner) * sum(lengths)
    attention = 4 * layers * hidden * sum(n * n for n in lengths)
    head = 2 * round(MASKED * sum(lengths)) * hidden * (hidden + 30522)
    return 3 * (linears + attention + head)


def step_of(name: str, size: str, batch: Batch, where: str, dtype: torch.dtype) -> Run:
    """The training step ``name`` of STEPS or PEERS as a call that returns the loss."""
    if name == "+ graphs":
        return _own(size, batch, where, dtype)
    model = _hugging_face(size, "eager" if name == "HF eager" else "sdpa", where, dtype)
    if name == "+ fused LayerNorm and GELU":
        _fuse(model, where)
    elif name == "+ packed":
        fastbert.accelerate(model)
    elif name == "+ gathered head":
        fastbert.accelerate(model, skip_logits=True)

    def forward() -> Tensor:
        return model(**batch.padded).loss

    if name == "torch.compile, gathered head":

        def forward() -> Tensor:
            return _gathered(model, batch.padded)

    if name.startswith("torch.compile"):
        mode = "max-autotune-no-cudagraphs" if name.endswith("max-autotune") else None
        forward = torch.compile(forward, dynamic=False, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> Tensor:
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _hugging_face(size: str, attention: str, where: str, dtype: torch.dtype) -> Any:
    import transformers

    layers, hidden, heads, inner = SIZES[size]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=inner, attn_implementation=attention,
    )  # fmt: skip
    with torch.device(where):
        return transformers.BertForMaskedLM(config).to(dtype).train()


def _own(size: str, batch: Batch, where: str, dtype: torch.dtype) -> Run:
    layers, hidden, heads, inner = SIZES[size]
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=inner,
    )  # fmt: skip
    with torch.device(where):
        model = fastbert.BertForMaskedLM(config).to(dtype).train()
    optimizer = AdamW(model.parameters(), LR)
    masked = int((batch.labels != -100).sum())

    def step(packed: fastbert.PackedBatch, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = masked_lm_loss(model, packed, labels, masked)
        loss.backward()
        optimizer.step()
        return loss.detach()

    if where == "cpu":  # nothing to record: the model alone
        return lambda: step(batch.packed, batch.labels)
    recorded = Graphs(step, inputs={"labels": Pad("token", -100)}, max_length=512)
    return lambda: recorded(batch.packed, labels=batch.labels)


def _gathered(model: Any, padded: dict[str, Tensor]) -> Tensor:
    """The loss with the head over the masked tokens alone, which anyone may write."""
    labels = padded["labels"].flatten()
    hidden = model.bert(padded["input_ids"], padded["attention_mask"]).last_hidden_state
    chosen = (labels != -100).nonzero().squeeze(-1)
    logits = model.cls(hidden.flatten(0, 1)[chosen])
    return F.cross_entropy(logits.float(), labels[chosen])


def _fuse(model: Any, where: str) -> None:
    """Our LayerNorm and GELU in the layers' modules, on padded tokens as they are."""
    seed = torch.zeros(1, dtype=torch.int64, device=where)
    model.register_forward_pre_hook(lambda *args: seed.add_(1) and None)

    def norm(module: Any, site: int) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(hidden: Tensor, residual: Tensor) -> Tensor:
            x = F.linear(hidden, module.dense.weight).flatten(0, 1)
            y = ops.add_layer_norm(
                x, residual.flatten(0, 1), module.LayerNorm.weight, module.LayerNorm.bias,
                x_bias=module.dense.bias, eps=module.LayerNorm.eps,
                dropout_p=module.dropout.p, dropout_seed=seed, dropout_offset=site,
            )  # fmt: skip
            return y.view(residual.shape)

        return forward

    def gelu(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.bias_gelu(F.linear(x, module.dense.weight), module.dense.bias)

    for i, layer in enumerate(model.bert.encoder.layer):
        layer.attention.output.forward = norm(layer.attention.output, 2 * i)
        layer.output.forward = norm(layer.output, 2 * i + 1)
        layer.intermediate.forward = gelu(layer.intermediate)
