"""BertModel, and what it shares with the task models: initialisation, ties, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.config import BertConfig
from fastbert.models import checkpoint
from fastbert.models.edge import Edge
from fastbert.models.outputs import BaseModelOutput
from fastbert.nn import BertEmbeddings, BertEncoder, Pooler
from fastbert.nn.layer import new_pass
from fastbert.packed import PackedBatch

if TYPE_CHECKING:
    from typing_extensions import Self

Tensor = torch.Tensor


class BertPreTrained(nn.Module):
    """Base of every model: a config, and folders as Hugging Face's.

    tied: name of a parameter -> the name under which checkpoints hold it, as one with another.
    """

    tied: ClassVar[dict[str, str]] = {}

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.source_folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        new_head: bool = False,
        **config_changes: Any,
    ) -> Self:
        """The model that a Hugging Face folder holds, in eval mode, on CPU.

        folder: config.json with model.safetensors or pytorch_model.bin, whole or in shards. A
            checkpoint of the bare encoder and one with any head both do.
        dtype: of the parameters; None takes the checkpoint's own.
        new_head: initialise the head of this model's task, whatever the checkpoint holds: for
            other labels than the checkpoint was trained on.
        config_changes: fields of the config to change, such as ``num_labels=3``.
        A head that the checkpoint lacks is initialised and named in a warning; one that this model
        lacks is left out. Raises ValueError that lists every other missing or unexpected key and
        every wrong shape, or names a damaged file; a folder or file that is missing raises a
        ValueError that is a FileNotFoundError too.
        """
        return checkpoint.load(cls, folder, dtype, config_changes, new_head)

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int = checkpoint.DEFAULT_SHARD_BYTES
    ) -> None:
        """Write config.json and model.safetensors, as Hugging Face loads them.

        Tokenizer files of the folder that this model came from are copied along.
        max_shard_size: bytes; a larger model is written in shards with an index.
        Each file is written under another name and takes its place when complete.
        """
        checkpoint.save(self, folder, max_shard_size)

    def initialise(self, module: nn.Module) -> None:
        """Fill the parameters of ``module``: Linears and embeddings from a normal of standard
        deviation ``initializer_range`` cut at two of them (Devlin et al., arXiv 1810.04805, in
        Google's code), biases and the padding row 0, LayerNorms 1 and 0.
        """
        std = self.config.initializer_range
        for part in module.modules():
            if any(p.is_meta for p in part.parameters(recurse=False)):
                continue  # about to be loaded or tied
            if isinstance(part, nn.Linear | nn.Embedding):
                _truncated_normal_(part.weight.data, std)
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                nn.init.zeros_(part.weight[part.padding_idx])
            if isinstance(part, nn.LayerNorm):
                nn.init.ones_(part.weight)
            for name, parameter in part.named_parameters(recurse=False):
                if name == "bias":
                    nn.init.zeros_(parameter)

    def tie_weights(self) -> None:
        """Make each tied parameter one with the other, unless the config keeps them apart."""
        if self.config.tie_word_embeddings:
            for alias, owner in self.tied.items():
                module, _, name = alias.rpartition(".")
                setattr(self.get_submodule(module), name, self.get_parameter(owner))

    def gradient_checkpointing_enable(self) -> None:
        """In training, trade one more forward pass of each layer for its activations' memory."""
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations, as by default."""
        self._set_checkpointing(False)

    def _set_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, BertEncoder):
                module.gradient_checkpointing = value


class BertModel(BertPreTrained):
    """The encoder, and the pooler unless ``add_pooling_layer`` is False."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.initialise(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        first_tokens: bool = False,
    ) -> BaseModelOutput:
        """Takes padded tensors (B, S) as Hugging Face's model does, or a PackedBatch.

        Padded in gives padded out, with zeros at padding; packed in gives (T, …) out. The pooler
        reads each sequence's first real token (Hugging Face's reads column 0, be it padding).
        output_attentions: returns the probabilities, by the slow reference of attention.
        first_tokens: for who wants the pooler's output alone. Behind its attention the last layer
            goes on with each sequence's first token only, and last_hidden_state is (B, H), less
            empty sequences, whatever went in. The numbers are the same, but that dropout falls
            otherwise there (see ``fastbert.nn.layer.encoder_layer``). Without effect where hidden
            states or attentions are asked for.
        Raises ValueError for inputs that do not fit together or into the model's tables.
        """
        edge = Edge.enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, batch
        )
        batch, rows = edge.batch, None
        if first_tokens and not (output_hidden_states or output_attentions):
            rows, firsts = _first_tokens(batch)
            edge = Edge(firsts, padded=False)
        x, hidden, attentions = self.encode(batch, output_hidden_states, output_attentions, rows)
        return BaseModelOutput(
            last_hidden_state=edge.out(x),
            pooler_output=None if self.pooler is None else self.pooler(x, edge.batch),
            **edge.states(hidden, attentions),
        )

    def encode(
        self,
        batch: PackedBatch,
        want_hidden: bool,
        want_attentions: bool,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor] | None, list[Tensor] | None]:
        """The last hidden state, (T, H) or (R, H) of the tokens ``rows`` (see
        ``fastbert.nn.layer.Pass``), and, where wanted, all L + 1 and L probabilities."""
        run = replace(new_pass(self, batch.cu_seqlens.device, want_attentions), rows=rows)
        x = self.embeddings(batch, run)
        x, hidden = self.encoder(x, batch, run, want_hidden)
        return x, hidden, run.attentions


def _truncated_normal_(x: Tensor, std: float) -> Tensor:
    """Fill ``x`` from a normal of deviation ``std`` cut at two of them, by torch's generator.

    Normal numbers, of which those beyond (4.6%) are drawn again until none is: torch's own goes
    through the inverse error function, which takes 4.5 times as long on a CPU.
    """
    x.normal_(std=std)
    beyond = x.abs() > 2 * std
    if count := int(beyond.sum()):
        x.masked_scatter_(beyond, _truncated_normal_(x.new_empty(count), std))
    return x


def _first_tokens(batch: PackedBatch) -> tuple[Tensor, PackedBatch]:
    """The packed index (R,) of the first token of each sequence that has one, and the layout of
    those R tokens as a batch: the same sequences, of one token or none.

    Of tensors on the device alone: a CUDA graph can record it unless a sequence is empty.
    """
    lengths = tuple(min(length, 1) for length in batch.lengths)
    offsets = batch.cu_seqlens.diff().clamp(max=1).cumsum(0, dtype=torch.int32)
    firsts = PackedBatch(
        input_ids=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        cu_seqlens=F.pad(offsets, (1, 0)),
        lengths=lengths,
        padded_shape=(len(lengths), 1),
        indices=None,
    )
    starts = batch.cu_seqlens[:-1].long()
    if not all(lengths):
        full = [number for number, length in enumerate(lengths) if length]
        starts = starts[torch.tensor(full, dtype=torch.int64, device=starts.device)]
    return starts, firsts
