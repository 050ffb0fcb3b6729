"""PretrainingData: a source and objectives as a dataset of prepared examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fastbert.data import Corpus
from fastbert.pretrain.examples import Example, Vocabulary
from fastbert.pretrain.objectives import Objective
from fastbert.pretrain.segment_pairs import SegmentPairs
from fastbert.pretrain.sources import FullSentences, Segments, Source, Streams

SOURCES: dict[str, type[Source]] = {
    source.name: source for source in (SegmentPairs, FullSentences, Segments, Streams)
}
"""By name; each has a ``paper`` and a ``summary``."""


def open_source(
    kind: str,
    corpus: Corpus,
    max_length: int,
    objectives: Sequence[Objective],
    *,
    seed: int = 0,
    duplicates: int = 1,
    **options: Any,
) -> Source:
    """A source with all that the objectives need: columns, counts, and relations between segments.

    kind: a name in SOURCES.  options: ``short``, for those that have it.
    Raises ValueError for an unknown kind, one that makes no pairs where objectives ask for these,
    or for bad options.
    """
    if kind not in SOURCES:
        raise ValueError(f"source: got {kind!r}, expected one of {', '.join(SOURCES)}")
    relations = [objective.relations for objective in objectives if objective.relations]
    if relations and kind != SegmentPairs.name:
        asking = ", ".join(objective.name for objective in objectives if objective.relations)
        raise ValueError(f"source: got {kind}, expected {SegmentPairs.name}, as {asking} needs")
    if relations:
        options["relations"] = relations[0]
    counts = any(objective.counts_tokens for objective in objectives)
    return SOURCES[kind](
        corpus,
        max_length,
        seed=seed,
        duplicates=duplicates,
        columns=frozenset().union(*(objective.columns for objective in objectives)),
        vocabulary=Vocabulary.of(corpus, counts=counts),
        **options,
    )


class PretrainingData(Dataset[Example]):
    """Prepared examples: a map-style dataset for a DataLoader, a Trainer, or any loop.

        data = PretrainingData(source, objectives, seed=1)
        batches = TokenBatches(data.lengths, max_tokens, seed=1)
        loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=4)

    Example i of epoch e is a function of (seed, e, i) and nothing else: it is the same in every
    process, and a run that goes on needs no more than the two numbers. ``set_epoch`` before an
    iterator is made tells the workers; Hugging Face's Trainer calls it.

    seed: of the masks and all else that differs from epoch to epoch.
    static: every epoch is the first, so that masks are BERT's static ones (with ``duplicates`` of
        the source for several of them); else they are dynamic (RoBERTa, arXiv 1907.11692).
    lengths: (E,) int64, in tokens, before the objectives: plm and unilm2 append rows to these, and
        bart takes some away.
    """

    def __init__(
        self, source: Source, objectives: Sequence[Objective], *, seed: int, static: bool = False
    ) -> None:
        self.source = source
        self.objectives = tuple(objectives)
        self.seed = seed
        self.static = static
        self.epoch = 0

    @property
    def lengths(self) -> np.ndarray:
        return self.source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Example:
        """Raises IndexError for an index outside of 0 .. E - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is not among the {len(self)}")
        epoch = 0 if self.static else self.epoch
        rng = np.random.default_rng((self.seed, epoch, int(index)))
        example = self.source.example(int(index), rng)
        for objective in self.objectives:
            example = objective.prepare(example, self.source.vocabulary, rng)
        return example
