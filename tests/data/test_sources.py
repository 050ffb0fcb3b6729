"""Documents out of every format, and what is said of bad ones."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from fastbert.data import read_documents
from fastbert.data.files import Problems
from fastbert.data.sources import find_sources

Compress = Callable[[bytes], bytes]

COMPRESSIONS: dict[str, Compress] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
DOCUMENTS = [["One.", "Two.", "Three"], ["Four é 猫."]]
TEXT = "\n\nOne. Two.\nThree\n \n\nFour é 猫.\n".encode()
JSON_LINES = b'{"text": "One. Two.\\nThree"}\n\n{"id": 2, "text": "Four \\u00e9 \xe7\x8c\xab."}\n'


def parquet(path: Path, **columns: Any) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.read_bytes()


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, bytes]:
    """Suffix -> a file that holds DOCUMENTS."""
    table = parquet(tmp_path / "made", id=[1, 2, 3], text=["One. Two.\nThree", " ", "Four é 猫."])
    return {".txt": TEXT, ".jsonl": JSON_LINES, ".parquet": table}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_formats(suffix: str, compression: str, contents: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}{compression}"
    path.write_bytes(COMPRESSIONS[compression](contents[suffix]))
    assert list(read_documents(path)) == DOCUMENTS
    lines = [["One. Two.", "Three"], ["Four é 猫."]]
    assert list(read_documents(path, sentences="lines")) == lines


def test_text_as_other_systems_write_it(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace(b"\n", b"\r\n"))
    assert list(read_documents(path)) == DOCUMENTS


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_members_of_a_compressed_file_follow_each_other(compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"two.txt{compression}"
    compress = COMPRESSIONS[compression]
    path.write_bytes(compress(TEXT[:20]) + compress(b"") + compress(TEXT[20:]) + bytes(600))
    assert list(read_documents(path)) == DOCUMENTS


WIKITEXT = """\
 \n = Cats = \n \n A cat @-@ like animal . It sits . \n = Games ; TOI = \n W = wins \n \n\
 = = Mats = = \n \n Mats , too . \n \n = Dogs = = \n \n = Dogs : a = b = \n \n A dog . \n\
 = Birds = \n"""


def test_wikitext(tmp_path: Path) -> None:
    """Level one begins a document; what only looks like a heading does not."""
    path = tmp_path / "wiki.txt"
    path.write_text(WIKITEXT, encoding="utf-8")
    assert list(read_documents(path)) == [
        ["Cats", "A cat-like animal.", "It sits.", "= Games; TOI =", "W = wins", "Mats",
         "Mats, too.", "= Dogs = ="],
        ["Dogs: a = b", "A dog.", "= Birds ="],
    ]  # fmt: skip


def test_blank_lines_are_no_ends_in_wikitext_only(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text(" = = Level two = = \n\n = Title = \n\nText.\n", encoding="utf-8")
    assert list(read_documents(path)) == [["= = Level two = ="], ["= Title ="], ["Text."]]


def test_folders_patterns_and_lists(contents: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "in [1]"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "deep/c.parquet", "ignored.csv"):
        (folder / name).write_bytes(contents.get(Path(name).suffix, b"?"))
    names = [Path(source.name).name for source in find_sources(folder)]
    assert names == ["a.jsonl", "b.txt", "c.parquet"]
    pattern = str(tmp_path / "in*" / "[ab].*")
    assert [Path(s.name).name for s in find_sources(pattern)] == ["a.jsonl", "b.txt"]
    twice = find_sources([folder / "b.txt", str(folder / "a.jsonl"), folder / "b.txt"])
    assert [Path(s.name).name for s in twice] == ["b.txt", "a.jsonl", "b.txt"]


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is loaded as a name on the hub is; nothing is downloaded."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    records = [{"body": "One. Two.\nThree", "n": 1}, {"body": "Four é 猫.", "n": 2}]
    for split in ("train", "test"):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        records.pop()
    assert list(read_documents(f"datasets:{folder}")) == DOCUMENTS
    assert list(read_documents(f"datasets:{folder}:test:body")) == DOCUMENTS[:1]
    assert list(read_documents(f"datasets:{folder}@default:train[1:]:body")) == DOCUMENTS[1:]
    (source,) = find_sources(f"datasets:{folder}:train")
    told: list[int] = []
    (again,) = find_sources(f"datasets:{folder}:train")
    assert source.sha256(told.append) == again.sha256() and sum(told) == source.size > 0
    for spec, message in (
        (f"datasets:{folder}:train:n", "no text in column 'n'; its columns are body, n"),
        (f"datasets:{folder}:nothing", "nothing"),
        ("datasets:", "NAME"),
        (f"datasets:{tmp_path / 'missing'}", "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            find_sources(spec)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


LONG = b"".join(b"Line %d of many.\n\n" % i for i in range(20_000))

# name of the file, its content, the error, and the documents without what is bad
BAD: dict[str, tuple[str, bytes, str, list[str] | None]] = {
    "not UTF-8": ("a.txt", b"good\n\nb\xffd\n\nfine\n", "line 3 is not UTF-8", ["good", "fine"]),
    "empty": ("a.txt", b"", "holds no text", []),
    "blank": ("a.txt", b" \n\n", "holds no text", []),
    "empty gz": ("a.txt.gz", b"", "holds no text", []),
    "cut gz": ("a.txt.gz", cut(gzip.compress(LONG)), "cut short", None),
    "cut zst": ("a.txt.zst", cut(COMPRESSIONS[".zst"](LONG)), "cut short", None),
    "no gz": ("a.txt.gz", b"plain text\n", "after line 0: .* damaged", []),
    "no zst": ("a.txt.zst", b"plain text\n", "after line 0: .* damaged", []),
    "damaged gz": ("a.txt.gz", gzip.compress(b"good\n")[:-8] + bytes(8), "damaged", []),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"te', "line 3 is not JSON", ["a"]),
    "no object": ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: got list", ["a"]),
    "no field": (
        "a.jsonl", b'{"text": "a"}\n{"txt": "b", "n": 1}\n',
        "line 2: no text in field 'text'; its fields are txt, n", ["a"],
    ),
    "no text": ("a.jsonl", b'{"text": null}\n{"text": "a"}\n', "line 1: no text in field", ["a"]),
    "many fields": (
        "a.jsonl", b'{"a": "x", "b": "y"}\n', "no text in field 'text'; its fields are a, b", []
    ),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n{"text": "a"}', "line 1: .* surrogate", ["a"]),
    "no parquet": ("a.parquet", b"PAR1 or not", "a.parquet: ", []),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path) -> None:
    name, data, message, kept = BAD[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_documents(path))
    assert str(path) in str(caught.value)

    problems = Problems(skip=True)
    (source,) = find_sources(path)
    found = [document.lines for document in source.documents(problems)]
    assert problems.count == 1 and problems.examples == [str(caught.value)]
    if kept is None:  # a part of LONG
        lines = [line for document in found for line in document]
        assert lines[:2] == ["Line 0 of many.", "Line 1 of many."] and len(lines) < 20_000
    else:
        assert found == [[text] for text in kept]


def test_a_null_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, text=["a", None, "b"])
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: got NoneType, expected a text"):
        list(read_documents(path))
    assert list(read_documents(path, skip_bad=True)) == [["a"], ["b"]]


def test_the_field_of_the_text(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text('{"body": "Five.", "id": 1}\n{"body": "Six.", "id": 2}\n', encoding="utf-8")
    parquet(table, id=[1, 2], body=["Five.", "Six."], title=["x", "y"])
    assert list(read_documents(lines)) == [["Five."], ["Six."]]  # the only text there is
    assert list(read_documents([lines, table], text_field="body")) == [["Five."], ["Six."]] * 2
    with pytest.raises(ValueError, match="no text in column 'text'; its columns are id, body"):
        list(read_documents(table))
    with pytest.raises(ValueError, match="no text in field 'title'; its fields are body, id"):
        list(read_documents(lines, text_field="title"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "no such file"),
        ("table.csv", r"expected file in \.txt, \.jsonl, \.parquet"),
        ("no*.txt", "no file matches"),
        ("empty", "holds no file in"),
    ],
)
def test_what_is_no_source(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_sources(str(tmp_path / name))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="texts: got none"):
        list(read_documents([]))
    with pytest.raises(ValueError, match="sentences: got 'words', expected one of auto, lines"):
        list(read_documents("a.txt", sentences="words"))


@pytest.mark.parametrize(
    ("name", "library"),
    [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow"), ("datasets:x", "datasets")],
)
def test_a_missing_library_is_named(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(b"?")
    given = name if name.startswith("datasets") else tmp_path / name
    message = rf'needs {library}: pip install "fastbert\[data\]"'
    with pytest.raises(ModuleNotFoundError, match=message):
        list(read_documents(given))


def test_progress_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(LONG))
    (source,) = find_sources(path)
    told: list[int] = []
    source.sha256(told.append)
    assert sum(told) == source.size == path.stat().st_size
    positions = [source.position() for _ in source.documents(Problems(skip=False))]
    assert positions == sorted(positions) and 0 < positions[-1] <= source.size
