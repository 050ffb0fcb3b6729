"""What quantising costs on real tasks: ``python bench/accuracy.py [--out FILE] [--data FOLDER]``.

all-MiniLM-L6-v2 in fp32 beside ``fastbert.quantize``'s schemes: similarity of news texts against
people's ratings, TREC-6 with a head and an encoder that are trained here first, paraphrases out of
Tatoeba, and the cosine of sentence vectors to those of the float model. "int8-static" is calibrated
on other texts of the same task. The data is downloaded once (bench/accuracy_data.py). The exit
status is 1 where the default scheme misses a bar.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import accuracy_data as data  # noqa: E402
from accuracy_data import Questions  # noqa: E402
from timing import machine, write  # noqa: E402

import fastbert  # noqa: E402
from fastbert import PackedBatch  # noqa: E402
from fastbert.compress import SCHEMES  # noqa: E402
from fastbert.compress.source import text_settings, tokenizer_json  # noqa: E402

Array = np.ndarray
Scores = dict[str, float]

DEFAULT = "int8-dynamic"
_CALIBRATION = 256  # texts
_BATCH_TOKENS = 4096


# --- tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What is asked of a scheme.

    text: as a reader sees it.  holds: (its scores, the float model's) -> whether they will do.
    """

    text: str
    holds: Callable[[Scores, Scores], bool]


@dataclass(frozen=True)
class SentenceTask:
    """What is computed from sentence vectors alone.

    calibration: texts like those that count, and none of them.
    score: ((n, H) unit vectors of the texts, those of the float model) -> scores.
    """

    name: str
    texts: list[str]
    calibration: list[str]
    score: Callable[[Array, Array], Scores]
    bar: Bar


def lee_task(folder: Path) -> SentenceTask:
    """Pearson's correlation of all pairs' cosines with the mean rating of people."""
    texts, ratings, others = data.lee(folder)
    pairs = np.triu_indices(len(texts), 1)

    def score(x: Array, _: Array) -> Scores:
        return {"pearson": float(np.corrcoef((x @ x.T)[pairs], ratings[pairs])[0, 1])}

    bar = Bar("≥ 0.650", lambda scores, _: scores["pearson"] >= 0.650)
    return SentenceTask("document similarity", texts, others[:_CALIBRATION], score, bar)


def paraphrase_task(folder: Path, count: int = 5000) -> SentenceTask:
    """How well the cosine tells pairs that share a translation from pairs at random."""
    pairs = data.paraphrases(folder, count + _CALIBRATION)
    used = len(pairs.first) - _CALIBRATION
    texts = [*pairs.first[:used], *pairs.second[:used], *pairs.other[:used]]

    def score(x: Array, _: Array) -> Scores:
        first, second, other = np.split(x, 3)
        return {"auc": auc((first * second).sum(1), (first * other).sum(1))}

    bar = Bar("within 0.002", lambda scores, exact: abs(scores["auc"] - exact["auc"]) <= 0.002)
    return SentenceTask("paraphrases", texts, pairs.first[used:], score, bar)


def vector_task(count: int = 1000) -> SentenceTask:
    """The cosine of each sentence's vector to the float model's."""
    from fastbert.demo import documentation_texts

    # As in bench/cpu_peers.py: sentences and short paragraphs of Python's documentation.
    texts = [text for text in documentation_texts(4 * count) if len(text.split()) <= 40]

    def score(x: Array, exact: Array) -> Scores:
        cosines = (x * exact).sum(1)
        return {"worst": float(cosines.min()), "mean": float(cosines.mean())}

    bar = Bar("worst ≥ 0.998", lambda scores, _: scores["worst"] >= 0.998)
    others = texts[count : count + _CALIBRATION]
    return SentenceTask("cosine to fp32", texts[:count], others, score, bar)


def auc(positive: Array, negative: Array) -> float:
    """P(a positive score > a negative one) + P(equal) / 2: the area under the ROC curve."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    not_above = np.searchsorted(ordered, positive, "right")
    return float((below + not_above).mean() / (2 * len(ordered)))


# --- models -------------------------------------------------------------------------------------


class Reader:
    """Texts to packed batches, by the tokenizer of a checkpoint's folder."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer_json(None, folder))
        self.tokenizer.no_padding()
        positions = fastbert.BertConfig.from_json(folder / "config.json").max_position_embeddings
        self.tokenizer.enable_truncation(text_settings(folder, positions)["max_length"])

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def batches(self, texts: list[str]) -> Iterator[PackedBatch]:
        """All texts in order, about ``_BATCH_TOKENS`` tokens at a time."""
        group: list[list[int]] = []
        for ids in self.ids(texts):
            group.append(ids)
            if sum(map(len, group)) >= _BATCH_TOKENS:
                yield PackedBatch.from_sequences(group)
                group = []
        if group:
            yield PackedBatch.from_sequences(group)


