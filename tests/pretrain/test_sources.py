"""Sources against corpora whose every cut is known, and properties on real text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastbert.data import Corpus
from fastbert.pretrain import Example, PretrainingData, Source, open_source, parse
from fastbert.pretrain.data import SOURCES
from fastbert.pretrain.pieces import Pieces, chain
from fastbert.pretrain.segment_pairs import SegmentPairs, kept_tokens
from fastbert.pretrain.sources import FullSentences, Segments, Streams, random_rooms

from ._samples import CLS, NONE, SEP, write_corpus

# Words a .. t have the ids 5 .. 24. Documents of sentences of 1 to 4 words.
DOCUMENTS = [["a b", "c d e", "f"], ["g h i j", "k l"], ["m"], ["n o", "p q", "r s", "t"]]
A = 5


@pytest.fixture
def corpus(corpus_folder: Path) -> Corpus:
    return write_corpus(corpus_folder, DOCUMENTS)


def ids(text: str) -> list[int]:
    special = {"[": CLS, "|": SEP}
    return [special.get(c, A + ord(c) - ord("a")) for c in text]


def make(source: Source, seed: int = 0) -> list[Example]:
    return [source.example(i, np.random.default_rng((seed, i))) for i in range(len(source))]


def test_full_sentences(corpus: Corpus) -> None:
    """Whole sentences over the ends of documents, at each of which a [SEP] takes room."""
    source = FullSentences(corpus, 10)
    found = make(source)
    assert [example.ids.tolist() for example in found] == [
        ids("[abcdef|"),  # a [SEP] and ghij would be 11 in all
        ids("[ghijkl|m|"),
        ids("[nopqrst|"),
    ]
    assert source.lengths.tolist() == [8, 10, 9]
    assert found[1].sentence.tolist() == [-1, 0, 0, 0, 0, 1, 1, -1, 2, -1]
    assert not any(example.token_type_ids.any() for example in found)


def test_segments(corpus: Corpus) -> None:
    """Whole sentences of one document."""
    source = Segments(corpus, 8, short=0.0)
    assert [example.ids.tolist() for example in make(source)] == [
        ids("[abcdef|"),
        ids("[ghijkl|"),
        ids("[m|"),
        ids("[nopqrs|"),
        ids("[t|"),
    ]
    assert source.lengths.tolist() == [8, 8, 3, 8, 3]


def test_streams(corpus: Corpus) -> None:
    """Every sentence ends with [SEP], wherever sequences are cut."""
    stream = "ab|cde|f|ghij|kl|m|no|pq|rs|t|"
    source = Streams(corpus, 8)
    found = make(source)
    assert [example.ids.tolist() for example in found] == [
        ids("[" + stream[i : i + 7]) for i in range(0, len(stream), 7)
    ]
    assert source.lengths.tolist() == [8, 8, 8, 8, 3]
    assert found[1].sentence.tolist() == [-1, 0, -1, 1, 1, 1, 1, -1]
    assert found[3].sentence.tolist() == [-1, -1, 0, 0, -1, 1, 1, -1]  # begins with a [SEP]


def test_long_sentences_are_cut_into_equal_pieces(corpus_folder: Path) -> None:
    words = "abcdefghijklm"
    corpus = write_corpus(corpus_folder, [[" ".join(words)]])
    pieces = Pieces(corpus, 6)
    assert pieces.starts.tolist() == [0, 4, 8, 13]
    assert [e.ids.tolist() for e in make(Segments(corpus, 8, short=0.0))] == [
        ids("[abcd|"), ids("[efgh|"), ids("[ijklm|")
    ]  # fmt: skip
    assert make(Streams(corpus, 8))[1].ids.tolist() == ids("[hijklm|")  # a stream cuts no sentence


def test_chain_follows_every_step() -> None:
    following = np.arange(1, 3_000_001) + (np.arange(3_000_000) % 2 == 0)
    assert np.array_equal(chain(following), np.arange(0, 3_000_000, 2))
    assert chain(np.zeros(0, np.int64)).tolist() == []


def test_pairs_are_the_segments_that_they_say(documentation: Corpus) -> None:
    """A and B are found in the corpus again; B stands to A as the relation says."""
    relations = ("next", "previous", "same", "other")
    source = SegmentPairs(documentation, 100_000, relations=relations, short=0.0)
    # With so much room a chunk is a whole document, and nothing is cut.
    starts, documents = source.pieces.starts, source.pieces.document_starts
    seen = Counter()
    for i, example in enumerate(make(source)):
        a, a_end, b, b_end, relation = source._rows[i].tolist()
        kind = relations[relation]
        seen[kind] += 1
        separators = np.flatnonzero(example.ids == SEP)
        assert example.ids[0] == CLS and separators[-1] == len(example) - 1
        first = example.ids[1 : separators[0]]
        second = example.ids[separators[0] + 1 : -1]
        assert example.token_type_ids.tolist() == (
            [0] * (separators[0] + 1) + [1] * (len(second) + 1)
        )
        if kind == "previous":
            first, second = second, first
        assert np.array_equal(first, documentation.tokens(a, a_end))
        assert np.array_equal(second, documentation.tokens(b, b_end))
        assert {a, a_end, b, b_end} <= set(starts.tolist())
        own = np.searchsorted(documents, (a, b), side="right")
        if kind in ("next", "previous"):
            assert b == a_end
        elif kind == "same":
            assert own[0] == own[1] and (b > a_end or b_end < a)
        else:
            assert own[0] != own[1]
    assert set(seen) == set(relations)


def test_relations_are_drawn_evenly(documentation: Corpus) -> None:
    """But for chunks of one sentence, which have to become ``other``."""
    for relations in (("next", "other"), ("next", "previous", "other")):
        source = SegmentPairs(documentation, 256, relations=relations, duplicates=10, short=0.0)
        first, relation = source._rows[:, 0], source._rows[:, 4]
        single = _sentences(source, first) == 1
        assert single.any() and (relation[single] == relations.index("other")).all()
        count, p = np.sum(~single), 1 / len(relations)
        drawn = np.bincount(relation[~single])
        assert abs(drawn - count * p).max() < 4 * np.sqrt(count * p * (1 - p))


def _sentences(source: SegmentPairs, first: np.ndarray) -> np.ndarray:
    """How many sentences a chunk of full length from each first token on has."""
    pieces = source.pieces
    piece = np.searchsorted(pieces.starts, first)
    end = np.searchsorted(pieces.starts, first + source.room)
    return np.minimum(end, pieces.document_end[piece]) - piece


def test_what_was_not_used_comes_again(corpus_folder: Path) -> None:
    """After a random B the next chunk begins behind A; nothing of the corpus is lost."""
    words = [[f"{c}{i}" for i in range(9)] for c in "abc"]
    corpus = write_corpus(corpus_folder, words)
    source = SegmentPairs(corpus, 9, duplicates=40, short=0.0)
    for plan in np.split(source._rows, np.flatnonzero(source._rows[:, 0] == 0)[1:]):
        ends = np.where(plan[:, 4] == 0, plan[:, 3], plan[:, 1])  # of B if it was the next
        assert plan[1:, 0].tolist() == ends[:-1].tolist() and ends[-1] == corpus.num_tokens


def test_split_is_uniform(corpus_folder: Path) -> None:
    corpus = write_corpus(corpus_folder, [["a", "b", "c", "d", "e"], ["f", "g"]])
    source = SegmentPairs(corpus, 8, duplicates=4000, relations=("next", "other"), short=0.0)
    first = source._rows[source._rows[:, 0] == 0]  # chunks of five sentences, one token each
    counts = np.bincount(first[:, 1])[1:]
    assert len(counts) == 4 and abs(counts - 1000).max() < 4 * np.sqrt(750)


def test_one_sentence_alone(corpus_folder: Path) -> None:
    """A forced negative, or no pair at all where order is the only question."""
    corpus = write_corpus(corpus_folder, [["a b c"], ["d e f"]])
    pairs = make(SegmentPairs(corpus, 16, relations=("next", "other")))
    assert [example.relation for example in pairs] == [1, 1]
    assert [example.ids.tolist() for example in pairs] == [ids("[abc|def|"), ids("[def|abc|")]
    alone = SegmentPairs(corpus, 16, relations=("next", "previous"))
    assert [example.relation for example in make(alone)] == [NONE, NONE]
    assert [example.ids.tolist() for example in make(alone)] == [ids("[abc|"), ids("[def|")]
    assert alone.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("a, b", [(10, 3), (3, 10), (7, 7), (6, 7), (1, 1), (20, 20), (5, 30)])
def test_kept_tokens(a: int, b: int) -> None:
    """As Google's truncate_seq_pair, a token at a time."""
    left, right = a, b
    while left + right > 9:
        if left > right:
            left -= 1
        else:
            right -= 1
    found = kept_tokens(np.array([a]), np.array([b]), 9)
    assert [int(x[0]) for x in found] == [left, right]


