"""PretrainingModel: an encoder and the heads of some objectives, from a batch to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.config import BertConfig
from fastbert.models import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
    BertPreTrained,
)
from fastbert.nn import BertLayer, LMPredictions
from fastbert.pretrain.collate import PretrainingBatch
from fastbert.pretrain.encode import encode
from fastbert.pretrain.objectives import Encoded, Objective, SequenceClass, Term
from fastbert.train.flops import TRAINING, encoder_flops
from fastbert.train.parameters import is_sharded
from fastbert.train.states import whole

Tensor = torch.Tensor

_LM = "lm"  # the head that checkpoints call cls.predictions
_CHECKPOINT_PAIRS = ("nsp", "sop")  # the heads of two classes: cls.seq_relationship


@dataclass(frozen=True, eq=False)
class PretrainingOutput:
    """loss: 0-d, what to minimise.  terms: its summands.  counts: how many targets each has."""

    loss: Tensor
    terms: dict[str, Term]
    counts: dict[str, int]

    def losses(self) -> dict[str, Tensor]:
        """The mean loss of each summand over its targets, without its weight."""
        return {
            name: t.total.detach() / max(1, self.counts[name]) for name, t in self.terms.items()
        }

    def accuracies(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each summand that was measured, the part of its targets that the best guess gets
        right, and the part that the batch's most frequent answer gets: the level of chance."""
        measured = {}
        for name, term in self.terms.items():
            if term.correct is not None and term.chance is not None:
                count = max(1, self.counts[name])
                measured[name] = term.correct / count, term.chance / count
        return measured


