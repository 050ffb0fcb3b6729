"""Setting: how a model is fine-tuned, and what a table of so many rows calls for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastbert.config import BertConfig

# A rate between 2e-5 and 5e-5 serves 12 layers of 768 (Devlin et al., arXiv 1810.04805, appendix
# A.3), 5e-5 to 3e-4 the small ones (Turc et al., arXiv 1908.08962, section 4): a power of the width
# between them.
_BASE_RATE, _BASE_WIDTH, _POWER = 3e-5, 768, 1.5
_UPDATES = 500  # below these, small tables are learnt badly (Mosbach et al., arXiv 2006.04884)
_EPOCHS = (3, 20)


@dataclass(frozen=True)
class Setting:
    """How to train; None is filled by ``for_data``.

    epochs: passes over the training rows.  learning_rate: the highest, after ``warmup``, a part of
        all updates, from where it falls to 0 along a line.
    batch: rows in an update, on average: an update takes as many tokens as so many rows of mean
        length have.  batch_tokens: what one process computes at once; an update that takes more
        accumulates.
    max_length: tokens of the longest sequence, special ones among them; None: as many as the model
        has positions, or the folder's tokenizer says.
    stride: tokens that neighbouring windows of a longer text share; None: a quarter of a window.
    weight_decay, bias_correction, max_grad_norm: of AdamW. Without bias correction small tables are
        learnt less reliably (Zhang et al., arXiv 2006.05987).
    dropout: of the encoder and the head; None: the checkpoint's.
    precision: "no", "bf16" or "fp16".  seed: of the first run.
    evaluations: how often in an epoch the development rows are looked at.
    early_stop: 0 or, of several seeds, the part of the training after which the worse half is given
        up (Dodge et al., arXiv 2002.06305, section 6).
    patience: evaluations without a better score after which a run ends; None: never.
    keep: checkpoints of a run.  tracker: what else shows the log: see ``fastbert.train.logging``.
    """

    epochs: int | None = None
    learning_rate: float | None = None
    batch: int = 32
    batch_tokens: int = 4096
    warmup: float = 0.1
    max_length: int | None = None
    stride: int | None = None
    weight_decay: float = 0.01
    bias_correction: bool = True
    max_grad_norm: float = 1.0
    dropout: float | None = None
    precision: str = "no"
    seed: int = 0
    evaluations: int = 1
    early_stop: float = 0.3
    patience: int | None = None
    keep: int = 1
    tracker: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch", "batch_tokens", "max_length",
                     "max_grad_norm", "evaluations", "patience", "keep"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value}, expected more than 0")
        for name in ("warmup", "early_stop", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}: got {value}, expected 0 <= {name} < 1")
        for name in ("stride", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: got {value}, expected 0 or more")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision: got {self.precision!r}, expected no, bf16 or fp16")

    def for_data(self, rows: int, config: BertConfig) -> Setting:
        """With every number that ``rows`` of training data and the model call for.

        epochs: 3, and up to 20 where that makes fewer than 500 updates; learning_rate:
        3e-5 (768 / H)^1.5.
        """
        fewest, most = _EPOCHS
        epochs = min(most, max(fewest, math.ceil(_UPDATES * self.batch / max(1, rows))))
        rate = _BASE_RATE * (_BASE_WIDTH / config.hidden_size) ** _POWER
        return self.replace(
            epochs=self.epochs or epochs,
            learning_rate=self.learning_rate or float(f"{rate:.1e}"),
        )

    def rates(self) -> dict[str, float]:
        """Dropout as a config has it."""
        if self.dropout is None:
            return {}
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        return dict.fromkeys(names, self.dropout)

    def replace(self, **changes: Any) -> Setting:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