def test_front_or_back_is_cut(corpus_folder: Path) -> None:
    """Each of the tokens that are too many comes off the front or the back, as likely."""
    corpus = write_corpus(corpus_folder, [["a", "b c d e f", "g h i j k"], ["l"]])
    source = SegmentPairs(corpus, 11, relations=("next",), short=0.0, duplicates=9)
    index = source._rows[:, 1].tolist().index(1)  # A is "a", B the 10 tokens behind, 7 of them kept
    assert source.lengths[index] == 11
    firsts = Counter(
        int(source.example(index, np.random.default_rng(seed)).ids[3]) - A - 1
        for seed in range(2000)
    )
    expected = 2000 * np.array([1, 3, 3, 1]) / 8
    assert sorted(firsts) == [0, 1, 2, 3]
    assert max(abs(firsts[i] - expected[i]) for i in range(4)) < 4 * np.sqrt(2000 / 4)


def test_short_sequences(documentation: Corpus) -> None:
    """One in ten has a random room of 2 .. all there is, each as likely."""
    rooms = random_rooms(np.random.default_rng(0), 1_000_000, 500, 0.1)
    short = rooms[rooms < 500]
    assert abs(len(short) - 100_000 * 498 / 499) < 4 * np.sqrt(90_000)
    counts = np.bincount(short)[2:]
    assert len(counts) == 498 and abs(counts - len(short) / 498).max() < 5 * np.sqrt(200)
    for kind in (Segments, SegmentPairs):
        part = [np.mean(kind(documentation, 512, short=x).lengths < 256) for x in (0.0, 0.5, 1.0)]
        assert part[0] < part[1] < part[2]


