"""FusedLayer: what stands in for the forward of one Hugging Face encoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastbert.hf.parts import layer_obstacle, layer_parts, left_alone
from fastbert.hf.replacement import Replacement
from fastbert.nn.layer import encoder_layer
from fastbert.packed import PackedBatch, TracedBatch

Tensor = torch.Tensor


class ModelPass:
    """A ``fastbert.nn.layer.Pass`` whose seed is drawn when a layer first asks for it.

    Hugging Face applies a dropout whenever that Dropout module is in training mode, whatever the
    mode of the model (the usual way to Monte Carlo dropout); a pass in which none is must not
    advance the generator.
    """

    def __init__(self, config: Any, device: torch.device, want_attentions: bool) -> None:
        self.config = config
        self.device = device
        self.attentions: list[Tensor] | None = [] if want_attentions else None
        self._seed: Tensor | None = None

    @property
    def dropout_seed(self) -> Tensor:
        """int64 (1,), from torch's generator of the device."""
        if self._seed is None:
            self.draw()
        assert self._seed is not None
        return self._seed

    def draw(self) -> None:
        span = (-(2**63), 2**63 - 1)
        self._seed = torch.randint(*span, (1,), dtype=torch.int64, device=self.device)


class FusedLayer(Replacement):
    """``layer(x, batch, run, index)`` on packed tokens (T, H); any other call is the original's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 or not isinstance(args[1], PackedBatch):
            return self.original(*args, **kwargs)
        layer: Any = self.module
        cls: Any = type(layer)
        if checkpoints(layer) and not _checkpoints_in_call(cls):
            return layer._gradient_checkpointing_func(self._packed, *args)
        return self._packed(*args)

    @torch.compiler.assume_constant_result  # later hooks go unseen, as in torch
    def obstacle(self) -> str | None:
        return layer_obstacle(self.family, self.module)

    def left(self) -> list[str]:
        return left_alone(layer_parts(self.family, self.module))

    def _packed(self, x: Tensor, batch: PackedBatch, run: Any, index: int) -> Tensor:
        obstacle = self.obstacle()
        if obstacle is not None:
            self.note(obstacle)
            return self._padded(x, batch, run.config)
        parts = layer_parts(self.family, self.module)
        # training=True: each dropout module's own flag decides, as in Hugging Face.
        return encoder_layer(parts, x, batch, run, index, training=True)

    def _padded(self, x: Tensor, batch: PackedBatch, config: Any) -> Tensor:
        """The original forward on sequences padded to the longest; empty ones stay out of it."""
        from transformers.masking_utils import create_bidirectional_mask

        if isinstance(batch, TracedBatch):
            rows: PackedBatch = batch
            real = batch.unpack(torch.ones_like(x[:, 0])) != 0
            real = real | ~real.any(1, keepdim=True)  # no row without a key, whose softmax is NaN
        else:
            lengths = [n for n in batch.lengths if n]
            if not lengths:
                return x
            rows = PackedBatch.from_flat(None, lengths, inputs_embeds=x)
            columns = torch.arange(rows.padded_shape[1], device=x.device)
            real = columns < torch.tensor(lengths, device=x.device)[:, None]
        padded = rows.unpack(x)
        mask = create_bidirectional_mask(config=config, inputs_embeds=padded, attention_mask=real)
        y = rows.pack(self.original(padded, mask))
        assert y is not None
        return y


def checkpoints(layer: Any) -> bool:
    """True for a layer that gradient checkpointing computes again in backward."""
    return bool(getattr(layer, "gradient_checkpointing", False) and layer.training)


@torch.compiler.assume_constant_result
def _checkpoints_in_call(cls: Any) -> bool:
    """True where gradient checkpointing wraps the class's ``__call__``, and so us (5.17).

    Later versions of transformers wrap its ``forward``, which an instance's own replaces: then the
    fused layer checkpoints itself.
    """
    return cls.__call__ is not nn.Module.__call__
