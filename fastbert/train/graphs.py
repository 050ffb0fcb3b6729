"""CUDA graphs by bucket: a forward pass or a whole training step, recorded once, then replayed.

A small model, or a large one on a fast GPU, waits for Python between kernels. A graph has no Python
in it: one call launches all kernels of the step. It needs fixed shapes and addresses, which buckets
give it (``fastbert.train.buckets``), and nothing read on the host: dropout seeds, step counters and
learning rates are tensors on the device here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from fastbert import device
from fastbert.models.bert import BertPreTrained
from fastbert.ops import linear_cross_entropy
from fastbert.packed import PackedBatch
from fastbert.train.buckets import (
    BucketBatch,
    Pad,
    bucket_of,
    labelled_rows,
    pad_batch,
    pad_tensor,
    without_filler,
)

Tensor = torch.Tensor
Thunk = Callable[[], Any]
_log = logging.getLogger("fastbert")

_STATIC = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens")
# Calls of a bucket before it is recorded: they compile kernels, make optimiser states and
# gradients, and fill the caches of libraries.
_WARMUP = 2


class Recorder(Protocol):
    """What runs a function and what records it."""

    def run(self, function: Thunk) -> Any:
        """Call ``function`` as it will be recorded, and return what it does."""

    def record(self, function: Thunk) -> Thunk:
        """A function that does again what ``function`` does, and returns the same objects."""


class CudaRecorder:
    """CUDA graphs in one pool of memory: what one graph needs only while it runs, others share."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def run(self, function: Thunk) -> Any:
        """On the stream of the recordings: autograd remembers the stream of a gradient."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function()
        current.wait_stream(self._stream)
        return outputs

    def record(self, function: Thunk) -> Thunk:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outputs = function()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


class CallAgain:
    """No graphs: replaying is calling. What buckets do shows on any device."""

    def run(self, function: Thunk) -> Any:
        return function()

    def record(self, function: Thunk) -> Thunk:
        return function


class Graphs:
    """``function(batch, **tensors)``, recorded once a bucket and replayed from then on.

    function: a forward pass or a whole training step. It takes a PackedBatch and tensors by name,
        and returns tensors in tuples, lists, dicts or dataclasses. It must read nothing on the
        host, and leave no tensor behind but such as it changes in place.
    inputs: name -> how filler extends that tensor, for each of ``tensors``.
    max_length: the longest sequence that the model takes.
    recorder: CudaRecorder() where None.

    Parameters, optimiser states and gradients must stay where they are once recorded: load a
    checkpoint before. One process only: no collective call is recorded.

    Every call does the function's work once: the first two of a bucket call it, on batches filled
    up to the bucket; then it is recorded and replayed. Results are copies of the real rows. A batch
    that has an empty sequence, or embeddings in place of ids, goes to the function as it is.

    A training step keeps gradients where they are, and its optimiser is one of this package's:

        def step(batch, labels):
            optimizer.zero_grad(set_to_none=False)
            loss = masked_lm_loss(model, batch, labels, num_labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = Graphs(step, inputs={"labels": Pad("token", -100)}, max_length=512)
        for batch, labels in batches:
            step(batch, labels=labels)
            schedule.step()

    Attributes: recorded, the number of recordings.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        max_length: int,
        inputs: Mapping[str, Pad] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.function = function
        self.max_length = max_length
        self.inputs = dict(inputs or {})
        self.recorder = CudaRecorder() if recorder is None else recorder
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}

    @property
    def recorded(self) -> int:
        return len(self._recordings)

    def __call__(self, batch: PackedBatch, **tensors: Tensor) -> Any:
        if tensors.keys() != self.inputs.keys():
            raise ValueError(f"tensors: got {sorted(tensors)}, expected {sorted(self.inputs)}")
        if batch.input_ids is None or not batch.lengths or not all(batch.lengths):
            return self.recorder.run(lambda: self.function(batch, **tensors))
        bucket = bucket_of(batch.num_tokens, batch.num_sequences, batch.max_seqlen, self.max_length)
        padded = pad_batch(batch, bucket)
        extra = {name: pad_tensor(x, self.inputs[name], bucket) for name, x in tensors.items()}
        key = (
            bucket,
            batch.token_type_ids is None,
            *((name, x.dtype, x.shape[1:]) for name, x in extra.items()),
        )
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= _WARMUP:
            outputs = self.recorder.run(lambda: self.function(padded, **extra))
        else:
            if key not in self._recordings:
                self._recordings[key] = _Recording(self.recorder, self.function, padded, extra)
            outputs = self._recordings[key].replay(padded, extra)
        return without_filler(outputs, padded)


