"""Buckets, padding to them, and what is recorded: on CPU, where replaying means calling again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbert
from fastbert.nn import layer
from fastbert.packed import PackedBatch
from fastbert.train import (
    AdamW,
    Bucket,
    Graphs,
    Lamb,
    Pad,
    Schedule,
    bucket_of,
    graphs,
    labelled_rows,
    masked_lm_loss,
    pad_batch,
)
from fastbert.train.buckets import without_filler
from fastbert.train.graphs import CallAgain

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = fastbert.BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=48,
)  # fmt: skip
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]


def batch_of(*lengths: int, seed: int = 0, device: str = "cpu", types: bool = True) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (sum(lengths),), generator=generator).to(device)
    kinds = torch.randint(2, (sum(lengths),), generator=generator).to(device)
    return PackedBatch.from_flat(ids, lengths, token_type_ids=kinds if types else None)


# --- buckets -----------------------------------------------------------------------------------


def test_buckets_by_hand() -> None:
    # 3 sequences need one of filler to be 4, and 100 + 1 tokens round up to 128.
    assert bucket_of(100, 3, 50, 512) == Bucket(128, 4, 64)
    # Nothing to fill, and nothing that could hold filler.
    assert bucket_of(128, 4, 32, 512) == Bucket(128, 4, 32)
    # 60 tokens of filler want sequences of at most 32: four more.
    assert bucket_of(68, 4, 20, 512) == Bucket(128, 8, 32)
    # One of eight sizes an octave: 9000 in steps of 1024.
    assert bucket_of(9000, 70, 128, 512) == Bucket(9216, 128, 128)
    # Above 16,384 one of sixteen: 33,000 in steps of 2,048.
    assert bucket_of(16_384, 128, 128, 512) == Bucket(16_384, 128, 128)
    assert bucket_of(16_385, 128, 128, 512) == Bucket(17_408, 256, 128)
    assert bucket_of(33_000, 200, 512, 512) == Bucket(34_816, 256, 512)
    # The model's own limit need not be a power of two.
    assert bucket_of(500, 1, 500, 500).max_seqlen == 500


@given(
    lengths=st.lists(st.integers(1, 48), min_size=1, max_size=60),
    max_length=st.integers(48, 600),
)
@settings(deadline=None)
def test_a_bucket_holds_its_batch_and_its_filler(lengths: list[int], max_length: int) -> None:
    batch = batch_of(*lengths)
    bucket = bucket_of(batch.num_tokens, batch.num_sequences, batch.max_seqlen, max_length)
    padded = pad_batch(batch, bucket)
    assert bucket.tokens > bucket.sequences
    assert padded.num_tokens == bucket.tokens and padded.num_sequences == bucket.sequences
    assert min(padded.lengths) >= 1 and max(padded.lengths) <= bucket.max_seqlen <= max_length
    assert padded.max_seqlen == bucket.max_seqlen
    assert padded.lengths[: len(lengths)] == tuple(lengths)
    # As if the filler had come with the others.
    whole = PackedBatch.from_flat(
        padded.input_ids, padded.lengths, token_type_ids=padded.token_type_ids
    )
    for name in ("input_ids", "token_type_ids", "position_ids", "cu_seqlens"):
        mine, expected = getattr(padded, name), getattr(whole, name)
        assert torch.equal(mine, expected) and mine.dtype == expected.dtype
        end = len(lengths) + 1 if name == "cu_seqlens" else batch.num_tokens
        assert torch.equal(mine[:end], getattr(batch, name))


def test_batches_of_a_budget_share_few_buckets() -> None:
    """1,000 batches of about 8,192 tokens, of sequences about as long as each other."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(1000):
        longest = int(torch.randint(8, 513, (1,), generator=generator))
        sequences = 8192 // longest
        tokens = int(sequences * longest * (1 - 0.05 * torch.rand(1, generator=generator)))
        bucket = bucket_of(tokens, sequences, longest, 512)
        assert bucket.tokens <= 1.13 * (tokens + bucket.sequences)
        seen.add(bucket)
    assert len(seen) <= 40


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="^sequences: got 3 of 2 tokens"):
        bucket_of(2, 3, 1, 512)
    with pytest.raises(ValueError, match="^longest: got 600, expected at most max_length, 512"):
        bucket_of(600, 1, 600, 512)
    with pytest.raises(ValueError, match="^max_length: got 1, expected at least 2"):
        bucket_of(1, 1, 1, 1)
    embeds = PackedBatch.from_flat(None, [3], inputs_embeds=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="^batch: got no input_ids"):
        pad_batch(embeds, Bucket(64, 2, 32))


