"""Batches: places where they belong, the same numbers padded and packed, Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.pretrain import (
    Example,
    Masking,
    PaddedCollator,
    PretrainingData,
    PretrainingModel,
    collate,
    open_source,
    parse,
)

from ._models import CONFIG, batch_of, model_of, prepared_by, texts
from ._samples import CLS, SEP, example, write_corpus

pytestmark = pytest.mark.usefixtures("one_thread")


def asking(x: Example, **targets: Any) -> Example:
    return x.asking("a", **{name: np.array(value, np.int64) for name, value in targets.items()})


def test_collate_by_hand() -> None:
    first = asking(example([CLS, 10, 11, 12, SEP]), index=[2, 3], b_index=[0, 0], place=[1], n=[7])
    second = asking(example([CLS, 13, SEP]), index=[1], b_index=[2], place=[2], n=[])
    batch = collate([first, second])
    assert batch.inputs.lengths == (5, 3)
    assert batch.inputs.input_ids is not None and batch.rows is not None
    assert batch.inputs.input_ids.tolist() == [CLS, 10, 11, 12, SEP, CLS, 13, SEP]
    assert batch.rows.tolist() == [0, 2, 3, 6, 7]
    assert {name: x.tolist() for name, x in batch.targets["a"].items()} == {
        "index": [1, 2, 3],  # rows 2, 3 and 6
        "b_index": [0, 0, 4],
        "place": [1, 7],  # of the packed tokens
        "n": [7],
    }
    assert batch.places(batch.targets["a"]["index"]).tolist() == [2, 3, 6]


def test_nearly_all_rows_are_all() -> None:
    x = asking(example([CLS, *range(10, 30), SEP]), index=np.arange(21))
    batch = collate([x, x])
    assert batch.rows is None
    assert batch.targets["a"]["index"].tolist() == [*range(21), *range(22, 43)]
    assert batch.places(batch.targets["a"]["index"]).tolist() == [*range(21), *range(22, 43)]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=5))
def test_an_index_finds_its_token(asked: list[list[bool]]) -> None:
    """However examples are batched: rows of the whole, taken at an index, are the tokens asked."""
    examples = []
    for row in asked:
        x = example([CLS, *np.random.default_rng(len(row)).integers(5, 40, len(row)), SEP])
        index = 1 + np.flatnonzero(row)
        examples.append(x.asking("a", index=index, token=x.ids[index]))
    batch = collate(examples)
    assert batch.inputs.input_ids is not None
    ids = batch.inputs.input_ids if batch.rows is None else batch.inputs.input_ids[batch.rows]
    targets = batch.targets["a"]
    assert torch.equal(ids[targets["index"]], targets["token"])


def test_a_batch_moves() -> None:
    batch = batch_of(parse("plm"), texts(9, 12))
    moved = batch.to("meta")
    tensors = [moved.rows, moved.visibility, moved.inputs.input_ids, moved.inputs.cu_seqlens]
    tensors += list(moved.targets["plm"].values())
    assert all(x is not None and x.device.type == "meta" for x in tensors)
    assert moved.inputs.lengths == batch.inputs.lengths


def test_examples_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="examples: got none"):
        collate([])
    mlm = prepared_by(parse("mlm"), texts(9))
    nsp = prepared_by(parse("mlm+nsp"), texts(9))
    with pytest.raises(ValueError, match="examples: were prepared for different objectives"):
        collate([*mlm, *nsp])
    with pytest.raises(ValueError, match="examples: were prepared for different objectives"):
        collate([*nsp, *mlm])
    with pytest.raises(ValueError, match="examples: are for plm, expected mlm, mlm.nsp or mlm.sop"):
        PaddedCollator()(prepared_by(parse("plm"), texts(9)))


def test_padded_by_hand() -> None:
    masking = Masking(rate=0.9, replace=(1.0, 0.0, 0.0))
    x = example([CLS, 10, SEP]).replace(relation=1)
    y = example([CLS, 11, 12, SEP, SEP])  # no relation
    y.token_type_ids[4] = 1
    both = prepared_by(parse("mlm+nsp", masking), [x, y])
    batch = PaddedCollator(pad_id=0, multiple_of=4)(both)
    assert batch["input_ids"].tolist() == [
        [CLS, 4, SEP, 0, 0, 0, 0, 0], [CLS, 4, 4, SEP, SEP, 0, 0, 0]
    ]  # fmt: skip
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    no = -100
    assert batch["labels"].tolist() == [
        [no, 10, no, no, no, no, no, no], [no, 11, 12, no, no, no, no, no]
    ]  # fmt: skip
    assert batch["next_sentence_label"].tolist() == [1, no]


@pytest.mark.parametrize("text", ["mlm", "mlm+nsp"])
def test_hugging_face_has_the_same_loss(text: str, tmp_path: Path) -> None:
    """Exported, loaded by transformers, fed by the padded collator: the packed batch's loss."""
    import transformers

    objectives = parse(text)
    model = model_of(objectives)
    examples = prepared_by(objectives, texts(20, 31, 8))
    model.export(tmp_path)
    name = "BertForPreTraining" if "nsp" in text else "BertForMaskedLM"
    theirs = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float64)
    loss = theirs(**PaddedCollator()(examples)).loss
    torch.testing.assert_close(model(collate(examples)).loss, loss, rtol=1e-6, atol=1e-6)