class PretrainingModel(nn.Module):
    """``bert`` and ``heads``.

    A summand of the loss is called as its objective, or ``objective/part`` where there are several.
    tied: name of a parameter -> the name of the one that it is one with, for checkpoints.
    """

    _no_split_modules = (BertLayer.__name__,)  # what accelerate makes a unit of FSDP

    def __init__(self, config: BertConfig, objectives: Sequence[Objective]) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("objectives: got none, expected one or more")
        if config.num_hidden_layers < 1:
            raise ValueError("config: got no hidden layers, expected one or more")
        self.config = config
        self.objectives = tuple(objectives)
        pooled = any(isinstance(objective, SequenceClass) for objective in objectives)
        self.bert = BertModel(config, add_pooling_layer=pooled)
        self.heads = nn.ModuleDict()
        for objective in objectives:
            if _head_name(objective) not in self.heads:
                self.heads[_head_name(objective)] = objective.head(config)
        self.bert.initialise(self.heads)
        self.tied: dict[str, str] = {}
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the decoder of the masked-LM head one with the word embeddings, if the config says
        so. (Under this name accelerate knows it.)"""
        if _LM not in self.heads or not self.config.tie_word_embeddings:
            return
        head = self.heads[_LM]
        assert isinstance(head, LMPredictions)
        head.decoder.weight = self.bert.embeddings.word_embeddings.weight
        head.decoder.bias = head.bias
        self.tied = {
            f"heads.{_LM}.decoder.weight": "bert.embeddings.word_embeddings.weight",
            f"heads.{_LM}.decoder.bias": f"heads.{_LM}.bias",
        }

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, objectives: Sequence[Objective], **config_changes: Any
    ) -> PretrainingModel:
        """The encoder of a Hugging Face folder, and its masked-LM and sentence-pair heads where the
        objectives have them; other heads begin at random. In training mode."""
        kind = _source_kind(objectives)
        source = kind.from_pretrained(folder, **config_changes)
        model = cls(source.config, objectives).to(next(source.parameters()))
        names = model._checkpoint_names(kind)
        stored = source.state_dict()
        found = {name: stored[there] for name, there in names.items() if there in stored}
        model.load_state_dict(found, strict=False)
        return model

    def counts(self, batch: PretrainingBatch) -> dict[str, int]:
        """How many targets each summand has in a batch; nothing waits for the device."""
        return {
            _term_name(objective, part): count
            for objective in self.objectives
            for part, count in objective.counts(batch.targets[objective.name]).items()
        }

    def flops(self, batch: PretrainingBatch) -> int:
        """Model FLOPs of training on a batch (``fastbert.train.flops``); nothing waits for the
        device. The encoder's last layer and the heads count for the rows that they compute."""
        rows = None if batch.rows is None else len(batch.rows)
        forward = encoder_flops(self.config, batch.inputs.lengths, rows)
        for objective in self.objectives:
            forward += objective.flops(self.heads[_head_name(objective)], self.config, batch)
        return TRAINING * forward

    def forward(
        self,
        batch: PretrainingBatch,
        *,
        divisors: Mapping[str, float] | None = None,
        measure: bool = False,
    ) -> PretrainingOutput:
        """loss = sum_k weight_k · total_k / divisor_k.

        divisors: of each summand; None is the number of its targets in this batch, so that each
            is a mean. For a mean over several ranks or accumulated batches, give the ``counts`` of
            all of them added up (times what the ranks' gradients are then divided by).
        measure: count right answers too, at the price of the heads' forward pass again.
        """
        rewritten = batch
        terms: dict[str, Term] = {}
        for objective in self.objectives:
            head = self.heads[_head_name(objective)]
            rewritten, known = objective.rewrite(head, self.bert, rewritten, measure)
            terms |= {_term_name(objective, part): term for part, term in known.items()}
        states = encode(self.bert, rewritten)
        encoded = Encoded(states, rewritten.inputs, self.bert, measure)
        for objective in self.objectives:
            head = self.heads[_head_name(objective)]
            found = objective.terms(head, encoded, rewritten.targets[objective.name])
            terms |= {_term_name(objective, part): term for part, term in found.items()}
        counts = self.counts(batch)
        by = counts if divisors is None else divisors
        parts = [term.weight * term.total / (by[name] or 1) for name, term in terms.items()]
        return PretrainingOutput(torch.stack(parts).sum(), terms, counts)

    def to_pretrained(self, **config_changes: Any) -> BertPreTrained:
        """A model of fastbert.models on the same parameters: BertForPreTraining with the heads of
        masked LM and nsp or sop, BertForMaskedLM with the first of these, else BertModel. Where
        ranks hold shards, every rank calls, and the parameters are whole copies on CPU.

        config_changes: such as ``hidden_dropout_prob``, which fine-tuning wants and some pretrain
        without.
        """
        pairs = [name for name in _CHECKPOINT_PAIRS if name in self.heads]
        kind: type[BertPreTrained] = BertModel
        if _LM in self.heads:
            kind = BertForPreTraining if pairs else BertForMaskedLM
        options = {"add_pooling_layer": self.bert.pooler is not None} if kind is BertModel else {}
        with torch.device("meta"):
            model = kind(self.config.replace(**config_changes), **options)
        tensors = self.state_dict(keep_vars=True)
        names = self._checkpoint_names(kind)
        stored = {there: _joined(tensors[name]) for name, there in names.items()}
        model.load_state_dict(stored, strict=True, assign=True)
        model.tie_weights()
        return model.eval()

    def export(
        self, folder: str | Path, *, tokenizer: str | Path | None = None, **config_changes: Any
    ) -> None:
        """Write ``to_pretrained`` as a Hugging Face folder, with the tokenizer files of another."""
        model = self.to_pretrained(**config_changes)
        model.source_folder = None if tokenizer is None else Path(tokenizer)
        model.save_pretrained(folder)

    def _checkpoint_names(self, kind: type[BertPreTrained]) -> dict[str, str]:
        """Name here -> name in a ``kind``, of the parameters that it has."""
        bare = issubclass(kind, BertModel)
        prefixes = {"bert.": "" if bare else "bert."}
        if not bare:
            prefixes[f"heads.{_LM}."] = "cls.predictions."
        if kind in (BertForPreTraining, BertForNextSentencePrediction):
            for name in _CHECKPOINT_PAIRS:
                prefixes[f"heads.{name}."] = "cls.seq_relationship."
        names = {}
        for name in self.state_dict():
            for here, there in prefixes.items():
                if name.startswith(here) and not (
                    kind is BertForMaskedLM and name.startswith("bert.pooler.")
                ):
                    names[name] = there + name.removeprefix(here)
        return names


class _WithoutPooler(BertModel):
    """The encoder alone."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


def _source_kind(objectives: Sequence[Objective]) -> type[BertPreTrained]:
    """The model that has the parts of a checkpoint that these objectives go on with, and no other:
    what it has and the checkpoint lacks is warned about."""
    heads = {_head_name(objective) for objective in objectives}
    pooled = any(isinstance(objective, SequenceClass) for objective in objectives)
    if _LM in heads:
        return BertForPreTraining if pooled else BertForMaskedLM
    if heads & set(_CHECKPOINT_PAIRS):
        return BertForNextSentencePrediction
    return BertModel if pooled else _WithoutPooler


def _joined(x: Tensor) -> Tensor:
    return whole(x) if is_sharded(x) else x


def _head_name(objective: Objective) -> str:
    return objective.head_name or objective.name


def _term_name(objective: Objective, part: str) -> str:
    return f"{objective.name}/{part}" if part else objective.name
