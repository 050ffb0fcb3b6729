"""The encoder with attention masks and for some rows: who sees whom, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbert import PackedBatch
from fastbert.pretrain import PretrainingBatch, parse
from fastbert.pretrain.encode import UNSEEN, attention_bias, encode, visibility

from ._models import CONFIG, batch_of, model_of, texts

pytestmark = pytest.mark.usefixtures("one_thread")


def sees(batch: PretrainingBatch, sequence: int) -> np.ndarray:
    """(n, n) bool of one sequence, from the bias."""
    assert batch.visibility is not None
    bias = attention_bias(batch.visibility, batch.inputs)[0]
    start = int(batch.inputs.cu_seqlens[sequence])
    n = batch.inputs.lengths[sequence]
    assert set(bias.unique().tolist()) <= {0.0, float("-inf")}
    return (bias[start : start + n, :n] == 0).numpy()


def batch_seeing(*tables: np.ndarray) -> PretrainingBatch:
    lengths = [len(table) for table in tables]
    inputs = PackedBatch.from_flat(torch.zeros(sum(lengths), dtype=torch.int64), lengths)
    return PretrainingBatch(inputs, None, {}, torch.from_numpy(np.concatenate(tables)))


def test_xlnet_by_hand() -> None:
    """Five tokens, of which 3 and then 1 are predicted: ranks 0 2 0 1 0; two query rows."""
    rank = np.array([0, 2, 0, 1, 0])
    content = visibility(5, seen_from=rank, sees_to=rank)
    query = visibility(2, seen_from=UNSEEN, sees_to=rank[[1, 3]] - 1)
    table = np.concatenate((content, query))
    expected = [
        # 0  1  2  3  4 q1 q3
        [1, 0, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],  # the last: sees all and itself
        [1, 0, 1, 0, 1, 0, 0],
        [1, 0, 1, 1, 1, 0, 0],  # the first: not token 1
        [1, 0, 1, 0, 1, 0, 0],
        [1, 0, 1, 1, 1, 0, 0],  # asks for token 1: does not see it, sees token 3
        [1, 0, 1, 0, 1, 0, 0],  # asks for token 3: sees neither
    ]
    found = batch_seeing(np.zeros((3, 3), np.int64), table, content)
    assert sees(found, 1).astype(int).tolist() == expected
    assert sees(found, 0).all()
    assert sees(found, 2).astype(int).tolist() == [row[:5] for row in expected[:5]]


def test_unilm2_by_hand() -> None:
    """The paper's example: x1 .. x6, masked 4 5 and then 2."""
    step = np.array([2, 1, 1])  # of 2, 4, 5
    table = np.concatenate(
        (
            visibility(6, seen_from=0, sees_to=0),
            visibility(3, seen_from=step, sees_to=step),
            visibility(3, seen_from=UNSEEN, sees_to=step - 1, block=step),
        )
    )
    context = [1, 1, 1, 1, 1, 1]  # and the Ms among it
    expected = [
        #           x2 x4 x5 P2 P4 P5
        *[[*context, 0, 0, 0, 0, 0, 0]] * 6,
        [*context, 1, 1, 1, 0, 0, 0],  # x2
        [*context, 0, 1, 1, 0, 0, 0],  # x4
        [*context, 0, 1, 1, 0, 0, 0],  # x5
        [*context, 0, 1, 1, 1, 0, 0],  # P2 sees x4 x5, itself, not x2
        [*context, 0, 0, 0, 0, 1, 1],  # P4
        [*context, 0, 0, 0, 0, 1, 1],  # P5
    ]
    assert sees(batch_seeing(table), 0).astype(int).tolist() == expected


@pytest.mark.parametrize("name", ["plm", "unilm2"])
def test_what_is_not_seen_changes_nothing(name: str) -> None:
    """Each token in turn is another: exactly the rows that may see it, be it through others, have
    other states; the rest have the same bits."""
    objectives = parse(name)
    model = model_of(objectives)
    batch = batch_of(objectives, texts(9, 12)).replace(rows=None)
    inputs = batch.inputs
    assert inputs.input_ids is not None
    before = encode(model.bert, batch)
    for sequence in (0, 1):
        start, n = int(inputs.cu_seqlens[sequence]), inputs.lengths[sequence]
        seen = sees(batch, sequence)
        assert np.array_equal(seen, seen @ seen)  # what is seen of others is seen at once
        for token in range(n):
            ids = inputs.input_ids.clone()
            ids[start + token] = 5 + (ids[start + token] + 7) % 35
            after = encode(model.bert, batch.replace(inputs=inputs.replace(input_ids=ids)))
            changed = (before != after).any(1).numpy()
            own = changed[start : start + n]
            expected = seen[:, token].copy()
            expected[token] = True  # its own residual
            assert np.array_equal(own, expected)
            changed[start : start + n] = False
            assert not changed.any()  # and no other sequence


def test_queries_do_not_see_what_they_are_asked() -> None:
    """Of the two streams above all this: the content of a target never reaches its query."""
    objectives = parse("plm")
    batch = batch_of(objectives, texts(20, 30, 7))
    for sequence, n in enumerate(batch.inputs.lengths):
        start = int(batch.inputs.cu_seqlens[sequence])
        seen, positions = sees(batch, sequence), batch.inputs.position_ids[start : start + n]
        for row in range(n):
            queries = row >= int(positions.max()) + 1
            assert seen[row, int(positions[row])] == (not queries)
            assert seen[row, int(positions.max()) + 1 :].sum() == 0


@pytest.mark.parametrize("name", ["mlm", "plm"])
def test_rows_are_the_same_numbers(name: str) -> None:
    """The last layer for some rows only: their states and all gradients are those of the whole."""
    objectives = parse(name)
    model = model_of(objectives)
    batch = batch_of(objectives, texts(20, 31, 8))
    assert batch.rows is not None and len(batch.rows) < 0.3 * batch.inputs.num_tokens
    dy = torch.randn(len(batch.rows), CONFIG.hidden_size).double()
    found = []
    for rows in (True, False):
        model.zero_grad()
        states = encode(model.bert, batch if rows else batch.replace(rows=None))
        states = states if rows else states[batch.rows]
        states.backward(dy)
        found.append([states.detach()] + [p.grad.clone() for p in model.bert.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_without_rows_and_masks_it_is_the_encoder() -> None:
    model = model_of(parse("mlm"))
    batch = batch_of(parse("mlm"), texts(20, 31)).replace(rows=None)
    expected = model.bert.encode(batch.inputs, False, False)[0]
    assert torch.equal(encode(model.bert, batch), expected)


def test_gradient_checkpointing_and_dropout() -> None:
    """A layer that is computed again drops the same elements, with rows and with masks."""
    config = CONFIG.replace(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    for name in ("mlm", "plm"):
        model = model_of(parse(name), config)
        batch = batch_of(parse(name), texts(20, 31))
        gradients = []
        for again in (False, True):
            model.zero_grad()
            getattr(model.bert, f"gradient_checkpointing_{'enable' if again else 'disable'}")()
            torch.manual_seed(3)
            model(batch).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for mine, other in zip(*gradients, strict=True):
            assert torch.equal(mine, other)


def test_sequences_may_outgrow_the_positions() -> None:
    """With copies behind it a text of all 32 positions has more rows than there are positions."""
    for name in ("plm", "unilm2"):
        objectives = parse(name)
        batch = batch_of(objectives, texts(32))
        assert batch.inputs.max_seqlen > CONFIG.max_position_embeddings
        assert torch.isfinite(model_of(objectives)(batch).loss)
