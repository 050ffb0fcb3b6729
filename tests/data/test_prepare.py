"""prepare: the same bytes whatever the workers and whatever stopped it before."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastbert import atomic
from fastbert.data import Corpus, prepare, shards
from fastbert.data.corpus import read_facts
from fastbert.data.workers import is_held_out

_WORDS = "The cat sat on the mat in New York City of unable dogs and É 猫 qq"
WORDS = _WORDS.split(" ")


def text_of(documents: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    sentences = [
        [
            " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + "."
            for _ in range(draw.randint(1, 5))
        ]
        for _ in range(documents)
    ]
    return "\n\n".join("\n".join(document) for document in sentences) + "\n"


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Three files in two formats, with bad lines in one."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(text_of(150, 1), encoding="utf-8")
    records = [
        json.dumps({"text": text.replace("\n", " ")}) for text in text_of(80, 2).split("\n\n")
    ]
    records[3] = records[40] = '{"txt": "no text"}'
    (folder / "b.jsonl").write_text("\n".join(records), encoding="utf-8")
    (folder / "c.txt.gz").write_bytes(gzip.compress(text_of(70, 3).encode(), mtime=0))
    return sorted(folder.iterdir())


def options(tokenizer: Path) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "held_out": 0.1, "shard_tokens": 700, "skip_bad": True,
            "num_workers": 1, "progress": False}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_any_number_of_workers_writes_the_same_bytes(
    texts: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    units = tmp_path / "units.tsv"
    units.write_text("New York\nsat\n")
    for workers in (1, 2):
        given = options(tokenizer_folder) | {"num_workers": workers, "units": units}
        prepare(texts, tmp_path / str(workers), **given)
    files = contents(tmp_path / "1")
    assert files == contents(tmp_path / "2")
    assert len([name for name in files if name.startswith("train/")]) > 3
    assert Corpus(tmp_path / "1").units(0, 700).size > 0


def test_a_trained_tokenizer_and_the_report(texts: list[Path], tmp_path: Path) -> None:
    report = prepare(texts, tmp_path / "out", tokenizer="train:60", skip_bad=True, held_out=0.1,
                     num_workers=1, progress=False)  # fmt: skip
    train, valid = Corpus(tmp_path / "out"), Corpus(tmp_path / "out", "valid")
    assert train.vocab_size == train.tokenizer.get_vocab_size() == report.vocab_size <= 60
    assert report.documents == {"train": train.num_documents, "valid": valid.num_documents}
    assert sum(report.documents.values()) == 150 + 78 + 70
    assert 10 < valid.num_documents < 60
    assert report.new_tokens == train.num_tokens + valid.num_tokens == sum(report.tokens.values())
    assert report.shards == 2 and report.skipped == 2 and len(report.problems) == 2
    assert "b.jsonl: line 4: no text in field 'text'" in report.problems[0]
    assert 0 < report.tokenizer_seconds < report.seconds and report.tokens_per_s > 0
    for part in (f"train: {train.num_documents} documents", "skipped 2 bad parts", "tokens/s"):
        assert part in str(report)

    again = prepare(texts, tmp_path / "out", tokenizer="train:60", skip_bad=True, held_out=0.1,
                    progress=False)  # fmt: skip
    assert again.new_tokens == 0 and again.tokens == report.tokens
    assert "nothing was done" in str(again) and again.tokens_per_s == 0


def test_bad_input_stops_it_and_the_message_is_the_reader_s(
    texts: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = options(tokenizer_folder) | {"skip_bad": False}
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"b\.jsonl: line 4: no text in field 'text'"):
            prepare(texts, tmp_path / str(workers), **given | {"num_workers": workers})
    with pytest.raises(ValueError, match="this corpus is not finished"):
        Corpus(tmp_path / "1")


def test_held_out_documents_are_chosen_by_their_text() -> None:
    documents = [[f"Document {i}."] for i in range(4000)]
    for part in (0.0, 0.01, 0.25):
        count = sum(is_held_out(document, part) for document in documents)
        assert abs(count - 4000 * part) <= 4 * (4000 * part * (1 - part)) ** 0.5  # 4 sigma
    tenth = {str(d) for d in documents if is_held_out(d, 0.1)}
    assert {str(d) for d in documents if is_held_out(d, 0.05)} < tenth  # nested


def test_a_run_that_stops_at_any_write_goes_on_to_the_same_bytes(
    texts: list[Path], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write to the disk in turn is the one that fails, as on a full disk."""
    given = options(tokenizer_folder)
    prepare(texts, tmp_path / "whole", **given)
    expected = contents(tmp_path / "whole")
    real = atomic.sync
    writes = 0

    def sync(path: Path) -> None:
        nonlocal writes
        if writes == 0:
            writes = -1  # the rest of this run's writes, if any, are none of its concern
            raise OSError(28, "No space left on device")
        writes -= 1
        real(path)

    stops = 0
    for stops in range(100):
        out = tmp_path / f"stopped {stops}"
        writes = stops
        monkeypatch.setattr(atomic, "sync", sync)
        try:
            prepare(texts, out, **given)
            break
        except OSError as error:
            assert error.errno == 28
        finally:
            monkeypatch.setattr(atomic, "sync", real)
        done = sum(r["tokens"] for r in _records(out))
        report = prepare(texts, out, **given)
        assert report.new_tokens == sum(report.tokens.values()) - done
        assert report.skipped == 2
        assert contents(out) == expected
    assert 20 < stops < 99


def _records(out: Path) -> list[dict[str, Any]]:
    if not (out / "corpus.json").exists():
        return []
    splits = read_facts(out)["splits"].values()
    return [record for records in splits for record in records]