def test_hugging_face_trainer(corpus_folder: Path, tmp_path: Path) -> None:
    """Their Trainer trains their model on our examples, and masks anew in each epoch."""
    import transformers

    corpus = write_corpus(corpus_folder, [[f"a b c d e f g {c}" for c in "hijklmn"]] * 3)
    objectives = parse("mlm")
    data = PretrainingData(open_source("segments", corpus, 24, objectives), objectives, seed=0)
    seen: list[tuple[int, list[int]]] = []

    class Noting(PaddedCollator):
        def __call__(self, examples: Any) -> Any:
            seen.append((data.epoch, [int(x.targets["mlm"]["index"][0]) for x in examples]))
            return super().__call__(examples)

    config = transformers.BertConfig(
        vocab_size=corpus.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=16,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=3, per_device_train_batch_size=len(data),
        remove_unused_columns=False, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        transformers.BertForMaskedLM(config), arguments, Noting(), train_dataset=data
    )
    assert np.isfinite(trainer.train().training_loss)
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert len({tuple(sorted(masks)) for _, masks in seen}) > 1


def test_from_pretrained_goes_on(tmp_path: Path) -> None:
    """What was exported begins where it was: heads that match too, others at random."""
    first = model_of(parse("mlm+nsp"))
    first.export(tmp_path / "nsp")
    second = PretrainingModel.from_pretrained(tmp_path / "nsp", parse("mlm+sop"))
    assert second.training and next(second.parameters()).dtype == torch.float64
    ours, theirs = first.state_dict(), second.state_dict()
    assert set(theirs) == {name.replace("heads.nsp", "heads.sop") for name in ours}
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name.replace("heads.sop", "heads.nsp")])
    third = PretrainingModel.from_pretrained(
        tmp_path / "nsp", parse("rtd"), hidden_dropout_prob=0.25
    )
    assert third.config.hidden_dropout_prob == 0.25 and third.bert.pooler is None
    batch = batch_of(parse("rtd"), texts(9))
    assert torch.isfinite(third(batch).loss)


def test_export(tmp_path: Path) -> None:
    from fastbert import BertForMaskedLM, BertForPreTraining, BertModel

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("[PAD]\n")
    for text, kind in (
        ("mlm+nsp", BertForPreTraining),
        ("mlm+sop", BertForPreTraining),
        ("mlm+3way", BertForMaskedLM),  # three classes fit no checkpoint
        ("plm", BertForMaskedLM),
        ("rtd", BertModel),
        ("reorder", BertModel),
    ):
        model = model_of(parse(text))
        folder = tmp_path / text
        model.export(folder, tokenizer=tmp_path / "tokenizer", hidden_dropout_prob=0.1)
        assert (folder / "vocab.txt").is_file()
        loaded: Any = kind.from_pretrained(folder)
        assert loaded.config.hidden_dropout_prob == 0.1 and type(model.to_pretrained()) is kind
        batch = batch_of(parse(text), texts(9, 12)).inputs
        encoder = loaded if kind is BertModel else loaded.bert
        expected = model.bert.encode(batch, False, False)[0]
        assert torch.equal(encoder.encode(batch, False, False)[0], expected)
        if kind is not BertModel:
            head: Any = model.heads["lm"]
            assert torch.equal(loaded.cls.predictions(expected), head(expected))
        if kind is BertForPreTraining:
            pair = loaded.cls.seq_relationship.weight
            assert torch.equal(pair, model.heads[text.removeprefix("mlm+")].weight)
        if text == "reorder":
            assert torch.equal(loaded.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_ties() -> None:
    """The decoder is the word embeddings, one parameter; unless the config keeps them apart."""
    model = model_of(parse("mlm"))
    head: Any = model.heads["lm"]
    words = model.bert.embeddings.word_embeddings.weight
    assert head.decoder.weight is words and head.decoder.bias is head.bias
    state, names = model.state_dict(), dict(model.named_parameters())
    assert set(state) - set(names) == set(model.tied)
    assert all(state[alias].data_ptr() == state[owner].data_ptr()
               for alias, owner in model.tied.items())  # fmt: skip
    apart = model_of(parse("mlm"), CONFIG.replace(tie_word_embeddings=False))
    assert not apart.tied and "heads.lm.decoder.weight" in dict(apart.named_parameters())
    assert torch.isfinite(apart(batch_of(parse("mlm"), texts(9))).loss)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="objectives: got none"):
        PretrainingModel(CONFIG, ())
    with pytest.raises(ValueError, match="config: got no hidden layers"):
        PretrainingModel(CONFIG.replace(num_hidden_layers=0), parse("mlm"))
