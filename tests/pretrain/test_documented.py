"""The package's docstring: its examples run, and its own objective is one."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastbert.pretrain
from fastbert import BertConfig
from fastbert.data import Corpus, TokenBatches
from fastbert.pretrain import OBJECTIVES, PretrainingModel

from ._models import CONFIG, batch_of, model_of, texts
from ._samples import CLS, SEP, example

pytestmark = pytest.mark.usefixtures("one_thread")


def code(first: str, last: str) -> str:
    """The lines of the docstring from one to the other."""
    text = fastbert.pretrain.__doc__ or ""
    found = re.search(
        f"^    {re.escape(first)}.*?^    {re.escape(last)}[^\n]*\n", text, re.S | re.M
    )
    assert found is not None
    return textwrap.dedent(found[0])


def test_the_example_runs(
    documentation: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for one batch of an epoch only."""
    monkeypatch.chdir(documentation.folder.parent)
    names = {name: getattr(fastbert.pretrain, name) for name in fastbert.pretrain.__all__}
    loader = lambda *given, **options: islice(DataLoader(*given, **options), 1)  # noqa: E731
    names |= {"Corpus": Corpus, "BertConfig": BertConfig, "TokenBatches": TokenBatches,
              "DataLoader": loader}  # fmt: skip
    exec(code("corpus = Corpus(", "model.export("), names)
    assert "'mlm': tensor(" in capsys.readouterr().out
    assert (documentation.folder.parent / "run/model/tokenizer.json").is_file()


def test_an_objective_of_ones_own() -> None:
    names: dict[str, Any] = {name: getattr(fastbert.pretrain, name)
                             for name in fastbert.pretrain.__all__}  # fmt: skip
    names |= {"dataclass": dataclass, "np": np, "nn": nn}
    text = code("@register", "objectives = parse(")
    assert len(text.splitlines()) <= 30
    try:
        exec(text, names)
        objectives = names["objectives"]
        assert [objective.name for objective in objectives] == ["mlm", "sentence-end"]
        x = example([CLS, 10, 11, 12, SEP], sentence=[0, 0, 0, 1, 0])
        found = objectives[1].prepare(x, None, None).targets["sentence-end"]
        assert found["index"].tolist() == [1, 2, 3]
        assert found["labels"].tolist() == [False, True, True]
        model: PretrainingModel = model_of(objectives, CONFIG)
        output = model(batch_of(objectives, texts(9, 12)), measure=True)
        assert torch.isfinite(output.loss) and "sentence-end" in output.accuracies()
        with pytest.raises(ValueError, match="objective: the name 'sentence-end' is taken"):
            exec(text, names)
    finally:
        OBJECTIVES.pop("sentence-end", None)
