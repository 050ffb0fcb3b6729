"""Method: one way to fine-tune better, and how several of them become one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

Tensor = torch.Tensor
# The arguments of a model's forward by name, labels among them: a PackedBatch under "batch", or
# padded tensors under Hugging Face's names.
Inputs = dict[str, Any]
# Inputs -> the model's output, with ``loss`` (0-d) and ``logits``.
Forward = Callable[[Inputs], Any]
Backward = Callable[[Tensor], None]


class Method:
    """One way to fine-tune better. Subclasses are dataclasses: their fields are their options.

    A training loop calls, in this order: ``count_classes`` where it knows the labels, ``prepare``
    once, ``rates`` for its optimiser, then ``gradients`` and ``after_step`` at each update, and
    ``finish`` once. A loop that calls backward itself takes ``loss`` in place of ``gradients``.

    name: as ``parse`` has it.  paper: where it is from.  summary: one line.
    order: those with a higher one wrap those with a lower one, and prepare later.
    group: of all methods of one group at most one is used at a time; "" for none.
    excludes: names of others that it does not go with.
    structural: True where the trained model keeps parts that a plain one of its class does not
        have: then its config names the method (``fastbert.finetune.methods.structure``).
    learning_rate: the peak that its paper trains with, None where that is plain fine-tuning's.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    order: ClassVar[int] = 0
    group: ClassVar[str] = ""
    excludes: ClassVar[tuple[str, ...]] = ()
    structural: ClassVar[bool] = False
    learning_rate: ClassVar[float | None] = None

    def count_classes(self, counts: Sequence[int]) -> None:
        """How many training examples (tokens, in tagging) each class has."""

    def prepare(self, model: nn.Module) -> None:
        """Change the model in place, before its optimiser is made; forget any earlier training.

        Raises ValueError for a model that the method does not fit.
        """

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Name of a parameter -> factor of its learning rate; 1 for those that are missing."""
        return {}

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        """The model's output for ``inputs``, its ``loss`` the one to minimise.

        forward: computes the output of the model, or of the methods inside this one; it may be
            called several times, with inputs that are changed, but for the same rows.
        """
        return forward(inputs)

    def gradients(
        self, forward: Forward, inputs: Inputs, backward: Backward, model: nn.Module
    ) -> Any:
        """Add the gradients of ``loss`` to the parameters'; returns the same output, whose loss is
        then of use for its value only.

        backward: called with each summand of the loss, and adds its gradients up.
        """
        output = self.loss(forward, inputs, model)
        backward(loss_of(self, output))
        return output

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        """Called after update ``step`` (1, 2, …) of ``total``."""

    def finish(self, model: nn.Module) -> None:
        """After training: make plain again what can be, with the same outputs in eval mode."""

    def state(self) -> dict[str, Tensor]:
        """What the method keeps from step to step, to be saved with a checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state; called after ``prepare``."""

    def __add__(self, other: Method) -> Methods:
        """Both at once. Raises ValueError if they do not go together."""
        if not isinstance(other, Method):
            return NotImplemented
        return Methods((self, other))

    def __str__(self) -> str:
        """As ``parse`` reads it: the name and the options that are not the default."""
        changed = [
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in options_of(type(self))
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


def loss_of(method: Method, output: Any) -> Tensor:
    """The loss of a model's output. Raises ValueError for an output without one."""
    if isinstance(output, tuple):
        raise ValueError(f"{method.name}: got a tuple from the model, expected return_dict=True")
    if getattr(output, "loss", None) is None:
        raise ValueError(f"{method.name}: got an output without a loss, expected labels as inputs")
    return output.loss


def options_of(kind: type[Method]) -> list[dataclasses.Field[Any]]:
    """The fields of a method that are its options."""
    return [field for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_text, value))
    return str(value)


def check_number(
    method: Method,
    option: str,
    least: float,
    most: float = math.inf,
    *,
    open_at_least: bool = False,
) -> None:
    """Raises ValueError unless an option of ``method`` is a number in its range, a whole one where
    its default is."""
    value, default = getattr(method, option), getattr(type(method), option)
    whole = isinstance(default, int)
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if is_number and (least < value or (value == least and not open_at_least)) and value <= most:
        return
    kind = "an int" if whole else "a number"
    above = f"> {least:g}" if open_at_least else f">= {least:g}"
    below = "" if most == math.inf else f" and <= {most:g}"
    raise ValueError(f"{method.name}: {option}: got {value!r}, expected {kind} {above}{below}")


@dataclass
class Methods(Method):
    """Several methods as one, nested by their ``order``; of none of them, plain fine-tuning.

    Raises ValueError for methods that do not go together.
    """

    name = "plain"
    paper = "arXiv 1810.04805, section 3.2"
    summary = "fine-tuning of all parameters on the loss of the task"

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        flat: list[Method] = []
        for method in self.methods:
            flat += method.methods if isinstance(method, Methods) else (method,)
        self.methods = tuple(sorted(flat, key=lambda method: (method.order, method.name)))
        _check_together(self.methods)

    @property
    def learning_rate(self) -> float | None:  # type: ignore[override]
        """The first that one of them asks for."""
        return next((m.learning_rate for m in self.methods if m.learning_rate is not None), None)

    @property
    def structural(self) -> bool:  # type: ignore[override]
        return any(method.structural for method in self.methods)

    def count_classes(self, counts: Sequence[int]) -> None:
        for method in self.methods:
            method.count_classes(counts)

    def prepare(self, model: nn.Module) -> None:
        for method in self.methods:
            method.prepare(model)

    def rates(self, model: nn.Module) -> dict[str, float]:
        product: dict[str, float] = {}
        for method in self.methods:
            for name, factor in method.rates(model).items():
                product[name] = product.get(name, 1.0) * factor
        return product

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        return _nested(self.methods, forward, model)(inputs)

    def gradients(
        self, forward: Forward, inputs: Inputs, backward: Backward, model: nn.Module
    ) -> Any:
        if not self.methods:
            return super().gradients(forward, inputs, backward, model)
        *inner, outermost = self.methods
        return outermost.gradients(_nested(inner, forward, model), inputs, backward, model)

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        for method in self.methods:
            method.after_step(model, step, total)

    def finish(self, model: nn.Module) -> None:
        for method in reversed(self.methods):
            method.finish(model)

    def state(self) -> dict[str, Tensor]:
        return {f"{m.name}.{key}": x for m in self.methods for key, x in m.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for method in self.methods:
            prefix = method.name + "."
            method.load_state(
                {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
            )

    def __str__(self) -> str:
        return "+".join(map(str, self.methods)) or self.name


def _nested(methods: Sequence[Method], forward: Forward, model: nn.Module) -> Forward:
    """``forward`` with each of ``methods`` around the one before."""
    for method in methods:
        forward = partial(method.loss, forward, model=model)
    return forward


def _check_together(methods: Sequence[Method]) -> None:
    names = [method.name for method in methods]
    text = "+".join(names)
    if len(set(names)) < len(names):
        raise ValueError(f"method: {text} has one twice")
    for method in methods:
        rivals = [m.name for m in methods if m.group and m.group == method.group]
        if len(rivals) > 1:
            raise ValueError(f"method: {' and '.join(rivals)} do not go together ({method.group})")
        for other in method.excludes:
            if other in names:
                raise ValueError(f"method: {method.name} and {other} do not go together")