@torch.no_grad()
def vectors(model: Any, texts: list[str], reader: Reader) -> Array:
    """(n, H): the mean of each text's tokens, of length 1, in fp64."""
    found = []
    for batch in reader.batches(texts):
        states = model(batch=batch).last_hidden_state.double()
        found += [part.mean(0) for part in states.split(batch.lengths)]
    return torch.nn.functional.normalize(torch.stack(found)).numpy()


@torch.no_grad()
def classes(model: Any, texts: list[str], reader: Reader) -> Array:
    """(n,): the class of each text."""
    found = [model(batch=batch).logits.argmax(1) for batch in reader.batches(texts)]
    return torch.cat(found).numpy()


def quantised(model: Any, scheme: str, calibration: list[str]) -> Any:
    """``model`` as a user gets it who gives data only where it must be given."""
    return fastbert.quantize(
        model, scheme, calibration=calibration if scheme == "int8-static" else None
    )


def fine_tuned(
    folder: Path,
    questions: Questions,
    reader: Reader,
    *,
    epochs: int = 2,
    batch_size: int = 32,
    lr: float = 1e-4,
) -> Any:
    """The checkpoint with a new head, all of it trained by AdamW: a tenth of warm-up, then linearly
    to 0; dropout and weight decay as usual, gradients clipped to norm 1."""
    torch.manual_seed(0)
    model = fastbert.BertForSequenceClassification.from_pretrained(
        folder, num_labels=max(questions.labels) + 1
    ).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    ids, labels = reader.ids(questions.texts), torch.tensor(questions.labels)
    steps = epochs * -(-len(ids) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps, pct_start=0.1, anneal_strategy="linear",
        cycle_momentum=False,
    )  # fmt: skip
    for _ in range(epochs):
        for chosen in torch.randperm(len(ids)).split(batch_size):
            batch = PackedBatch.from_sequences([ids[i] for i in chosen])
            model(batch=batch, labels=labels[chosen]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return model.eval()


# --- measuring ----------------------------------------------------------------------------------


def measure_sentences(task: SentenceTask, model: Any, reader: Reader) -> dict[str, Any]:
    """One result row: the task's scores of the float model and of every scheme."""
    exact = vectors(model, task.texts, reader)
    scores = {"float": task.score(exact, exact)}
    for scheme in SCHEMES:
        found = vectors(quantised(model, scheme, task.calibration), task.texts, reader)
        scores[scheme] = task.score(found, exact)
    return _row(task.name, len(task.texts), task.bar, scores)


def measure_questions(
    train: Questions, test: Questions, folder: Path, reader: Reader
) -> dict[str, Any]:
    """One result row: percent of ``test`` in the right class, and of the classes that agree with
    the float model's, after fine-tuning on ``train``."""
    model = fine_tuned(folder, train, reader)
    exact = classes(model, test.texts, reader)
    found = {"float": exact}
    for scheme in SCHEMES:
        found[scheme] = classes(
            quantised(model, scheme, train.texts[:_CALIBRATION]), test.texts, reader
        )
    scores = {
        scheme: {
            "accuracy": float(100 * (labels == test.labels).mean()),
            "agreement": float(100 * (labels == exact).mean()),
        }
        for scheme, labels in found.items()
    }
    bar = Bar(
        "loses ≤ 0.5 points", lambda scores, exact: exact["accuracy"] - scores["accuracy"] <= 0.5
    )
    return _row("TREC-6", len(test.texts), bar, scores)


def _row(name: str, count: int, bar: Bar, scores: dict[str, Scores]) -> dict[str, Any]:
    holds = {scheme: bar.holds(scores[scheme], scores["float"]) for scheme in SCHEMES}
    return {"task": name, "texts": count, "bar": bar.text, "scores": scores, "holds": holds}


def _print(row: dict[str, Any]) -> None:
    print(f"{row['task']}, {row['texts']:,} texts, bar: {row['bar']}")
    for scheme, scores in row["scores"].items():
        text = ", ".join(f"{name} {score:.5f}" for name, score in scores.items())
        print(f"  {scheme:<14}{text}{'' if row['holds'].get(scheme, True) else '  misses the bar'}")
    sys.stdout.flush()


def main() -> int:
    from fastbert.demo import checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    results = Path(__file__).parent / "results"
    cache = Path.home() / ".cache" / "fastbert"
    parser.add_argument("--out", type=Path, default=results / "accuracy_cpu.json")
    parser.add_argument(
        "--data", type=Path, default=cache, help="keeps the data; default: %(default)s"
    )
    args = parser.parse_args()
    try:
        folder = checkpoint()
        data.fetch(args.data)
    except (ModuleNotFoundError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    reader = Reader(folder)
    model = fastbert.BertModel.from_pretrained(folder)
    rows = []
    for task in (lee_task(args.data), paraphrase_task(args.data), vector_task()):
        rows.append(measure_sentences(task, model, reader))
        _print(rows[-1])
    rows.append(measure_questions(*data.trec(args.data), folder, reader))
    _print(rows[-1])
    files = {name: member.wheel for name, member in data.FILES.items()}
    write(args.out, {"rows": rows, "machine": machine(), "data": files})
    print(f"wrote {args.out}")
    return int(not all(row["holds"][DEFAULT] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
