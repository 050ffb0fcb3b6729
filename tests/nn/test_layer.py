"""The functional layer: its equations with dropout on, wrapped Linears, probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.config import BertConfig
from fastbert.nn import BertEmbeddings, BertEncoder, BertLayer, LMPredictions, Pooler
from fastbert.nn.layer import Pass, is_plain_linear
from fastbert.ops import philox
from fastbert.packed import PackedBatch

LENGTHS = (5, 0, 1, 7)
CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
    hidden_dropout_prob=0.25,
    attention_probs_dropout_prob=0.4,
    initializer_range=0.3,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return PackedBatch.from_sequences([torch.randint(1, 50, (n,)).tolist() for n in LENGTHS])


@pytest.fixture
def x(batch):
    return torch.randn(batch.num_tokens, 24, dtype=torch.float64)


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.double()


def expected_layer(layer, x, seed, site, p_hidden, p_attention, bias=None, behind=slice(None)):
    """The layer's equations in plain torch, sequence by sequence.

    bias: (1, T, S).  behind: the tokens that go on behind attention."""
    attention, parts = layer.attention, []
    start = 0
    for length in LENGTHS:
        rows = x[start : start + length]
        q, k, v = (
            linear(rows).view(length, 3, 8).transpose(0, 1)
            for linear in (attention.self.query, attention.self.key, attention.self.value)
        )
        scores = q @ k.transpose(1, 2) / 8**0.5
        if bias is not None:
            scores = scores + bias[:, start : start + length, :length]
        p = torch.softmax(scores, -1)
        head = torch.arange(3)[:, None, None]
        row = torch.arange(start, start + length)[None, :, None]
        col = torch.arange(length)[None, None, :]
        keep = philox.keep_mask(seed, site, p_attention, head, row, col)
        p = p * keep / (1 - p_attention)
        parts.append((p @ v).transpose(0, 1).reshape(length, 24))
        start += length
    out = attention.output.dense(torch.cat(parts)[behind])
    h = attention.output.LayerNorm(x[behind] + philox.dropout(out, p_hidden, seed, site + 1))
    y = layer.output.dense(F.gelu(layer.intermediate.dense(h)))
    return layer.output.LayerNorm(h + philox.dropout(y, p_hidden, seed, site + 2))


def test_equations_and_dropout_sites(batch, x):
    encoder = randomised(BertEncoder(CONFIG)).train()
    run = Pass(torch.tensor([1234567890123], dtype=torch.int64))
    y, hidden = encoder(x, batch, run, want_hidden=True)
    expected = x
    for index, layer in enumerate(encoder.layer):
        site = 1 + 3 * index  # 0 is the embeddings'
        expected = expected_layer(layer, expected, run.dropout_seed, site, 0.25, 0.4)
        torch.testing.assert_close(hidden[index + 1], expected)
    assert hidden[0] is x and hidden[-1] is y and len(hidden) == 4
    eval_y, none = encoder.eval()(x, batch, Pass())
    assert none is None and not torch.allclose(eval_y, y)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_bias_and_rows(batch, x, p):
    """Every layer adds the bias; the last goes on with the rows, whose dropout is that of rows
    0, 1, 2, …; gradients too, of parameters and of the tokens that are no rows."""
    config = CONFIG.replace(hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    encoder = randomised(BertEncoder(config)).train()
    bias = torch.randn(1, batch.num_tokens, 8, dtype=torch.float64)
    rows = torch.tensor([0, 3, 5, 11])
    run = Pass(torch.tensor([42]), bias=bias, rows=rows)
    dy = torch.randn(4, 24, dtype=torch.float64)
    x.requires_grad_()
    inputs = [x, *encoder.parameters()]
    y, hidden = encoder(x, batch, run, want_hidden=True)
    found = torch.autograd.grad(y, inputs, dy)

    expected = x
    for index, layer in enumerate(encoder.layer):
        behind = rows if index == 2 else slice(None)
        site = 1 + 3 * index
        expected = expected_layer(layer, expected, run.dropout_seed, site, p, p, bias, behind)
        torch.testing.assert_close(hidden[index + 1], expected)
    assert hidden[-1] is y and y.shape == (4, 24)
    for mine, other in zip(found, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(mine, other)


def test_rows_are_rows_of_the_whole(batch, x):
    """Without dropout; with probabilities asked for; and in an encoder of no layers."""
    rows = torch.tensor([1, 5, 6])
    encoder = randomised(BertEncoder(CONFIG)).eval()
    whole, _ = encoder(x, batch, Pass())
    attentions = []
    for run in (Pass(rows=rows), Pass(rows=rows, attentions=attentions)):
        y, none = encoder(x, batch, run)
        torch.testing.assert_close(y, whole[rows])
        assert none is None
    assert [p.shape for p in attentions] == [(4, 3, 7, 7)] * 3
    empty = BertEncoder(CONFIG.replace(num_hidden_layers=0))
    y, hidden = empty(x, batch, Pass(rows=rows), want_hidden=True)
    assert torch.equal(y, x[rows]) and hidden == [y]


def test_embeddings(batch):
    module = randomised(BertEmbeddings(CONFIG)).train()
    seed = torch.tensor([7])
    e = module.word_embeddings(batch.input_ids) + module.position_embeddings(batch.position_ids)
    e = module.LayerNorm(e + module.token_type_embeddings.weight[0])
    expected = philox.dropout(e, 0.25, seed, 0)
    torch.testing.assert_close(module(batch, Pass(seed)), expected)


class LowRank(nn.Module):
    """A Linear with an adapter beside it, as LoRA wraps one: same ``weight``, another result."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(*size, bias=False, dtype=torch.float64) for size in
                              ((base.in_features, 2), (2, base.out_features)))  # fmt: skip

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "name",
    ["attention.self.query", "attention.self.value", "attention.output.dense",
     "intermediate.dense", "output.dense"],
)  # fmt: skip
def test_wrapped_linears_are_called(name, batch, x):
    layer = randomised(BertLayer(CONFIG)).eval()
    plain = layer(x, batch, Pass(), 0)
    path, _, leaf = name.rpartition(".")
    wrapped = LowRank(layer.get_submodule(name))
    setattr(layer.get_submodule(path), leaf, wrapped)
    y = layer(x, batch, Pass(), 0)
    assert not torch.allclose(y, plain)
    # What the wrapper adds, merged into the weight, gives the same.
    with torch.no_grad():
        wrapped.base.weight += wrapped.up.weight @ wrapped.down.weight
    setattr(layer.get_submodule(path), leaf, wrapped.base)
    torch.testing.assert_close(layer(x, batch, Pass(), 0), y)


