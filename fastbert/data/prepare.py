"""prepare: text of any size to a corpus folder, in parallel, and on from where it was stopped.

One process reads documents, in order, and deals them out in chunks of about a MiB; workers split
sentences and tokenise; the first process joins what comes back, in order, and writes a shard of
each split whenever enough training tokens have come together. So what is written depends on the
input alone, and not on the number of workers.

corpus.json is written anew after each shard: it names the shards that are whole and the document
behind them, from which an interrupted run goes on. What no corpus.json names does not count.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert import device
from fastbert.data import tokenizer as tokenizers
from fastbert.data import units as phrases
from fastbert.data.corpus import FACTS, SPLITS, TOKENIZER, read_facts, write_facts
from fastbert.data.encode import Encoded
from fastbert.data.reading import START, Chunk, Place, Sample, read_chunks
from fastbert.data.sentences import MODES
from fastbert.data.shards import write_shard
from fastbert.data.sources import Source, find_sources
from fastbert.data.workers import Task, encode_in_order

if TYPE_CHECKING:
    from rich.progress import Progress

_CHUNK = 1 << 20  # characters of text that a worker takes at a time
_CHARACTERS_A_TOKEN = 4  # about
_TRAINING_BYTES = 1 << 28  # of text that a tokenizer learns from; more changes few pieces


@dataclass(frozen=True)
class Prepared:
    """What a corpus holds, and what it took.

    documents, sentences, tokens, units (None without a list of them): by split.
    skipped: bad parts of the input that were left out.
    seconds: of this run; tokenizer_seconds: of these, for the tokenizer.
    new_tokens: those that this run added, where an earlier one had begun.
    """

    out: str
    vocab_size: int
    documents: dict[str, int]
    sentences: dict[str, int]
    tokens: dict[str, int]
    units: dict[str, int] | None
    shards: int
    skipped: int
    problems: list[str]
    seconds: float
    tokenizer_seconds: float
    new_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens that this run added, by its time without that for the tokenizer."""
        return self.new_tokens / max(self.seconds - self.tokenizer_seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}

    def __str__(self) -> str:
        counts = {"documents": self.documents, "sentences": self.sentences, "tokens": self.tokens}
        if self.units is not None:
            counts["units"] = self.units
        lines = [
            f"{split}: " + ", ".join(f"{count[split]:,} {what}" for what, count in counts.items())
            for split in SPLITS
        ]
        lines.append(f"a vocabulary of {self.vocab_size:,}, {self.shards} shards")
        if self.skipped:
            lines.append(f"skipped {self.skipped} bad parts of the input, such as")
            lines += [f"  {problem}" for problem in self.problems]
        if self.new_tokens:
            lines.append(f"{self.seconds:.1f} s, {self.tokens_per_s:,.0f} tokens/s")
        else:
            lines.append("it was complete: nothing was done")
        return "\n".join(lines)


def prepare(
    texts: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path = "train:30522",
    lowercase: bool = True,
    units: str | Path | None = None,
    held_out: float = 0.01,
    sentences: str = "auto",
    text_field: str | None = None,
    skip_bad: bool = False,
    num_workers: int | None = None,
    shard_tokens: int = 1 << 24,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared:
    """Write the corpus folder ``out`` from ``texts``; ``fastbert.data.Corpus`` reads it.

    texts, sentences, text_field, skip_bad: see ``read_documents``.
    tokenizer: ``train:N`` trains a WordPiece tokenizer of at most N tokens on the text (on every
        k-th document of more than 256 MiB); else a Hugging Face folder with one.
    lowercase: of a tokenizer that is trained.
    units: file of phrases to find in the text, for masking them whole; see ``read_phrases``.
    held_out: the part of the documents that goes to the split ``valid``, chosen by a hash of the
        text, so that a document is on the same side in every corpus, and all its copies are.
    num_workers: processes that tokenise, 1 works in this one; one a CPU unless given. They are
        spawned: a script that calls this needs ``if __name__ == "__main__":``.
    shard_tokens: training tokens after which a shard is closed.
    overwrite: begin anew, whatever corpus ``out`` holds.
    progress: show a bar on stderr.

    Killed at any moment, the same call goes on after the last whole shards, and the corpus comes
    out the same to the byte. Raises ValueError for bad input, with file and line, and where ``out``
    was begun with another input or other options; FileNotFoundError for what is not there.
    """
    started = time.perf_counter()
    out = Path(out)
    _check(sentences, held_out, num_workers, shard_tokens)
    sources = find_sources(texts, text_field=text_field)
    listed = None if units is None else phrases.read_phrases(Path(units))
    with _progress(progress) as bars:
        made_of = {
            "sources": [[source.size, digest] for source, digest in _digests(sources, bars)],
            "tokenizer": _tokenizer_identity(tokenizer, lowercase),
            "units": None if listed is None else phrases.digest(listed),
            "held_out": held_out,
            "sentences": sentences,
            "text_field": text_field,
            "skip_bad": skip_bad,
            "shard_tokens": shard_tokens,
        }
        job = _Job(out, made_of, sources, overwrite)
        had = sum(job.total("tokens").values())
        tokenizer_seconds = 0.0
        if not job.complete:
            begun = time.perf_counter()
            job.set_tokenizer(tokenizer, lowercase, bars)
            tokenizer_seconds = time.perf_counter() - begun
            task = Task(out / TOKENIZER, sentences, held_out, listed)
            job.run(task, num_workers or _default_workers(sources), bars)
    new_tokens = sum(job.total("tokens").values()) - had
    seconds = time.perf_counter() - started
    return job.report(seconds, tokenizer_seconds, new_tokens)


def _check(sentences: str, held_out: float, num_workers: int | None, shard_tokens: int) -> None:
    if sentences not in MODES:
        raise ValueError(f"sentences: got {sentences!r}, expected one of {', '.join(MODES)}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: got {held_out}, expected at least 0 and less than 1")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers: got {num_workers}, expected 1 or more")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: got {shard_tokens}, expected 1 or more")