def test_results_lose_their_filler() -> None:
    batch = batch_of(5, 4)
    padded = pad_batch(batch, Bucket(64, 4, 32))
    tokens, sequences, other = torch.arange(64), torch.arange(4), torch.arange(7)
    got = without_filler({"a": (tokens, [sequences]), "b": other, "c": None, "d": 3}, padded)
    assert torch.equal(got["a"][0], tokens[:9]) and torch.equal(got["a"][1][0], sequences[:2])
    assert torch.equal(got["b"], other) and got["b"] is not other
    assert got["c"] is None and got["d"] == 3


# --- filler changes nothing --------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(5, 17, 1), (48,), (1, 1, 1), (30, 30, 30, 30)])
def test_filler_changes_no_bit_of_a_real_token(lengths: tuple[int, ...], device: str) -> None:
    """Whatever ids the filler has; and beside the batch alone only products' shapes differ."""
    torch.manual_seed(0)
    model = fastbert.BertModel(CONFIG).eval().to(device)
    batch = batch_of(*lengths, device=device)
    bucket = bucket_of(batch.num_tokens, batch.num_sequences, batch.max_seqlen, 48)
    padded = pad_batch(batch, bucket)
    assert padded.input_ids is not None
    other = pad_batch(batch, bucket)
    assert other.input_ids is not None
    other.input_ids[batch.num_tokens :] = 49
    with torch.no_grad():
        one, two = (without_filler(model(batch=b), padded) for b in (padded, other))
        alone = model(batch=batch)
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], alone[name], rtol=1e-5, atol=1e-5)


def test_labelled_rows() -> None:
    labels = torch.tensor([-100, 3, -100, -100, 0, -100, 7])
    rows, kept = labelled_rows(labels, 5)
    assert rows.tolist() == [0, 1, 2, 4, 6] and kept.tolist() == [-100, 3, -100, 0, 7]
    rows, kept = labelled_rows(labels, 3)
    assert rows.tolist() == [1, 4, 6] and kept.tolist() == [3, 0, 7]
    with pytest.raises(ValueError, match="^count: got 2, expected at least 3, one a label"):
        labelled_rows(labels, 2)
    with pytest.raises(ValueError, match="^count: got 8, expected at most 7"):
        labelled_rows(labels, 8)


# --- inference ---------------------------------------------------------------------------------


class Counting(CallAgain):
    """Counts what was run and what was recorded."""

    def __init__(self) -> None:
        self.runs = self.records = 0

    def run(self, function: Callable[[], Any]) -> Any:
        self.runs += 1
        return super().run(function)

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.records += 1
        return super().record(function)


def recorder_for(device: str) -> Any:
    return Counting() if device == "cpu" else None


@pytest.mark.parametrize("device", DEVICES)
def test_inference(device: str) -> None:
    """Twelve batches of two buckets: two recordings, and each result its own batch's."""
    torch.manual_seed(0)
    model = fastbert.BertForTokenClassification(CONFIG).eval().to(device)
    fast = graphs(model, recorder=recorder_for(device))
    assert isinstance(fast, Graphs)
    results = []
    for i in range(12):
        lengths = (20 + i, 9, 14) if i % 2 else (40, 48, 48, 30 - i, 7)
        batch = batch_of(*lengths, seed=i, device=device)
        results.append((batch, fast(batch).logits))
    for batch, logits in results:  # read late: a replay must not have changed earlier results
        with torch.no_grad():
            torch.testing.assert_close(logits, model(batch=batch).logits, rtol=1e-4, atol=1e-5)
    assert fast.recorded == 2
    if isinstance(fast.recorder, Counting):
        assert (fast.recorder.runs, fast.recorder.records) == (4, 2)


def test_new_values_of_parameters_count() -> None:
    model = fastbert.BertModel(CONFIG).eval()
    fast = graphs(model, recorder=CallAgain())
    batch = batch_of(10, 12)
    for _ in range(4):
        before = fast(batch).last_hidden_state
    model.load_state_dict(fastbert.BertModel(CONFIG).state_dict())
    after = fast(batch).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(after, model(batch=batch).last_hidden_state)
    assert not torch.equal(before, after)