@pytest.mark.parametrize("name", SOURCES)
def test_lengths_are_those_of_the_examples(documentation: Corpus, name: str) -> None:
    source = SOURCES[name](documentation, 48, duplicates=2)
    found = make(source)
    assert [len(example) for example in found] == source.lengths.tolist()
    assert source.lengths.max() <= 48
    for example in found:
        assert example.ids[0] == CLS
        special = np.isin(example.ids, (CLS, SEP))
        assert np.array_equal(special, example.sentence == NONE)
        assert np.array_equal(np.unique(example.sentence[~special]),
                              np.arange(example.sentence.max() + 1))  # fmt: skip


@pytest.mark.parametrize("name", ["full-sentences", "segments", "streams"])
def test_every_token_once(documentation: Corpus, name: str) -> None:
    source = SOURCES[name](documentation, 64)
    text = np.concatenate([example.ids[example.ordinary] for example in make(source)])
    assert np.array_equal(text, documentation.tokens(0, documentation.num_tokens))


def test_columns(corpus_folder: Path) -> None:
    documents = [["The cat a##b", "new York a##b cat"], ["York", "The end The"]]
    corpus = write_corpus(corpus_folder, documents, units=["new york"])
    source = FullSentences(corpus, 32, columns=("unit", "capitalised", "elsewhere"))
    (found,) = make(source)
    #    [CLS] the cat a ##b new york a ##b cat [SEP] york the end the [SEP]
    assert found.word_start.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert found.unit is not None and found.capitalised is not None
    assert found.unit.tolist() == [-1] * 5 + [0, 0] + [-1] * 9
    assert np.flatnonzero(found.capitalised).tolist() == [1, 6, 11, 12, 14]
    assert found.words().tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 13]
    parts = Segments(corpus, 8, short=0.0, columns=("elsewhere",))  # a sentence each
    elsewhere = [np.flatnonzero(example.elsewhere).tolist() for example in make(parts)]
    assert elsewhere == [[2, 3, 4], [3, 4, 5], []]  # "cat a ##b" in both; of the rest none


def test_plan_is_of_the_seed(documentation: Corpus) -> None:
    def plan(seed: int) -> list[int]:
        return SegmentPairs(documentation, 64, seed=seed)._rows.ravel().tolist()

    assert plan(1) == plan(1) != plan(2)
    doubled = SegmentPairs(documentation, 64, seed=1, duplicates=2)._rows.ravel().tolist()
    assert doubled[: len(plan(1))] == plan(1) and doubled != plan(1) * 2


def test_bad_arguments(documentation: Corpus, corpus_folder: Path) -> None:
    alone = write_corpus(corpus_folder, [["a b", "c d"]])
    nsp = parse("mlm+nsp")
    for call, message in (
        (lambda: Segments(alone, 7), "max_length: got 7, expected 8 or more"),
        (lambda: Segments(alone, 8, duplicates=0), "duplicates: got 0, expected 1 or more"),
        (lambda: Segments(alone, 8, short=1.5), "short: got 1.5"),
        (lambda: Segments(alone, 8, columns=("colour",)), r"columns: got \['colour'\]"),
        (lambda: Segments(alone, 8, columns=("unit",)), "was prepared without a list of units"),
        (lambda: SegmentPairs(alone, 8), "relations: got other, which takes a corpus of 2"),
        (lambda: SegmentPairs(alone, 8, relations=("near",)), "relations: got"),
        (lambda: SegmentPairs(alone, 8, relations=("same",)), "got same without other"),
        (lambda: open_source("books", alone, 8, nsp), "source: got 'books', expected one of pairs"),
        (lambda: open_source("streams", alone, 8, nsp), "source: got streams, expected pairs, as"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    data = PretrainingData(Segments(documentation, 64), parse("mlm"), seed=0)
    for index in (-1, len(data)):
        with pytest.raises(IndexError, match="is not among the"):
            data[index]