_RUN = """
import json, sys
from fastbert.data import prepare
prepare(progress=False, **json.loads(sys.argv[1]))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tokenizer_folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a real process with two workers; they do not outlive it."""
    text = tmp_path / "text.txt"
    text.write_text(text_of(40_000), encoding="utf-8")
    given = {"texts": str(text), "tokenizer": str(tokenizer_folder), "num_workers": 2,
             "shard_tokens": 20_000}  # fmt: skip
    out = tmp_path / "killed"
    command = [sys.executable, "-c", _RUN, json.dumps({**given, "out": str(out)})]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(_records(out)) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    group = os.getpgid(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    facts = read_facts(out)
    assert not facts["complete"], "the run was over before it could be killed"
    done = sum(record["tokens"] for record in _records(out))
    while time.monotonic() < deadline and _lives(group):
        time.sleep(0.01)
    assert not _lives(group)

    report = prepare(out=out, progress=False, **given)
    assert done > 0 and report.new_tokens == sum(report.tokens.values()) - done > 0
    prepare(out=tmp_path / "whole", progress=False, **given | {"num_workers": 1})
    assert contents(out) == contents(tmp_path / "whole")
    Corpus(out).verify()


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_killed_runs_leave_is_swept_away(
    texts: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = options(tokenizer_folder)
    prepare(texts, tmp_path / "out", **given)
    expected = contents(tmp_path / "out")
    for name in ("train/00099.safetensors", "valid/.00001.safetensors.12.tmp",
                 ".corpus.json.12.tmp", "tokenizer/.vocab.txt.12.tmp"):  # fmt: skip
        (tmp_path / "out" / name).write_bytes(b"half")
    (tmp_path / "out/train/notes.txt").write_text("not ours to remove")
    prepare(texts, tmp_path / "out", **given)
    assert contents(tmp_path / "out") == {**expected, "train/notes.txt": b"not ours to remove"}

    (tmp_path / "first write").mkdir()
    (tmp_path / "first write" / ".corpus.json.12.tmp").write_bytes(b"half")
    prepare(texts, tmp_path / "first write", **given)
    assert contents(tmp_path / "first write") == expected


def test_another_input_or_other_options_are_refused(
    texts: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = options(tokenizer_folder)
    out = tmp_path / "out"
    prepare(texts, out, **given)
    before = contents(out)
    for change, key in (
        ({"held_out": 0.2}, "held_out"),
        ({"shard_tokens": 701}, "shard_tokens"),
        ({"sentences": "lines"}, "sentences"),
        ({"tokenizer": "train:40"}, "tokenizer"),
        ({"units": _units(tmp_path)}, "units"),
        ({"skip_bad": False, "text_field": "text"}, "text_field, skip_bad"),
    ):
        with pytest.raises(ValueError, match=rf"differs in {key}\); --overwrite begins anew"):
            prepare(texts, out, **given | change)
    with pytest.raises(ValueError, match="differs in sources"):
        prepare(texts[::-1], out, **given)
    texts[0].write_text(texts[0].read_text(encoding="utf-8").replace("mat", "dog", 1))
    with pytest.raises(ValueError, match="differs in sources"):
        prepare(texts, out, **given)
    assert contents(out) == before

    changed = given | {"shard_tokens": 10_000}
    prepare(texts, out, **changed, overwrite=True)
    prepare(texts, tmp_path / "new", **changed)
    assert contents(out) == contents(tmp_path / "new")
    (out / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        prepare(texts, out, **changed)
    prepare(texts, out, **changed, overwrite=True)
    assert contents(out) == contents(tmp_path / "new")


def test_an_unfinished_corpus_keeps_its_tokenizer(
    texts: list[Path], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = options(tokenizer_folder), tmp_path / "out"

    def stop(arrays: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(shards, "save", stop)
        prepare(texts, out, **given)
    path = out / "tokenizer" / "tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace('"cat"', '"dot"'), encoding="utf-8")
    with pytest.raises(ValueError, match="is not the tokenizer that this corpus was begun with"):
        prepare(texts, out, **given)
    # A corpus begun anew may keep the tokenizer of the one that it takes the place of.
    path.write_text(whole, encoding="utf-8")
    kept = given | {"tokenizer": out / "tokenizer"}
    prepare(texts, out, **kept, overwrite=True)
    assert path.read_text(encoding="utf-8") == whole
    assert Corpus(out).num_tokens > 0


def _units(folder: Path) -> Path:
    (folder / "units.txt").write_text("New York\n")
    return folder / "units.txt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "train:x"}, "tokenizer: got train:x, expected train:N or a folder"),
        ({"tokenizer": "train:3"}, "vocab_size: got 3"),
        ({"tokenizer": "nowhere"}, "nowhere holds no tokenizer"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"num_workers": 0}, "num_workers: got 0"),
        ({"shard_tokens": 0}, "shard_tokens: got 0"),
        ({"sentences": "words"}, "sentences: got 'words'"),
        ({"units": "nowhere.tsv"}, "nowhere.tsv: no such file"),
        ({"held_out": 1 - 2**-53}, "no document is left for training"),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, texts: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(texts, tmp_path / "out", **options(tokenizer_folder) | change)


def test_a_folder_with_something_else_is_left_alone(
    texts: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "full" / "train").mkdir(parents=True)
    (tmp_path / "full" / "train" / "00000.safetensors").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=f"{name}: is no corpus and not empty"):
                prepare(texts, tmp_path / name, **options(tokenizer_folder), overwrite=overwrite)
    assert (tmp_path / "full" / "train" / "00000.safetensors").read_text() == "precious"