def test_batches_that_no_bucket_holds_go_as_they_are() -> None:
    model = fastbert.BertModel(CONFIG).eval()
    fast = graphs(model, recorder=CallAgain())
    with torch.no_grad():
        for batch in (batch_of(3, 0, 4), batch_of(0), batch_of()):
            for _ in range(4):
                got, expected = fast(batch), model(batch=batch)
                assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert isinstance(fast, Graphs) and fast.recorded == 0


def test_without_cuda_calls_run_as_they_are_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = fastbert.BertModel(CONFIG).eval()
    fast = graphs(model)
    assert "graphs: nothing to record" in caplog.text
    batch = batch_of(5, 6)
    with torch.no_grad():
        expected = model(batch=batch).last_hidden_state
    got = fast(batch).last_hidden_state
    assert torch.equal(got, expected) and not got.requires_grad
    model.train()
    with pytest.raises(ValueError, match="^model: is in training mode"):
        fast(batch)


def test_other_models_and_other_tensors() -> None:
    with pytest.raises(ValueError, match="^model: got Linear, expected a model of fastbert's own"):
        graphs(torch.nn.Linear(2, 2))
    record = Graphs(lambda batch, a: a, inputs={"a": Pad("token", 0)}, max_length=48,
                    recorder=CallAgain())  # fmt: skip
    with pytest.raises(ValueError, match=r"^tensors: got \['b'\], expected \['a'\]"):
        record(batch_of(3), b=torch.zeros(3))


# --- training ----------------------------------------------------------------------------------


def train(kind: Any, recorded: bool, device: str, steps: int) -> tuple[list[float], Any, Any]:
    """Masked-LM losses of ``steps`` steps with dropout, a schedule and clipping."""
    torch.manual_seed(0)
    model = fastbert.BertForMaskedLM(CONFIG).to(device).train()
    optimizer = kind(model.parameters(), 0.01, bias_correction=False, max_grad_norm=1.0)
    schedule = Schedule(optimizer, "linear", warmup_steps=2, total_steps=20)

    def step(batch: PackedBatch, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = masked_lm_loss(model, batch, labels, 16)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run: Any = step
    if recorded:
        run = Graphs(step, inputs={"labels": Pad("token", -100)}, max_length=48,
                     recorder=recorder_for(device))  # fmt: skip
    losses = []
    torch.manual_seed(1)  # of the dropout seeds
    for i in range(steps):
        lengths = (20 + i, 9, 14) if i % 2 else (40, 48, 48, 30 - i, 7)
        batch = batch_of(*lengths, seed=i, device=device)
        assert batch.input_ids is not None
        labels = torch.full_like(batch.input_ids, -100)
        labels[i : i + 30 : 3] = batch.input_ids[i : i + 30 : 3]
        losses.append(run(batch, labels=labels))
        schedule.step()
    return [float(loss) for loss in losses], model, run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [AdamW, Lamb])
def test_training(kind: Any, device: str) -> None:
    """Dropout, which goes by the place of a token, and the optimiser's steps come out the same."""
    expected, model, _ = train(kind, False, device, 12)
    losses, mine, run = train(kind, True, device, 12)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert run.recorded == 2
    for (name, a), b in zip(model.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("num_labels", [9, 20, 1000])
@pytest.mark.parametrize("kind", [fastbert.BertForMaskedLM, fastbert.BertForPreTraining])
def test_masked_lm_loss_is_the_models_own(
    kind: Any, num_labels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value and every gradient; and the last layer goes on with the rows alone."""
    gathered: list[int] = []
    gather = layer.gather_rows
    monkeypatch.setattr(
        layer, "gather_rows", lambda x, rows: gathered.append(len(rows)) or gather(x, rows)
    )
    torch.manual_seed(0)
    model = kind(CONFIG).eval()
    batch = batch_of(20, 9, 14)
    assert batch.input_ids is not None
    labels = torch.full_like(batch.input_ids, -100)
    labels[::5] = batch.input_ids[::5]
    grads = []
    expected, loss = (
        model(batch=batch, labels=labels).loss,
        masked_lm_loss(model, batch, labels, num_labels),
    )
    assert gathered == 2 * [min(num_labels, 43)]  # x and the context
    for each in (expected, loss):
        model.zero_grad()
        each.backward()
        grads.append([each.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
