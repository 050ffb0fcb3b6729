"""What stands on the encoder: the pooler and the masked-language-model head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.config import BertConfig
from fastbert.nn.encoder import activation
from fastbert.nn.layer import is_plain_linear, project
from fastbert.ops import add_layer_norm, bias_gelu, gather_rows, linear_cross_entropy
from fastbert.packed import PackedBatch

IGNORED = -100  # the label of a token that counts for no loss, as in torch and Hugging Face


def wide(logits: torch.Tensor) -> torch.Tensor:
    """In fp32 at least: no loss is computed in 16 bits."""
    return logits if logits.dtype == torch.float64 else logits.float()


class Pooler(nn.Module):
    """tanh(W x_first + b) for the first token of each sequence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """(T, H) -> (B, H). An empty sequence gives tanh(b)."""
        return torch.tanh(self.dense(batch.first(x)))


class _Transform(nn.Module):
    """LN(act(W x + b))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = activation(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, bias = project(self.dense, x)
        if isinstance(self.activation, str):
            u = bias_gelu(u, bias, approximate=self.activation)
        else:
            u = self.activation(u if bias is None else u + bias)
        norm = self.LayerNorm
        return add_layer_norm(u, None, norm.weight, norm.bias, eps=norm.eps)


class LMPredictions(nn.Module):
    """The masked-LM head: transform, then a decoder whose weight is the word embeddings' and whose
    bias is free (Devlin et al., arXiv 1810.04805, section 3.1, task 1).

    Whoever owns the word embeddings ties ``decoder.weight`` to them; ``decoder.bias`` and ``bias``
    are one parameter under both of its names in checkpoints.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden, vocab = config.hidden_size, config.vocab_size
        self.transform = _Transform(config)
        # Never filled where it is about to be tied: the table may be a third of the model.
        device = torch.device("meta") if config.tie_word_embeddings else None
        self.decoder = nn.Linear(hidden, vocab, device=device)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> logits (M, V)."""
        return self.decoder(self.transform(x))

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over the labelled rows of x, without (T, V) logits.

        x: (T, H).  labels: (T,) int64, ``IGNORED`` where there is none. Only labelled rows go
        through the head. Returns a 0-d loss, nan when no row is labelled, as torch's.
        """
        # The one wait for the device in a training step: only the labels know how many they are.
        rows = (labels != IGNORED).nonzero().flatten()
        h, labels = self.transform(gather_rows(x, rows)), labels[rows]
        if is_plain_linear(self.decoder):
            return linear_cross_entropy(h, self.decoder.weight, self.decoder.bias, labels)
        return F.cross_entropy(wide(self.decoder(h)), labels)
