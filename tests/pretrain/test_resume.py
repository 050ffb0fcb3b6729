"""Going on with a run that has ended, or was stopped in its last moments, or is to take longer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastbert.data import Corpus, prepare
from fastbert.demo import documentation_texts
from fastbert.pretrain import Options, Phase, RunRecord, Setting, Trainer, preset, pretrain
from fastbert.pretrain import run as run_module
from fastbert.train import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SETTING = Setting(steps=4, batch_tokens=128, workers=0, evaluate_every=3, log_every=1, save_every=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(documentation_texts(60)), encoding="utf-8")
    prepare([folder / "text.txt"], folder / "out", tokenizer="train:300", held_out=0.1,
            num_workers=1, progress=False)  # fmt: skip
    return Corpus(folder / "out")


def chosen(**changes: Any) -> Options:
    phases = [Phase(16, 8, 8), Phase(32, 2, 4)]
    return preset("minutes", size="tiny", warmup_steps=1, phases=phases, **changes)


def lines(out: Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"]) for row in rows]


def test_a_run_that_has_ended_keeps_its_scores(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    scores = pretrain(corpus.folder, out, chosen(), SETTING)
    card = (out / "model/README.md").read_text()
    assert f"{scores['mlm']['perplexity']:.2f}" in card
    (tmp_path / "run/model/README.md").unlink()
    assert pretrain(corpus.folder, out, chosen(), SETTING, resume=True) == scores
    assert (out / "model/README.md").read_text() == card


def test_stopped_before_the_export(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    scores = pretrain(corpus.folder, tmp_path / "whole", chosen(), SETTING)

    class Killed(Exception):
        pass

    def killed(*given: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "_write_card", killed)
        pretrain(corpus.folder, out, chosen(), SETTING)
    (out / "log.jsonl").open("a").write('{"step": 4, "ki')  # a line that was never finished
    assert pretrain(corpus.folder, out, chosen(), SETTING, resume=True) == scores
    assert lines(out) == lines(tmp_path / "whole")


def test_a_run_may_take_longer(corpus: Corpus, tmp_path: Path) -> None:
    """It goes on with what it has: 4 layers stay 4, though a longer run would have 2 yet."""
    out = tmp_path / "run"
    options = chosen(stack=[2, 4])
    pretrain(corpus.folder, out, options, SETTING)
    longer = dataclasses.replace(SETTING, steps=20)
    layers: list[int] = []

    def tell(trainer: Trainer, noted: dict[str, Any]) -> None:
        layers.append(trainer.model.config.num_hidden_layers)

    pretrain(corpus.folder, out, options, longer, resume=True, tell=tell)
    assert set(layers) == {4}
    assert [step for kind, step in lines(out) if kind == "train"] == list(range(1, 21))
    record = RunRecord.read(out)
    assert (record.setting, record.lengthened_at) == (longer, (4,))
    assert "made longer behind step 4" in (out / "model/README.md").read_text()
    with pytest.raises(ValueError, match=r"steps \(got 4, expected 20 or more\)"):
        pretrain(corpus.folder, out, options, SETTING, resume=True)


def test_what_differs_is_named(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(corpus.folder, out, chosen(), SETTING)
    other = chosen(rate=0.4, objective="mlm+sbo", source="segments")
    setting = dataclasses.replace(SETTING, steps=None, minutes=1.0, seed=3, workers=1)
    before = (out / "run.json").read_bytes()
    with pytest.raises(ValueError, match="resume: a run goes on as it was begun") as error:
        pretrain(corpus.folder, out, other, setting, init=tmp_path, resume=True)
    for text in (
        "objective (got mlm+sbo, it has mlm)", "masking.rate (got 0.4, it has 0.25)",
        "source (got segments, it has full-sentences)", f"init (got {tmp_path}, it has None)",
        "steps (got None, expected 4 or more)", "minutes (got 1.0, expected None)",
        "seed (got 3, it has 0)",
    ):  # fmt: skip
        assert text in str(error.value)
    assert "workers" not in str(error.value) and (out / "run.json").read_bytes() == before


def test_the_corpus_may_move_but_not_change(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(corpus.folder, out, chosen(), SETTING)
    shutil.copytree(corpus.folder, tmp_path / "moved")
    longer = dataclasses.replace(SETTING, steps=5)
    pretrain(tmp_path / "moved", out, chosen(), longer, resume=True)
    assert RunRecord.read(out).corpus == tmp_path / "moved"
    found = checkpoint.latest(out / "checkpoints")
    assert found is not None and found.name == "step-00000005"
    (tmp_path / "text.txt").write_text("\n\n".join(documentation_texts(20)), encoding="utf-8")
    prepare([tmp_path / "text.txt"], tmp_path / "other", tokenizer="train:200", num_workers=1,
            progress=False)  # fmt: skip
    with pytest.raises(ValueError, match="corpus: .*other has another tokenizer than the run"):
        pretrain(tmp_path / "other", out, chosen(), longer, resume=True)
