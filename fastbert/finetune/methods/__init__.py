"""Methods that make fine-tuning better, and how ``freelb:steps=3+layerwise-lr:.9`` becomes one.

``LayerwiseLR(0.9) + FreeLB() + Mixout(0.7)`` is a method too. In our own trainer, in a loop of
one's own (``attach``), and in the Trainer of transformers (``MethodCallback``).
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from fastbert.finetune.methods.adapters import Adapters
from fastbert.finetune.methods.attach import Attached, attach, scale_steps
from fastbert.finetune.methods.base import Forward, Inputs, Method, Methods, options_of
from fastbert.finetune.methods.cls_norm import ClsNorm
from fastbert.finetune.methods.freelb import FreeLB
from fastbert.finetune.methods.layers import GatedLayers, ScalarMix, SqueezeExcitation
from fastbert.finetune.methods.layerwise import LayerwiseLR
from fastbert.finetune.methods.lora import LoRA
from fastbert.finetune.methods.mixout import Mixout
from fastbert.finetune.methods.rdrop import RDrop
from fastbert.finetune.methods.reinit import Reinit
from fastbert.finetune.methods.smart import SMART
from fastbert.finetune.methods.smoothing import ClassWeights, LabelSmoothing

if TYPE_CHECKING:
    from fastbert.finetune.methods.callback import MethodCallback as MethodCallback

# Without MethodCallback: ``import *`` is not to import transformers.
__all__ = [
    "METHODS",
    "SMART",
    "Adapters",
    "Attached",
    "ClassWeights",
    "ClsNorm",
    "Forward",
    "FreeLB",
    "GatedLayers",
    "Inputs",
    "LabelSmoothing",
    "LayerwiseLR",
    "LoRA",
    "Method",
    "Methods",
    "Mixout",
    "RDrop",
    "Reinit",
    "ScalarMix",
    "SqueezeExcitation",
    "attach",
    "parse",
    "register",
    "scale_steps",
]

METHODS: dict[str, type[Method]] = {}
"""By name; each has a ``paper`` and a ``summary``. ``plain`` is none of them."""


def register(method: type[Method]) -> type[Method]:
    """Make a method known to ``parse``: a decorator for classes. Raises ValueError for a name that
    is taken."""
    if method.name in METHODS or method.name == Methods.name:
        raise ValueError(f"method: the name {method.name!r} is taken")
    METHODS[method.name] = method
    return method


for _method in (
    ScalarMix,
    SqueezeExcitation,
    GatedLayers,
    FreeLB,
    SMART,
    Mixout,
    Adapters,
    LoRA,
    LayerwiseLR,
    Reinit,
    ClsNorm,
    LabelSmoothing,
    ClassWeights,
    RDrop,
):
    register(_method)


_PLUS = re.compile(r"\+(?=[a-z])")  # between methods, and not in 1e+3


def parse(text: str) -> Methods:
    """``freelb:steps=3,epsilon=.6+layerwise-lr:.9`` to a method; ``plain`` to none at all.

    After a name and a colon come options, by commas; the first may go without its name. A list is
    written with slashes, ``class-weights:1/2.5``. ``str`` of a method gives such a text back.
    Raises ValueError for unknown names, bad options and methods that do not go together.
    """
    if text == Methods.name:
        return Methods()
    return Methods(tuple(_parse_one(part) for part in _PLUS.split(text)))


def _parse_one(text: str) -> Method:
    name, colon, rest = text.partition(":")
    if name not in METHODS:
        known = ", ".join((Methods.name, *METHODS))
        raise ValueError(f"method: got {name!r}, expected some of {known}, joined by +")
    kind = METHODS[name]
    options = [field.name for field in options_of(kind)]
    values: dict[str, Any] = {}
    for i, part in enumerate(rest.split(",") if colon else ()):
        option, equals, value = part.partition("=")
        if not equals and i == 0 and options:
            option, value = options[0], part
        if option not in options or option in values or not value:
            raise ValueError(
                f"method {name}: got {part!r}, expected option=value with some of "
                f"{', '.join(options)}, each at most once"
            )
        values[option] = _value(value)
    return kind(**values)


def _value(text: str) -> Any:
    """A number, yes or no, None, a list or a word."""
    if "/" in text:
        return tuple(_value(part) for part in text.split("/"))
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def __getattr__(name: str) -> Any:
    if name == "MethodCallback":  # transformers is imported by those who use its Trainer
        return importlib.import_module("fastbert.finetune.methods.callback").MethodCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
