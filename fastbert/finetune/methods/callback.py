"""Methods in the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from fastbert.finetune.methods.attach import Attached, attach, scale_steps
from fastbert.finetune.methods.base import Method


class MethodCallback(TrainerCallback):
    """``Trainer(model=…, callbacks=[MethodCallback(FreeLB())])`` trains by the method.

    The model changes when the Trainer is made, trains on the method's loss from ``train()`` on, and
    is finished when that ends. The optimiser may be any whose steps are proportional to its
    learning rate.

    class_counts: how many training examples each class has, for those methods that ask for it.
    Raises ValueError for a Trainer that makes its model itself (``model_init``), that this is added
    to later (``add_callback``), or that trains a second time: the method changes the model before
    its optimiser is made.
    """

    def __init__(self, method: Method, class_counts: Sequence[int] | None = None) -> None:
        self.method = method
        if class_counts is not None:
            method.count_classes(class_counts)
        self._prepared: Any = None
        self._attached: Attached | None = None
        self._handles: list[Any] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._prepared = kwargs["model"]
        self.method.prepare(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: Any = kwargs["model"]
        if model is not self._prepared:
            raise ValueError(
                "MethodCallback: got a model that it has not prepared, expected one train() of a "
                "Trainer(model=…, callbacks=[MethodCallback(…)])"
            )
        self._attached = attach(model, self.method)
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate has wrapped it
        self._handles = scale_steps(optimizer, model, self.method.rates(model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.after_step(kwargs["model"], state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if self._attached is not None:
            self._attached.remove()
        self.method.finish(kwargs["model"])
        self._prepared = None