def _tokenizer_identity(tokenizer: str | Path, lowercase: bool) -> str:
    if _trained_size(tokenizer) is not None:
        return f"{tokenizer} {'uncased' if lowercase else 'cased'}"
    return hashlib.sha256(tokenizers.load_tokenizer(tokenizer).to_str().encode()).hexdigest()


def _trained_size(tokenizer: str | Path) -> int | None:
    """N of ``train:N``; None for a folder."""
    kind, colon, size = str(tokenizer).partition(":")
    if kind != "train" or not colon:
        return None
    if not (size.isascii() and size.isdecimal()):
        raise ValueError(f"tokenizer: got {tokenizer}, expected train:N or a folder")
    return int(size)


def _default_workers(sources: Sequence[Source]) -> int:
    """One a CPU, but no more than one for every few chunks: each starts, and learns words, anew."""
    return min(device.num_cpus(), 1 + sum(source.size for source in sources) // (4 * _CHUNK))


def _digests(sources: Sequence[Source], bars: Progress) -> list[tuple[Source, str]]:
    task = bars.add_task("checking the input", total=sum(source.size for source in sources))
    found = [(s, s.sha256(lambda done: bars.advance(task, done))) for s in sources]
    bars.remove_task(task)
    return found


def _progress(shown: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )


_SHARD = r"\d{5,}\.safetensors"
_FILES = "|".join(map(re.escape, (FACTS, *tokenizers.FILES)))
_TEMPORARY = re.compile(rf"\.({_SHARD}|{_FILES})\.\d+\.tmp")  # as fastbert.atomic names them


class _Job:
    """A corpus in the making: what corpus.json says, and how it comes to say more."""

    def __init__(
        self, out: Path, made_of: dict[str, Any], sources: Sequence[Source], overwrite: bool
    ) -> None:
        self.out = out
        self._sources = sources
        if (out / FACTS).is_file() and not overwrite:
            self._facts = read_facts(out)
            differs = [key for key in made_of if self._facts["made_of"].get(key) != made_of[key]]
            if differs:
                raise ValueError(
                    f"{out}: holds a corpus of another input or other options (differs in "
                    f"{', '.join(differs)}); --overwrite begins anew"
                )
        else:
            if out.exists() and not (out.is_dir() and ((out / FACTS).is_file() or _empty(out))):
                raise ValueError(
                    f"{out}: is no corpus and not empty, expected a folder to make, or one that is "
                    "empty"
                )
            out.mkdir(parents=True, exist_ok=True)
            self._facts = {
                "complete": False,
                "made_of": made_of,
                "names": [source.name for source in sources],
                "tokenizer": None,
                "splits": {split: [] for split in SPLITS},
                "place": START._asdict(),
            }
            write_facts(out, self._facts)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed or overwritten runs left: files of ours that corpus.json lacks."""
        records = [record for records in self._facts["splits"].values() for record in records]
        named = {self.out / record["file"] for record in records}
        for split in SPLITS:
            for path in (self.out / split).glob("*.safetensors"):
                if path not in named and re.fullmatch(_SHARD, path.name):
                    path.unlink()
        for folder in (self.out, *(self.out / name for name in (*SPLITS, TOKENIZER))):
            for path in folder.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()

    @property
    def complete(self) -> bool:
        return self._facts["complete"]

    def total(self, field: str) -> dict[str, int]:
        """Documents, sentences, tokens or units of each split."""
        splits = self._facts["splits"].items()
        return {split: sum(record[field] for record in records) for split, records in splits}

    def set_tokenizer(self, tokenizer: str | Path, lowercase: bool, bars: Progress) -> None:
        """Train or copy the tokenizer, unless an earlier run did."""
        folder = self.out / TOKENIZER
        known = self._facts["tokenizer"]
        if known is not None:
            tokenizers.load_tokenizer(folder)
            if tokenizers.fingerprint(folder) != known["sha256"]:
                raise ValueError(
                    f"{folder}: is not the tokenizer that this corpus was begun with; --overwrite "
                    "begins anew"
                )
            return
        size = _trained_size(tokenizer)
        if size is not None or not (folder.exists() and folder.samefile(tokenizer)):
            for name in tokenizers.FILES:  # of the corpus that is overwritten
                (folder / name).unlink(missing_ok=True)
        if size is None:
            tokenizers.copy_tokenizer(Path(tokenizer), folder)
        else:
            total = sum(source.size for source in self._sources)
            task = bars.add_task("training a tokenizer", total=2 * total)  # it reads twice
            made_of = self._facts["made_of"]
            sample = Sample(
                self._sources,
                made_of["skip_bad"],
                made_of["sentences"],
                step=1 + total // _TRAINING_BYTES,
                advance=lambda done: bars.advance(task, done),
            )
            trained = tokenizers.train_tokenizer(sample, size, lowercase=lowercase)
            tokenizers.save_tokenizer(trained, folder)
            bars.remove_task(task)
        self._facts["tokenizer"] = {
            "sha256": tokenizers.fingerprint(folder),
            "vocab_size": len(tokenizers.word_starts(tokenizers.load_tokenizer(folder))),
        }
        write_facts(self.out, self._facts)

    def run(self, task: Task, num_workers: int, bars: Progress) -> None:
        """Read, encode and write what is not written yet."""
        made_of = self._facts["made_of"]
        shard_tokens = made_of["shard_tokens"]
        characters = min(_CHUNK, _CHARACTERS_A_TOKEN * shard_tokens)
        start = Place(**self._facts["place"])
        chunks = read_chunks(self._sources, made_of["skip_bad"], characters, start)
        shown = bars.add_task("tokenising", total=sum(source.size for source in self._sources))
        parts: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
        tokens = held = 0
        chunk: Chunk | None = None
        with closing(encode_in_order(chunks, task, num_workers)) as encoded_chunks:
            for chunk, encoded in encoded_chunks:
                for split, part in encoded.items():
                    parts[split].append(part)
                    tokens += len(part.tokens)
                held += len(encoded["train"].tokens)
                if held >= shard_tokens:
                    self._write(parts, chunk.end)
                    parts, held = {split: [] for split in SPLITS}, 0
                text = f"tokenising: {tokens:,} tokens"
                bars.update(shown, completed=chunk.position, description=text)
        assert chunk is not None  # the last one comes whatever there is to read
        self._write(parts, chunk.end, last=True)

    def _write(self, parts: dict[str, list[Encoded]], end: Place, last: bool = False) -> None:
        """Write a shard of each split that has anything, and then say so."""
        tokenizer, units = self._facts["tokenizer"], self._facts["made_of"]["units"] is not None
        for split, encoded in parts.items():
            records = self._facts["splits"][split]
            if any(len(part.tokens) for part in encoded):
                name = f"{split}/{len(records):05d}.safetensors"
                record = write_shard(self.out, name, encoded, tokenizer["vocab_size"], units=units)
                records.append(record._asdict())
        if last and not self._facts["splits"]["train"]:
            raise ValueError(
                "texts: no document is left for training: they hold none with words, or all were "
                "held out"
            )
        self._facts |= {"place": end._asdict(), "complete": last}
        write_facts(self.out, self._facts)

    def report(self, seconds: float, tokenizer_seconds: float, new_tokens: int) -> Prepared:
        return Prepared(
            str(self.out),
            self._facts["tokenizer"]["vocab_size"],
            self.total("documents"),
            self.total("sentences"),
            self.total("tokens"),
            self.total("units") if self._facts["made_of"]["units"] else None,
            sum(len(records) for records in self._facts["splits"].values()),
            self._facts["place"]["skipped"],
            self._facts["place"]["problems"],
            seconds,
            tokenizer_seconds,
            new_tokens,
        )


def _empty(folder: Path) -> bool:
    """Whether nothing is there but what a run left that was killed at its very first write."""
    return all(_TEMPORARY.fullmatch(path.name) for path in folder.iterdir())
