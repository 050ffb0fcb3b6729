"""BertConfig: the shape of a BERT, under Hugging Face's names and in Hugging Face's config.json.

It holds the model and never the kernels: which backend computes an op is chosen at run time
(``fastbert.use_backend``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# hidden_act as Hugging Face spells it -> what it is. "none" is GELU by erf, "tanh" Google's
# approximation of it, both fused with the bias; the others are applied as they are.
ACTIVATIONS: dict[str, str] = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_accurate": "tanh",
    "gelu_fast": "tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# name -> (layers, hidden size): Devlin et al., arXiv 1810.04805, section 3, and for the small ones
# Turc et al., arXiv 1908.08962, table 1. Everywhere 64 channels a head and an FFN of 4 H.
_PRESETS: dict[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes, activation, dropout and labels of a BERT (Devlin et al., arXiv 1810.04805).

    Names and defaults are Hugging Face's, and so is the meaning: ``hidden_act="gelu"`` is the erf
    form. Labels follow from each other: give ``num_labels``, or ``id2label``, or neither.

    extra: what else a config.json held (``dtype``, ``use_cache``, …), kept to be written back.

    Raises ValueError, naming the field, for sizes that do not fit together, dropout outside [0, 1),
    an unknown activation, and for what this encoder does not compute: another ``model_type``,
    decoders, cross-attention, relative positions, pruned heads.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    classifier_dropout: float | None = None
    problem_type: str | None = None
    # None stands for "as the other label fields say"; __post_init__ fills all three.
    num_labels: int = None  # type: ignore[assignment]
    id2label: dict[int, str] = field(default=None, hash=False)  # type: ignore[arg-type]
    label2id: dict[str, int] = field(default=None, hash=False)  # type: ignore[arg-type]
    architectures: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._settle_labels()
        if self.architectures is not None:
            self._set("architectures", tuple(self.architectures))
        self._check_sizes()
        self._check_rates()
        self._check_supported()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> BertConfig:
        """One of the published sizes: "tiny", "mini", "small", "medium", "base" or "large".

        changes: fields that differ, such as ``vocab_size``.
        """
        if name not in _PRESETS:
            raise ValueError(
                f"preset: unknown name {name!r}, expected one of {', '.join(_PRESETS)}"
            )
        layers, hidden = _PRESETS[name]
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": hidden // 64,
            "intermediate_size": 4 * hidden,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """From what a config.json holds; keys that are not fields go to ``extra``."""
        values = dict(values)
        model_type = values.pop("model_type", "bert")  # the first checkpoints did not name it
        if model_type != "bert":
            raise ValueError(
                f"model_type: got {model_type!r}, expected 'bert'. Load a model of another "
                "architecture with transformers and call fastbert.accelerate on it"
            )
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in names}
        return cls(**{key: value for key, value in values.items() if key in names}, extra=extra)

    @classmethod
    def from_json(cls, path: str | Path) -> BertConfig:
        """From a config.json.

        Raises FileNotFoundError, or ValueError for a file that does not hold such a config.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What Hugging Face's config.json holds: ``extra``, every field, and ``model_type``.

        Labels are there, as in Hugging Face's, where they are not the default LABEL_0, LABEL_1.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values.update(values.pop("extra"), model_type="bert")
        num_labels = values.pop("num_labels")
        if (num_labels, self.id2label, self.label2id) == (2, *_default_labels(2)):
            del values["id2label"], values["label2id"]
        for optional in ("architectures", "problem_type"):
            if values[optional] is None:
                del values[optional]
        if self.architectures is not None:
            values["architectures"] = list(self.architectures)
        return values

    def to_json(self) -> str:
        """The text of a config.json, keys in order."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def replace(self, **changes: Any) -> BertConfig:
        """The same config with some fields changed. A new number of labels drops old names."""
        if changes.get("num_labels", self.num_labels) != self.num_labels:
            changes = {"id2label": None, "label2id": None, **changes}
        elif "id2label" in changes:
            changes = {"num_labels": None, "label2id": None, **changes}
        return dataclasses.replace(self, **changes)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the one way into a frozen dataclass

    def _settle_labels(self) -> None:
        if self.id2label is None:
            count = 2 if self.num_labels is None else self.num_labels
            if not _is_int(count) or count < 1:
                raise ValueError(f"num_labels: got {count!r}, expected an int >= 1")
            self._set("num_labels", count)
            self._set("id2label", _default_labels(count)[0])
        else:
            self._set("id2label", {int(key): name for key, name in self.id2label.items()})
            if self.num_labels is None:
                self._set("num_labels", len(self.id2label))
        if len(self.id2label) != self.num_labels:
            raise ValueError(
                f"id2label: got {len(self.id2label)} names for {self.num_labels} labels"
            )
        if self.label2id is None:
            self._set("label2id", {name: key for key, name in self.id2label.items()})

    def _check_sizes(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected an int >= {least}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        pad = self.pad_token_id
        if pad is not None and not (_is_int(pad) and 0 <= pad < self.vocab_size):
            raise ValueError(
                f"pad_token_id: got {pad!r}, expected None or 0 .. {self.vocab_size - 1} "
                "(vocab_size - 1)"
            )

    def _check_rates(self) -> None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if not _is_number(value) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name}: got {value!r}, expected 0 <= {name} < 1")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 < value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, expected a number > 0")

    def _check_supported(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"hidden_act: got {self.hidden_act!r}, expected one of {known}")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            known = ", ".join(PROBLEM_TYPES)
            raise ValueError(f"problem_type: got {self.problem_type!r}, expected one of {known}")
        for name, computed in _ONLY.items():
            value = self.extra.get(name, computed)
            if value != computed:
                raise ValueError(
                    f"{name}: got {value!r}; this encoder computes {name} = {computed!r} only"
                )


_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 1,
}

# Keys of a Hugging Face config.json that change what the model computes, and the one value here.
_ONLY: dict[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _default_labels(count: int) -> tuple[dict[int, str], dict[str, int]]:
    names = {i: f"LABEL_{i}" for i in range(count)}
    return names, {name: i for i, name in names.items()}
