"""Every objective learns: on real text the loss falls, and answers beat the level of chance.

Models are tiny and runs short, so what is hard in language stays out of reach. Most runs see the
same few sequences again and again, masked, noised or swapped anew each time: who cannot use the
context, or is asked something else than what the inputs hold, does not learn even these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fastbert import BertConfig
from fastbert.data import Corpus
from fastbert.pretrain import (
    Masking,
    PretrainingBatch,
    PretrainingData,
    PretrainingModel,
    collate,
    open_source,
    parse,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, LR, LENGTH = 16, 3e-3, 64


class Run(NamedTuple):
    """beats: how far each summand has to be above chance.  sequences: None for all the text."""

    objective: str
    source: str
    beats: dict[str, float]
    steps: int = 120
    sequences: int | None = 32
    length: int = LENGTH
    masking: Masking | None = None
    options: dict[str, Any] = {}


RUNS = [
    Run("mlm", "full-sentences", {"mlm": 0.02}, sequences=None),
    Run("sop", "pairs", {"sop": 0.2}, steps=60),
    Run("rtd", "segments", {"rtd": 0.1}, length=32,
        masking=Masking(rate=0.3, replace=(0.85, 0.0, 0.15))),
]  # fmt: skip
SLOW = [
    Run("mlm+nsp", "pairs", {"nsp": 0.2}, steps=150),
    Run("mlm+sbo", "segments", {"mlm": 0.03, "sbo": 0.03}, masking=Masking(what="span")),
    Run("mlm", "segments", {"mlm": 0.03}, masking=Masking(what="word", rate=0.4)),
    Run("mlm", "segments", {"mlm": 0.02}, masking=Masking(what="unit")),
    Run("mlm", "segments", {"mlm": 0.02}, masking=Masking(what="random-span", mean_span=3.0)),
    Run("mlm", "streams", {"mlm": 0.02}, steps=150, masking=Masking(alpha=0.5)),
    Run("3way", "pairs", {"3way": 0.2}),
    Run("distance", "pairs", {"distance": 0.2}),
    Run("reorder", "segments", {"reorder": 0.1}, steps=250, length=128, sequences=16),
    Run("word-order", "segments", {"word-order": 0.05}),
    Run("capitalised+elsewhere", "segments", {"capitalised": 0.02, "elsewhere": 0.05}),
    Run("plm", "segments", {"plm": 0.02}),
    Run("unilm2", "segments", {"unilm2/ae": 0.02, "unilm2/par": 0.02}),
    Run("bart", "segments", {"bart/tokens": 0.01, "bart/length": 0.01, "bart/order": 0.05,
                             "bart/inserted": 0.03, "bart/start": 0.03}, steps=300,
        options={"bart": {"insert": 0.1, "rotate": 0.5, "delete": 0.2}}),
]  # fmt: skip


class Batches:
    """Batches of the first sequences of a shuffled source, epoch after epoch."""

    def __init__(self, data: PretrainingData, sequences: int | None) -> None:
        self.data = data
        self.rng = np.random.default_rng(0)
        self.pool = self.rng.permutation(len(data))[:sequences]

    def of_epoch(self, epoch: int) -> list[PretrainingBatch]:
        self.data.set_epoch(epoch)
        order = self.rng.permutation(self.pool)
        parts = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
        return [collate([self.data[int(i)] for i in part]) for part in parts]


def learns(run: Run, corpus: Corpus) -> None:
    objectives = parse(run.objective, run.masking, run.options)
    source = open_source(run.source, corpus, run.length, objectives, seed=1)
    batches = Batches(PretrainingData(source, objectives, seed=1), run.sequences)
    config = BertConfig(
        vocab_size=corpus.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PretrainingModel(config, objectives)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    first: dict[str, float] = {}
    step = epoch = 0
    while step < run.steps:
        for batch in batches.of_epoch(epoch)[: run.steps - step]:
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, (step + 1) / 10) * (1 - step / run.steps)
            output = model(batch)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            first = first or {name: float(loss) for name, loss in output.losses().items()}
            step += 1
        epoch += 1

    model.eval()
    sums = {name: np.zeros(4) for name in first}
    with torch.no_grad():  # masks and all else that the model has not met
        for new in range(1000, 1003):
            for batch in batches.of_epoch(new)[:10]:
                output = model(batch, measure=True)
                for name, term in output.terms.items():
                    assert term.correct is not None and term.chance is not None
                    total = [float(x) for x in (term.total, term.correct, term.chance)]
                    sums[name] += [output.counts[name], *total]
    for name, margin in run.beats.items():
        count, loss, correct, chance = sums[name]
        assert loss / count < 0.8 * first[name], f"{name}: from {first[name]} to {loss / count}"
        assert correct / count > chance / count + margin, f"{name}: {correct} and {chance}"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.objective)
def test_it_learns(run: Run, documentation: Corpus) -> None:
    learns(run, documentation)


def name_of(run: Run) -> str:
    masking = "" if run.masking is None else f"-{run.masking.what}"
    return f"{run.objective}-{run.source}{masking}"


@pytest.mark.slow
@pytest.mark.parametrize("run", SLOW, ids=name_of)
def test_it_learns_too(run: Run, documentation: Corpus) -> None:
    learns(run, documentation)
