"""Pretraining: what is cut from a corpus, what is hidden of it, and what is asked about it.

    corpus = Corpus("corpus")                                    # what `fastbert prepare` wrote
    objectives = parse("mlm+nsp", Masking(what="word"))
    source = open_source("pairs", corpus, 128, objectives, seed=1)
    data = PretrainingData(source, objectives, seed=1)           # a dataset of prepared examples
    model = PretrainingModel(BertConfig.preset("tiny", vocab_size=corpus.vocab_size), objectives)

    batches = TokenBatches(data.lengths, max_tokens=4096, seed=1)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate)
    for batch in loader:                                         # an epoch
        output = model(batch, measure=True)
        output.loss.backward()
        print(output.losses(), output.accuracies())
    model.export("run/model", tokenizer="corpus/tokenizer")      # a Hugging Face folder

or, from a preset: ``options = preset("roberta", size="tiny", rate=.4).scaled(1000)``, and for each
of ``options.phases`` ``options.data(corpus, phase, seed=1)``, on a ``PretrainingModel(
options.config(corpus.vocab_size), options.objectives())``.

The parts, and what each may rely on:

Source            a corpus as E examples of known ``lengths``, cut by a seed: pairs, full-sentences,
                  segments, streams.
Example           one sequence, a row a token, in numpy, with what objectives need to know of each.
Masking           which tokens are masked, in which groups, and by what.
Objective         ``prepare`` an example (numpy, in a worker), a ``head``, and from the encoder's
                  states the ``terms`` of the loss. ``parse`` joins them: those that move text come
                  first, then the one that masks or replaces tokens, then those that ask about what
                  is left; the order in the name does not matter.
PretrainingData   example i of epoch e, a function of (seed, e, i) alone: the number of workers, of
                  ranks and of interruptions changes nothing.
collate           examples to a PretrainingBatch: packed, targets as rows, ``rows`` the tokens that
                  any head asks for. PaddedCollator makes Hugging Face's arguments instead.
PretrainingModel  batch to loss. Heads never see more than their rows; no (T, V) logits exist; the
                  last layer computes only ``rows``. ``counts`` and ``divisors`` make a mean over
                  several batches or ranks exact.
stack             a state of L layers as one of 2 L, moments of the optimiser too.
pretrain, Trainer the loop: Options on a Setting (the machine, and how long), resumable.
RunRecord         what a run in a folder was begun with.
Options, PRESETS  all of this, and the regime of the optimiser, as plain data under a name.

An objective of one's own is one class:

    @register
    @dataclass(frozen=True)
    class SentenceEnd(Objective):
        name, paper = "sentence-end", "this docstring"
        summary = "which tokens end their sentence"

        def prepare(self, example, vocabulary, rng):
            index = np.flatnonzero(example.ordinary)
            last = np.append(np.diff(example.sentence) != 0, True)
            return example.asking(self.name, index=index, labels=last[index])

        def head(self, config):
            return nn.Linear(config.hidden_size, 1)

        def terms(self, head, encoded, targets):
            logits = head(encoded.at(targets["index"]))[:, 0]
            return {"": binary_term(logits, targets["labels"], encoded.measure)}

    objectives = parse("mlm+sentence-end")
"""

from fastbert.pretrain.collate import PaddedCollator, PretrainingBatch, collate
from fastbert.pretrain.data import SOURCES, PretrainingData, open_source
from fastbert.pretrain.examples import Example, Vocabulary
from fastbert.pretrain.masking import Masking
from fastbert.pretrain.model import PretrainingModel, PretrainingOutput
from fastbert.pretrain.objectives import (
    OBJECTIVES,
    Encoded,
    Objective,
    Term,
    binary_term,
    class_term,
    parse,
    register,
    token_term,
)
from fastbert.pretrain.options import Options, Phase, assignments
from fastbert.pretrain.presets import PRESETS, Preset, preset
from fastbert.pretrain.record import RunRecord
from fastbert.pretrain.run import pretrain
from fastbert.pretrain.setting import Setting
from fastbert.pretrain.sources import Source
from fastbert.pretrain.stacking import stack
from fastbert.pretrain.trainer import Trainer
from fastbert.train.errors import NotFinite

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "SOURCES",
    "Encoded",
    "Example",
    "Masking",
    "NotFinite",
    "Objective",
    "Options",
    "PaddedCollator",
    "Phase",
    "Preset",
    "PretrainingBatch",
    "PretrainingData",
    "PretrainingModel",
    "PretrainingOutput",
    "RunRecord",
    "Setting",
    "Source",
    "Term",
    "Trainer",
    "Vocabulary",
    "assignments",
    "binary_term",
    "class_term",
    "collate",
    "open_source",
    "parse",
    "preset",
    "pretrain",
    "register",
    "stack",
    "token_term",
]
