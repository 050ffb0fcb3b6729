"""The task models: BertModel with one head each, under Hugging Face's names and with its losses.

All take what BertModel takes, padded or packed, and labels.
"""

from __future__ import annotations

import torch
from torch import nn

from fastbert.config import BertConfig
from fastbert.models.bert import BertModel, BertPreTrained
from fastbert.models.edge import Edge
from fastbert.models.losses import class_labels, class_loss, sequence_loss, span_loss
from fastbert.models.outputs import PreTrainingOutput, QuestionAnsweringOutput, TaskOutput
from fastbert.nn import LMPredictions
from fastbert.packed import PackedBatch

Tensor = torch.Tensor

_TIED_DECODER = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class _Heads(nn.Module):
    """Masked LM, next sentence, or both, under the names of checkpoints."""

    def __init__(self, config: BertConfig, masked_lm: bool, next_sentence: bool) -> None:
        super().__init__()
        if masked_lm:
            self.predictions = LMPredictions(config)
        if next_sentence:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


def _masked_lm(
    head: LMPredictions, edge: Edge, x: Tensor, labels: Tensor | None, return_logits: bool | None
) -> tuple[Tensor | None, Tensor | None]:
    """The loss if there are labels; the logits of every token if asked for, or there are none."""
    loss = logits = None
    if labels is not None:
        labels = edge.token_labels(labels)
        loss = head.loss(x, class_labels("labels", labels, x, head.bias.shape[0]))
    if return_logits or (return_logits is None and labels is None):
        logits = edge.out(head(x))
    return loss, logits


