"""SentenceEncoder: a BERT whose mean-pooled tokens are a sentence's vector, and how it is trained.

    mean(x) = sum_t x_t / n      over the n tokens of a sequence, special ones among them
    cos(a, b) = a . b / (|a| |b|)

It is saved as sentence-transformers reads it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.atomic import replacing
from fastbert.config import BertConfig
from fastbert.models import BertModel
from fastbert.models.bert import BertPreTrained
from fastbert.models.outputs import TaskOutput
from fastbert.packed import PackedBatch

Tensor = torch.Tensor

SCALE = 20.0  # of cosines in both losses, as in sentence-transformers

_MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    ("1_Pooling", "sentence_transformers.models.Pooling"),
    ("2_Normalize", "sentence_transformers.models.Normalize"),
)


class SentenceEncoder(BertPreTrained):
    """Sentences to vectors of length 1.

    A batch holds the G groups of B rows one behind the other: the first sentence of every row, then
    the second of every row, and so on. Two to a row with numbers as labels are trained by CoSENT;
    two or more without, by multiple negatives ranking.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(
        self,
        *,
        batch: PackedBatch,
        labels: Tensor | None = None,
        groups: int = 1,
        keys: Tensor | None = None,
    ) -> TaskOutput:
        """logits: the vectors (G B, H), in fp32.

        labels: (B,) floats, how alike the two of each row are, in any unit; None trains by ranking.
        groups: G.  keys: (G B,) int64, equal where texts are equal; None takes all for different.
        """
        if batch.num_sequences % groups:
            raise ValueError(
                f"groups: got {groups}, expected a divisor of the {batch.num_sequences} sequences"
            )
        x = self.bert(batch=batch).last_hidden_state
        vectors = F.normalize(mean_of_tokens(x, batch), dim=1)
        if groups < 2:
            return TaskOutput(None, vectors)
        parts = vectors.view(groups, -1, vectors.shape[1])
        if labels is None:
            loss = ranking_loss(parts, None if keys is None else keys.view(groups, -1))
        elif groups == 2:
            loss = cosent_loss((parts[0] * parts[1]).sum(1), labels)
        else:
            raise ValueError(f"groups: got {groups} with labels, expected 2")
        return TaskOutput(loss, vectors)

    def save_pretrained(
        self, folder: str | Path, *, max_length: int | None = None, **kwargs: int
    ) -> None:
        """A folder of sentence-transformers, which is one of Hugging Face's BertModel too.

        max_length: tokens at which sentence-transformers is to cut texts; None: all positions.
        """
        folder = Path(folder)
        self.bert.source_folder = self.source_folder
        self.bert.save_pretrained(folder, **kwargs)
        width = self.config.hidden_size
        length = max_length or self.config.max_position_embeddings
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(_MODULES)
        ]
        pooling = {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        }
        files = {
            "modules.json": modules,
            "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
            "1_Pooling/config.json": pooling,
        }
        for part, _ in _MODULES:
            (folder / part).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            with replacing(folder / name) as (path,):
                path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class Vectors(nn.Module):
    """Sentences to vectors of length 1 by any encoder, such as a quantised one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.training = encoder.training  # a quantised one refuses to be put in training mode

    def forward(self, *, batch: PackedBatch, **_: object) -> TaskOutput:
        """(B, H), whatever else a SentenceEncoder would take."""
        x = self.encoder(batch=batch).last_hidden_state
        return TaskOutput(None, F.normalize(mean_of_tokens(x, batch), dim=1))


def mean_of_tokens(x: Tensor, batch: PackedBatch) -> Tensor:
    """(T, H) -> (B, H) in fp32 at least: the mean over each sequence, zeros for an empty one."""
    wide = x if x.dtype == torch.float64 else x.float()
    lengths = batch.cu_seqlens.diff().long()
    # The output's size is given: without it, repeat_interleave waits for the device.
    of = torch.repeat_interleave(
        torch.arange(len(lengths), device=x.device), lengths, output_size=len(x)
    )
    sums = wide.new_zeros(len(lengths), x.shape[1]).index_add(0, of, wide)
    return sums / lengths.clamp(min=1)[:, None]


def ranking_loss(parts: Tensor, keys: Tensor | None = None, scale: float = SCALE) -> Tensor:
    """Multiple negatives ranking (Henderson et al., arXiv 1705.00652, section 4.4), both ways.

        loss = (CE(rows of scale A C^T) + CE(rows of scale P A^T)) / 2,    right: the same row

    parts: (G, B, H) of length 1: A the first group, P the second, C all groups but the first.
    keys: (G, B) or None. A candidate whose text is that of the right one, or of the anchor itself,
        is no negative and does not count.
    """
    anchors, positives, candidates = parts[0], parts[1], parts[1:].flatten(0, 1)
    right = torch.arange(len(anchors), device=parts.device)
    forwards, backwards = scale * anchors @ candidates.t(), scale * positives @ anchors.t()
    if keys is not None:
        forwards = _without_equals(forwards, keys[1:].flatten(), keys[1], keys[0])
        backwards = _without_equals(backwards, keys[0], keys[0], keys[1])
    return (F.cross_entropy(forwards, right) + F.cross_entropy(backwards, right)) / 2


def _without_equals(scores: Tensor, candidates: Tensor, rights: Tensor, anchors: Tensor) -> Tensor:
    equal = (candidates == rights[:, None]) | (candidates == anchors[:, None])
    places = torch.arange(len(rights), device=scores.device)
    equal[places, places] = False
    return scores.masked_fill(equal, torch.finfo(scores.dtype).min)


def cosent_loss(cosines: Tensor, labels: Tensor, scale: float = SCALE) -> Tensor:
    """CoSENT (Su, kexue.fm/archives/8847, 2022):

        loss = log(1 + sum_{i, j: y_i > y_j} exp(scale (cos_j - cos_i)))

    cosines, labels: (B,). Every pair that stands in the wrong order, or nearly so, costs.
    """
    if labels.shape != cosines.shape:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(cosines.shape)}"
        )
    gaps = scale * (cosines[None, :] - cosines[:, None])
    counts = labels[:, None] > labels[None, :]
    wrong = gaps.masked_fill(~counts, torch.finfo(gaps.dtype).min).flatten()
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)
