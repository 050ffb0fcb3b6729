"""What a run begins with: a model that there is, held-out text that will not do, options that do
not fit; and what the model that it ends with is good for."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert import BertConfig
from fastbert.data import Corpus
from fastbert.pretrain import Options, Phase, PretrainingModel, Setting, Trainer, parse, preset
from fastbert.pretrain import pretrain as run
from fastbert.pretrain.evaluation import evaluate
from fastbert.train import checkpoint
from fastbert.train.processes import accelerator

from ._models import CONFIG, batch_of, model_of, texts
from ._samples import write_corpus

pytestmark = pytest.mark.usefixtures("one_thread")

SETTING = Setting(steps=2, batch_tokens=128, workers=0, evaluate_every=1, log_every=1)


def chosen(size: str = "tiny", **changes: Any) -> Options:
    return preset("minutes", size=size, warmup_steps=1, phases=[Phase(16, 10, 4)], **changes)


def small(vocab_size: int, layers: int = 3) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip


def documents(count: int) -> list[list[str]]:
    """Of 9 sentences; with ``held_out=.25`` one of 4 is held out, and three of 8."""
    return [[f"a{number} b c d e f"] * 9 for number in range(count)]


@pytest.fixture
def three_layers(documentation: Corpus, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    fastbert.BertForMaskedLM(small(documentation.vocab_size)).save_pretrained(tmp_path / "three")
    return tmp_path / "three"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]


# --- a model that there is --------------------------------------------------------------------


def test_init_has_its_own_depth_and_warns_of_nothing(
    documentation: Corpus, three_layers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Options say tiny, of two layers. A masked LM has no pooler that could be missed."""
    begun: list[dict[str, Any]] = []
    run(documentation.folder, tmp_path / "run", chosen(), SETTING, init=three_layers,
        tell=lambda trainer, noted: begun.append(noted))  # fmt: skip
    assert warnings(caplog) == []
    model = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "run/model")
    assert model.config.num_hidden_layers == 3
    start = begun[0]
    assert (start["kind"], start["step"], start["layers"], start["hidden_size"]) == (
        "start", 0, 3, 32
    )  # fmt: skip
    assert start["parameters"] == sum(p.numel() for p in model.parameters())
    assert start["update_tokens"] == 16 * 4