class _Recording:
    """One recorded call, and the tensors that it reads."""

    def __init__(
        self,
        recorder: Recorder,
        function: Callable[..., Any],
        batch: BucketBatch,
        extra: Mapping[str, Tensor],
    ) -> None:
        # As for ``function``, the recording must depend on nothing of a batch but these tensors:
        # lengths and the like are those of the first one.
        self.batch = BucketBatch(**{**batch.__dict__, **_clones(_tensors(batch))})
        self.extra = _clones(extra)
        self._replay = recorder.record(lambda: function(self.batch, **self.extra))

    def replay(self, batch: BucketBatch, extra: Mapping[str, Tensor]) -> Any:
        for mine, new in ((_tensors(self.batch), _tensors(batch)), (self.extra, extra)):
            for name, x in new.items():
                mine[name].copy_(x)
        return self._replay()


def _tensors(batch: BucketBatch) -> dict[str, Tensor]:
    return {name: x for name in _STATIC if (x := getattr(batch, name)) is not None}


def _clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}


def graphs(model: nn.Module, *, recorder: Recorder | None = None) -> Callable[[PackedBatch], Any]:
    """``model`` for inference without Python between kernels: ``graphs(model)(batch)``.

    model: one of fastbert's own (``fastbert.BertModel``, …), in eval mode. An accelerated Hugging
        Face model reads lengths on the host in every call, which no graph can hold.
    Returns a function of a PackedBatch that returns what ``model(batch=batch)`` does, from a
    recording for each bucket of shapes (``Graphs``). Parameters may change their values in place,
    but not their places: after ``load_state_dict`` all is well, after ``model.to(...)`` call
    ``graphs`` again.
    Without CUDA, or for a model on CPU, there is nothing to record: the function calls the model,
    and the log says so.
    Raises ValueError for another model, and for one that is in training mode when it is recorded.
    """
    if not isinstance(model, BertPreTrained):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a model of fastbert's own, such as "
            "fastbert.BertModel.from_pretrained(folder)"
        )

    @torch.no_grad()
    def forward(batch: PackedBatch) -> Any:
        if model.training:
            raise ValueError("model: is in training mode, expected model.eval()")
        return model(batch=batch)

    if recorder is None and next(model.parameters()).device.type != "cuda":
        why = device.cuda_reason() or "the model is on CPU"
        _log.warning("graphs: nothing to record, calls run as they are: %s", why)
        return forward
    return Graphs(forward, max_length=model.config.max_position_embeddings, recorder=recorder)


def masked_lm_loss(model: Any, batch: PackedBatch, labels: Tensor, num_labels: int) -> Tensor:
    """The masked-LM loss of ``model(batch=batch, labels=labels)``, with nothing read on the host.

    model: a BertForMaskedLM or BertForPreTraining of fastbert's.  labels: (T,), -100 where nothing
    was masked.  num_labels: at least as many as there are labels, and the same in every batch of a
    bucket: the head, and the last layer behind its attention, compute as many rows (one a token at
    most). A token budget times the masking rate, rounded up, say.
    The number is the same, but that dropout falls otherwise in the last layer (see
    ``fastbert.nn.layer.encoder_layer``).
    """
    rows, labels = labelled_rows(labels, min(num_labels, len(labels)))
    x = model.bert.encode(batch, False, False, rows)[0]
    head = model.cls.predictions
    return linear_cross_entropy(head.transform(x), head.decoder.weight, head.decoder.bias, labels)