class BertForPreTraining(BertPreTrained):
    """Masked LM and next-sentence prediction (Devlin et al., arXiv 1810.04805, section 3.1)."""

    tied = _TIED_DECODER

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = _Heads(config, masked_lm=True, next_sentence=True)
        self.initialise(self.cls)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_logits: bool | None = None,
    ) -> PreTrainingOutput:
        """labels: (B, S) or packed (T,), -100 where nothing was masked.  next_sentence_label: (B,),
        0 if the second segment is the true next one.

        loss: the sum of the losses whose labels are given.
        return_logits: of the masked LM; None returns them when no ``labels`` are given.
        """
        edge = Edge.enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, batch
        )
        encoded = self.bert(
            batch=edge.batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        x = encoded.last_hidden_state
        loss, logits = _masked_lm(self.cls.predictions, edge, x, labels, return_logits)
        next_sentence = self.cls.seq_relationship(encoded.pooler_output)
        if next_sentence_label is not None:
            next_loss = class_loss("next_sentence_label", next_sentence, next_sentence_label)
            loss = next_loss if loss is None else loss + next_loss
        return PreTrainingOutput(
            loss, logits, next_sentence, **edge.states(encoded.hidden_states, encoded.attentions)
        )


class BertForMaskedLM(BertPreTrained):
    """Masked LM alone: no pooler, and a decoder tied to the word embeddings."""

    tied = _TIED_DECODER

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = _Heads(config, masked_lm=True, next_sentence=False)
        self.initialise(self.cls)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_logits: bool | None = None,
    ) -> TaskOutput:
        """labels: (B, S) or packed (T,), -100 where nothing was masked.

        return_logits: None returns logits, (B, S, V) or (T, V), when no ``labels`` are given: in
        training they would be the largest tensor by far, and the loss does without them.
        """
        edge = Edge.enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, batch
        )
        encoded = self.bert(
            batch=edge.batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        x = encoded.last_hidden_state
        loss, logits = _masked_lm(self.cls.predictions, edge, x, labels, return_logits)
        states = edge.states(encoded.hidden_states, encoded.attentions)
        return TaskOutput(loss, logits, **states)


class BertForNextSentencePrediction(BertPreTrained):
    """Does the second segment follow the first? (Devlin et al., section 3.1, task 2)"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = _Heads(config, masked_lm=False, next_sentence=True)
        self.initialise(self.cls)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> TaskOutput:
        """labels: (B,), 0 if the second segment is the true next one.  Logits (B, 2)."""
        edge = Edge.enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, batch
        )
        encoded = self.bert(
            batch=edge.batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            first_tokens=True,
        )
        logits = self.cls.seq_relationship(encoded.pooler_output)
        loss = None if labels is None else class_loss("labels", logits, labels)
        states = edge.states(encoded.hidden_states, encoded.attentions)
        return TaskOutput(loss, logits, **states)


def _head_dropout(config: BertConfig) -> nn.Dropout:
    p = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if p is None else p)


class BertForSequenceClassification(BertPreTrained):
    """A class, several classes at once, or a number for each sequence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = _head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.initialise(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> TaskOutput:
        """labels: (B,) classes, (B, C) floats, or (B,) numbers: see ``config.problem_type``."""
        edge = Edge.enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, batch
        )
        encoded = self.bert(
            batch=edge.batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            first_tokens=True,
        )
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else sequence_loss(self.config, logits, labels)
        states = edge.states(encoded.hidden_states, encoded.attentions)
        return TaskOutput(loss, logits, **states)


class BertForTokenClassification(BertPreTrained):
    """A class for each token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = _head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.initialise(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> TaskOutput:
        """labels: (B, S) or (T,), -100 where none counts.  Logits: (B, S, C) or (T, C)."""
        edge = Edge.enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, batch
        )
        encoded = self.bert(
            batch=edge.batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            loss = class_loss("labels", logits, edge.token_labels(labels))
        states = edge.states(encoded.hidden_states, encoded.attentions)
        return TaskOutput(loss, edge.out(logits), **states)


class BertForQuestionAnswering(BertPreTrained):
    """Where the answer starts and ends in its passage (Devlin et al., section 4.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels: got {config.num_labels}, expected 2 (start and end)")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.initialise(self.qa_outputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> QuestionAnsweringOutput:
        """start_positions, end_positions: (B,), both or neither: columns of the padded input or,
        for a PackedBatch, of what ``unpack`` makes. A column without a real token does not count.

        loss: the mean of both losses, each over the real tokens of a sequence. (Hugging Face's
        counts the logits of padding in its denominator.)
        """
        edge = Edge.enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, batch
        )
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions: expected together with end_positions, or neither")
        encoded = self.bert(
            batch=edge.batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        start, end = self.qa_outputs(encoded.last_hidden_state).unbind(1)
        loss, lowest = None, torch.finfo(start.dtype).min
        if start_positions is not None and end_positions is not None:
            real = edge.batch.unpack(torch.ones_like(start))
            loss = (
                span_loss(edge.batch.unpack(start, lowest), real, start_positions)
                + span_loss(edge.batch.unpack(end, lowest), real, end_positions)
            ) / 2
        return QuestionAnsweringOutput(
            loss=loss,
            start_logits=edge.out(start, lowest),
            end_logits=edge.out(end, lowest),
            **edge.states(encoded.hidden_states, encoded.attentions),
        )


class BertForMultipleChoice(BertPreTrained):
    """Which of several continuations is right (Devlin et al., section 4.4)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = _head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.initialise(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        batch: PackedBatch | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        num_choices: int | None = None,
    ) -> TaskOutput:
        """Padded inputs are (B, choices, S).  labels: (B,), the right choice.  Logits (B, choices).

        num_choices: goes with a PackedBatch, whose sequences are the choices of the first example,
        then those of the second, and so on.
        Hidden states and attentions are those of B * choices sequences.
        """
        if batch is None:
            num_choices = _choices(input_ids, inputs_embeds)
        edge = Edge.enter(
            _flat(input_ids),
            _flat(attention_mask),
            _flat(token_type_ids),
            _flat(position_ids),
            _flat(inputs_embeds),
            batch,
        )
        sequences = edge.batch.num_sequences
        if not num_choices or sequences % num_choices:
            raise ValueError(
                f"num_choices: got {num_choices}, expected a divisor of the {sequences} sequences"
            )
        encoded = self.bert(
            batch=edge.batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            first_tokens=True,
        )
        scores = self.classifier(self.dropout(encoded.pooler_output)).view(-1, num_choices)
        loss = None if labels is None else class_loss("labels", scores, labels)
        states = edge.states(encoded.hidden_states, encoded.attentions)
        return TaskOutput(loss, scores, **states)


def _choices(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int | None:
    for name, x, dims in (("input_ids", input_ids, 3), ("inputs_embeds", inputs_embeds, 4)):
        if x is not None and x.dim() != dims:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (B, choices, S, …)")
        if x is not None:
            return x.shape[1]
    return None


def _flat(x: Tensor | None) -> Tensor | None:
    """(B, choices, S, …) -> (B * choices, S, …)."""
    return None if x is None else x.flatten(0, 1)