def test_a_longer_run_from_a_model_that_is_gone(
    documentation: Corpus, three_layers: Path, tmp_path: Path
) -> None:
    """The checkpoint has its size and its weights."""
    for steps in (2, 3):
        setting = dataclasses.replace(SETTING, steps=steps)
        run(documentation.folder, tmp_path / "run", chosen(), setting,
            init=three_layers if steps == 2 else None, resume=steps == 3)  # fmt: skip
        if steps == 2:
            three_layers.rename(tmp_path / "moved")
    found = checkpoint.latest(tmp_path / "run/checkpoints")
    assert found is not None and found.name == "step-00000003"
    model = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "run/model")
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("objective", "named"),
    [("mlm", ["cls.predictions"]), ("rtd", []), ("sop", ["bert.pooler", "cls.seq_relationship"]),
     ("mlm+nsp", ["bert.pooler", "cls.predictions", "cls.seq_relationship"]),
     ("distance", ["pooler"])],
)  # fmt: skip
def test_what_a_bare_encoder_lacks(
    objective: str, named: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an encoder without a pooler: the parts that are missed are those that the model has."""
    encoder = fastbert.BertModel(small(40), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    model = PretrainingModel.from_pretrained(tmp_path, parse(objective))
    assert [text.split("holds no ")[1].split(":")[0] for text in warnings(caplog)] == named
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], tensor)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "layers", "message"),
    [
        ({"size": "huge"}, None, "unknown name 'huge'"),
        ({"what": "unit"}, None, "prepared without a list of units"),
        ({"stack": (1, 2)}, 3, r"stack: got \(1, 2\) beside init"),
        ({"length": 128}, 3, "phases: got a length of 128, expected at most that of .*three, 64"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], layers: int | None, message: str
) -> None:
    """So that the corrected command can run."""
    corpus = write_corpus(tmp_path / "made", documents(3))
    init = None
    if layers is not None:
        init = tmp_path / "three"
        fastbert.BertForMaskedLM(small(corpus.vocab_size, layers)).save_pretrained(init)
    with pytest.raises(ValueError, match=message):
        run(corpus.folder, tmp_path / "run", chosen().changed(**changes), SETTING, init=init)
    assert not (tmp_path / "run").exists()
    run(corpus.folder, tmp_path / "run", chosen(), SETTING)


def test_another_vocabulary(three_layers: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "made", documents(3))
    with pytest.raises(ValueError, match="init: .*three has a vocabulary of"):
        run(corpus.folder, tmp_path / "run", chosen(), SETTING, init=three_layers)
    assert not (tmp_path / "run").exists()


# --- held-out text ----------------------------------------------------------------------------


def test_held_out_text_that_makes_no_pairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One document has no other to take the second segment from."""
    corpus = write_corpus(tmp_path / "made", documents(4), held_out=0.25)
    assert Corpus(corpus.folder, "valid").num_documents == 1
    options = chosen(objective="mlm+nsp", source="pairs")
    assert run(corpus.folder, tmp_path / "run", options, SETTING) == {}
    (said,) = warnings(caplog)
    assert said.startswith(
        "held-out text: too little of it to evaluate anything on, documents: 1 ("
    )
    assert "corpus of 2 documents or more" in said
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert run(corpus.folder, tmp_path / "mlm", chosen(), SETTING).keys() == {"mlm"}


def test_a_checkpoint_comes_before_the_evaluation(
    documentation: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in it costs no work: going on begins with it."""
    corpus = write_corpus(tmp_path / "made", documents(8), held_out=0.25)
    options = chosen(objective="rtd")
    whole = run(corpus.folder, tmp_path / "whole", options, SETTING)
    with monkeypatch.context() as patch:

        def broken(trainer: Trainer) -> None:
            raise RuntimeError("evaluation")

        patch.setattr(Trainer, "evaluate", broken)
        setting = dataclasses.replace(SETTING, evaluate_every=2)
        with pytest.raises(RuntimeError, match="evaluation"):
            run(corpus.folder, tmp_path / "run", options, setting)
    found = checkpoint.latest(tmp_path / "run/checkpoints")
    assert found is not None and found.name == "step-00000002"
    assert run(corpus.folder, tmp_path / "run", options, setting, resume=True) == whole


def test_an_evaluation_draws_no_number() -> None:
    """Though ELECTRA's generator is sampled from; and it draws the same every time."""
    objectives = parse("rtd")
    model, batch = model_of(objectives, CONFIG), batch_of(objectives, texts(9, 12))
    device = accelerator("no")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = evaluate(model, [batch], device)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert evaluate(model, [batch], device) == first


# --- what it ends with ------------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "exported"), [(0.0, 0.1), (0.2, 0.2)])
def test_dropout_for_fine_tuning(
    documentation: Corpus, tmp_path: Path, dropout: float, exported: float
) -> None:
    run(documentation.folder, tmp_path / "run", chosen(dropout=dropout), SETTING)
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == exported
    card = (tmp_path / "run/model/README.md").read_text()
    assert ("pretrained without dropout; `config.json` has BERT's 0.1" in card) == (not dropout)


@pytest.mark.parametrize("objective", ["plm", "unilm2"])
def test_masks_between_tokens_are_told_of(
    documentation: Corpus, tmp_path: Path, objective: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first step: no kernel on CPU takes them."""
    device = accelerator("no")
    for name in (objective, "mlm"):
        caplog.clear()
        Trainer(documentation.folder, chosen(objective=name, source="segments"), SETTING, tmp_path,
                device)  # fmt: skip
        said = [text for text in warnings(caplog) if "reference path" in text]
        assert len(said) == (name != "mlm")
