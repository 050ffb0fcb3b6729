"""read_table: every format, and everything that can be wrong with a file, named by its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastbert.finetune.reading import BadRows, Table, read_table

ROWS = {"text": ["One, two", 'He said "hi"', "Zwei\nZeilen é"], "label": ["a", "b", "a"]}
CSV = 'text,label\n"One, two",a\n"He said ""hi""",b\n\n"Zwei\nZeilen é",a\n'
RECORDS = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]
CONLL = """-DOCSTART- -X- O

EU NNP B-ORG
rejects VBZ O

Peter NNP B-PER
"""
CONLLU = """# text = It's Al
1-2\tIt's\t_\t_\t_\t_\t_\t_\t_\t_
1\tIt\tit\tPRON\tPRP\t_\t2\tnsubj\t_\t_
2\t's\tbe\tAUX\tVBZ\t_\t0\troot\t_\t_
2.1\tnot\tnot\tPART\tRB\t_\t_\t_\t_\t_
3\tAl B.\tAl\tPROPN\tNNP\t_\t2\tdep\t_\t_

# text = Go
1\tGo\tgo\tVERB\tVB\t_\t0\troot\t_\t_
"""
SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "308 points",
                    "qas": [
                        {
                            "id": "x",
                            "question": "How many?",
                            "answers": [{"text": "308", "answer_start": 0}],
                        },
                        {"id": "y", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.csv", CSV, [2, 3, 5]),
        ("a.csv.gz", CSV, [2, 3, 5]),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n"), [2, 3, 5]),
        ("a.csv", CSV.replace(",", ";").replace("One;", "One,"), [2, 3, 5]),
        ("a.jsonl", "\n".join(map(json.dumps, RECORDS)), [1, 2, 3]),
        ("a.json", json.dumps(RECORDS), [1, 2, 3]),
        ("a.json.gz", json.dumps({"data": RECORDS}), [1, 2, 3]),
    ],
)
def test_formats_give_the_same_rows(
    name: str, content: str, numbers: list[int], tmp_path: Path
) -> None:
    table = read_table(write(tmp_path, name, content))
    assert table.columns == ROWS
    assert table.numbers.tolist() == numbers
    assert table.at(2).startswith(f"{tmp_path / name}, ")
    assert table.at(2).endswith(f" {numbers[2]}")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {**ROWS, "tokens": [["a", "b"], [], None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert table.columns == columns
    assert table.at(1) == f"{tmp_path / 'a.parquet'}, row 2"


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'id\ttext\n7\t"Stray, quote\n8\tsay "it"\n')
    assert read_table(path).columns == {"id": ["7", "8"], "text": ['"Stray, quote', 'say "it"']}
    path = write(tmp_path, "a.txt", "pair_ID\tsentence_A\n1\tx\n")
    assert read_table(path).columns == {"pair_ID": ["1"], "sentence_A": ["x"]}
    path = write(tmp_path, "b.txt", "one, two\n\nthree\n")
    assert read_table(path).columns == {"text": ["one, two", "three"]}


@pytest.mark.parametrize(
    ("content", "names", "rows"),
    [
        ("a fine film,1\na bad one,0\n", ["column1", "column2"], 2),  # a number is no name
        ("pos,I liked it\nneg,not I\npos,yes\n", ["column1", "column2"], 3),  # a label comes again
        (f"label,{'very ' * 20}long\nb,short\n", ["column1", "column2"], 2),
        (",label,text\n0,a,x\n", ["unnamed1", "label", "text"], 1),  # as pandas writes an index
        ("label,text\na,label\n", ["label", "text"], 1),
    ],
)
def test_header(content: str, names: list[str], rows: int, tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", content))
    assert list(table.columns) == names
    assert len(table) == rows


def test_a_long_field_and_the_callers_limit(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", f'text,label\n"{"word " * 40_000}",a\n')
    assert len(read_table(path).columns["text"][0]) == 200_000
    assert csv.field_size_limit() == before


def test_conll(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.conll", CONLL))
    assert table.columns == {
        "tokens": [["EU", "rejects"], ["Peter"]],
        "column2": [["NNP", "VBZ"], ["NNP"]],
        "tags": [["B-ORG", "O"], ["B-PER"]],
    }
    assert table.numbers.tolist() == [3, 6]


@pytest.mark.parametrize("name", ["a.conllu", "a.conll", "a.conllu.gz"])
def test_conllu(name: str, tmp_path: Path) -> None:
    table = read_table(write(tmp_path, name, CONLLU))
    assert table.columns["tokens"] == [["It", "'s", "Al B."], ["Go"]]
    assert table.columns["upos"] == [["PRON", "AUX", "PROPN"], ["VERB"]]
    assert table.numbers.tolist() == [3, 9]


def test_squad(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.json", json.dumps(SQUAD)))
    assert table.columns == {
        "id": ["x", "y"],
        "title": ["T", "T"],
        "question": ["How many?", "Who?"],
        "context": ["308 points"] * 2,
        "answers": [{"text": ["308"], "answer_start": [0]}, {"text": [], "answer_start": []}],
    }
    assert table.at(1).endswith("a.json, question 2")


def test_a_field_that_a_record_lacks_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "x"}\n{"label": 1, "text": "y"}\n{}\n')
    assert read_table(path).columns == {"text": ["x", "y", None], "label": [None, 1, None]}


# name of the file, its content, the error, and the rows that are left where it is skipped
BAD: dict[str, tuple[str, str | bytes, str, int]] = {
    "more fields": ("a.csv", "t,l\nx,a\ny,b,c\n", "line 3: ragged row: got 3 fields, expe", 1),
    "fewer fields": ("a.csv", "t,l\nx\ny,b\n", "line 2: ragged row: got 1 fields, expected 2", 1),
    "ragged tsv": ("a.tsv", "t\tl\nx\ta\ty\nz\ta\n", "line 2: ragged row", 1),
    "open quote": ("a.csv", 't,l\nx,a\n"y,b\nz,c\n', "line 3: not CSV: unexpected end", 1),
    "stray quote": ("a.csv", 't,l\n"y"z,b\nz,c\n', "line 2: not CSV: ',' expected after", 1),
    "after two lines": ("a.csv", 't,l\n"x\ny",a\nz\nv,w\n', "line 4: ragged row", 2),
    "Latin-1": ("a.csv", b"t,l\nx,a\ncaf\xe9,b\n", "line 3 is not UTF-8", 1),
    "UTF-16": ("a.csv", "t,l\nx,a\n".encode("utf-16"), "line 1 is not UTF-8", 0),
    "header again": ("a.csv", "t,l\nx,a\nt,l\ny,b\n", "line 3: the header again", 2),
    "no JSON": ("a.jsonl", '{"t": "x"}\n\n{"t": \n', "line 3: not JSON", 1),
    "a list": ("a.jsonl", '{"t": "x"}\n["y"]\n', "line 2: not a JSON object: got list", 1),
    "record": ("a.json", '[{"t": "x"}, 7]', "record 2: not a JSON object: got int", 1),
    "tags": ("a.conll", "x A\ny\nz B\n\nv C\n", "line 2: ragged row: got 1 fields, expected 2", 1),
    "CoNLL-U": ("a.conllu", CONLLU.replace("Go\tgo\t", "Go\t"), "line 9: .* got 9 fields", 1),
    "empty row": ("a.tsv", "t\tl\nx\ta\n\t\t\n", "line 3: ragged row", 1),
    "article": (
        "a.json",
        json.dumps({"data": [{"paragraphs": [{"context": "x"}]}, *SQUAD["data"]]}),
        "article 1: not in SQuAD's format: KeyError: 'qas'",
        2,
    ),
    "answer": (
        "a.json",
        json.dumps(SQUAD).replace('"answer_start": 0', '"start": 0'),
        "question 1: not in SQuAD's format: KeyError: 'answer_start'",
        1,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_or_counted(case: str, tmp_path: Path) -> None:
    name, content, message, left = BAD[case]
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=f"{name}[,:] .*{message}"):
        read_table(path)
    bad = BadRows(skip=True)
    if left:
        assert len(read_table(path, bad=bad)) == left
    else:
        with pytest.raises(ValueError, match="holds no rows"):
            read_table(path, bad=bad)
    assert bad.count >= 1
    assert sum(bad.by_reason.values()) == bad.count
    assert name in bad.examples[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label,text\nx,a,y\n", "line 1: two columns are called text"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.json", '[{"t": 1},\n{"t" 2}]', "line 2: not JSON"),
        ("a.json", "7", "got int, expected a list of objects"),
        ("a.json", b'["\xff"]', "a.json: 'utf-8' codec"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: "),
        ("a.xlsx", "", "got the format 'xlsx', expected one of csv, tsv"),
        ("a", "", "got the format ''"),
    ],
)
def test_bad_files_are_errors_even_if_rows_are_skipped(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_table(path, bad=BadRows(skip=True))


def test_cut_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(("text,label\n" + "x,a\n" * 50_000).encode())[:-20])
    with pytest.raises(ValueError, match=r"a\.csv\.gz.*cut short"):
        read_table(path)
    path.write_bytes(b"text,label\nx,a\n")
    with pytest.raises(ValueError, match=r"a\.csv\.gz.*damaged"):
        read_table(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.csv: no such file"):
        read_table(tmp_path / "missing.csv")


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is loaded as a name on the hub is; classes come by their names."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    classes = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": classes,
            "tags": datasets.List(classes),
        }
    )
    values: dict[str, Any] = {"text": ["x", "y"], "label": [1, -1], "tags": [[0, 1], []]}
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict(values, features=features).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_dict(
        {name: value[:1] for name, value in values.items()}, features=features
    ).to_parquet(folder / "test.parquet")
    table = read_table(f"datasets:{folder}")
    assert table.columns == {
        "text": ["x", "y"],
        "label": ["pos", None],
        "tags": [["neg", "pos"], []],
    }
    assert table.at(1) == f"datasets:{folder}, row 2"
    assert len(read_table(f"datasets:{folder}", split="test")) == 1
    assert len(read_table(f"datasets:{folder}@default:train[1:]")) == 1
    for spec, message in (("datasets:", "NAME"), (f"datasets:{folder}:nothing", "nothing")):
        with pytest.raises(ValueError, match=message):
            read_table(spec)


# --- Table and BadRows ------------------------------------------------------------------------


def test_rows_keep_their_numbers() -> None:
    table = Table.of("t", x=[5, 6, 7]).rows([2, 0])
    assert table.columns == {"x": [7, 5]}
    assert table.at(0) == "t, row 3"
    with pytest.raises(ValueError, match=r"columns: got lengths \{'y': 1\}, expected 2"):
        Table.of("t", x=[1, 2], y=[1])


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match="^a.csv, line 3: no label: got None$"):
        BadRows().report("a.csv, line 3", "no label", "got None")
    bad = BadRows(skip=True)
    for line in range(5):
        bad.report(f"a.csv, line {line}", "no label" if line else "empty text")
    assert bad.count == 5
    assert bad.by_reason == {"no label": 4, "empty text": 1}
    assert bad.examples[0] == "a.csv, line 0: empty text"
    assert len(bad.examples) == 3