def test_hooked_linears_are_called(batch, x):
    layer = randomised(BertLayer(CONFIG)).eval()
    seen = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            assert is_plain_linear(module)
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
            assert not is_plain_linear(module)
    layer(x, batch, Pass(), 0)
    assert len(seen) == 6


def test_probabilities_stand_in_their_columns(x):
    """Padding anywhere in the row: rows and columns of real tokens hold the probabilities."""
    mask = torch.zeros(4, 9, dtype=torch.long)
    for row, columns in enumerate(([8, 1, 3, 4, 6], [], [5], range(1, 8))):
        mask[row, list(columns)] = 1
    batch = PackedBatch.from_padded(torch.ones(4, 9, dtype=torch.long), mask)
    layer = randomised(BertLayer(CONFIG)).eval()
    run = Pass(attentions=[])
    y = layer(x, batch, run, 0)
    (p,) = run.attentions
    assert p.shape == (4, 3, 9, 9)
    torch.testing.assert_close(p.sum(-1), mask[:, None].expand(4, 3, 9).double())
    assert (p * (1 - mask)[:, None, None, :] == 0).all()
    q, k = (linear(x).view(13, 3, 8) for linear in (layer.attention.self.query,
                                                    layer.attention.self.key))  # fmt: skip
    last = torch.softmax(torch.einsum("qnd,knd->nqk", q[6:], k[6:]) / 8**0.5, -1)
    torch.testing.assert_close(p[3][:, 1:8, 1:8], last)
    torch.testing.assert_close(y, layer(x, batch, Pass(), 0))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
def test_lm_head(act, x):
    head = randomised(LMPredictions(BertConfig(
        vocab_size=50, hidden_size=24, num_attention_heads=3, hidden_act=act,
        tie_word_embeddings=False,
    )))  # fmt: skip
    functions = {"gelu": F.gelu, "gelu_new": lambda u: F.gelu(u, approximate="tanh"),
                 "relu": F.relu, "silu": F.silu}  # fmt: skip
    transform = head.transform
    logits = head.decoder(transform.LayerNorm(functions[act](transform.dense(x))))
    torch.testing.assert_close(head(x), logits)
    labels = torch.randint(0, 50, (13,))
    labels[::3] = -100
    torch.testing.assert_close(head.loss(x, labels), F.cross_entropy(logits, labels))
    head.decoder = LowRank(head.decoder)
    torch.testing.assert_close(head.loss(x, labels), F.cross_entropy(head(x), labels))


def test_pooler(batch, x):
    pooler = randomised(Pooler(CONFIG))
    first = torch.stack([x[0], torch.zeros(24, dtype=torch.float64), x[5], x[6]])
    torch.testing.assert_close(pooler(x, batch), torch.tanh(pooler.dense(first)))


def test_gradcheck(batch):
    """Through one whole layer, dropout on, in fp64."""
    layer = randomised(BertLayer(CONFIG)).train()
    run = Pass(torch.tensor([5]))
    x = torch.randn(batch.num_tokens, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, batch, run, 1), x, fast_mode=True)
