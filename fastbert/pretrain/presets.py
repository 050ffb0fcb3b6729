"""Presets: the options of published recipes, by name. Sizes are apart from them: ``size``.

A preset says what the paper does to text and to the learning rate; the encoder is BERT's in all of
them. Numbers are those of the papers' base models (or of the one model that they have), or of the
code that came with it; what neither says is BERT's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.pretrain.masking import Masking
from fastbert.pretrain.options import Options, Phase


class Preset(NamedTuple):
    paper: str
    summary: str
    options: Options


_ROBERTA: dict[str, Any] = {
    "objective": "mlm",
    "source": "full-sentences",
    "phases": (Phase(512, 125_000, 2048),),
    "learning_rate": 5e-4,
    "betas": (0.9, 0.98),
    "bias_correction": True,
    "max_grad_norm": None,
    "warmup_steps": 6_000,
}
_SPANBERT = Masking(what="span", per="group")
_ERNIE = Masking(what="unit", per="group")

PRESETS: dict[str, Preset] = {
    "minutes": Preset(
        "arXiv 2212.14034, scaled down",
        "a small model in minutes on any machine: 128 tokens, 25% masked, no dropout",
        Options(
            objective="mlm",
            source="full-sentences",
            masking=Masking(rate=0.25),
            size="tiny",
            dropout=0.0,
            phases=(Phase(128, 10_000, 32),),
            learning_rate=2e-3,
            betas=(0.9, 0.98),
            bias_correction=True,
            warmup_steps=500,
        ),
    ),
    "bert-base": Preset(
        "arXiv 1810.04805",
        "BERT: masked LM and next sentence, 10 static masks, 128 then 512 tokens",
        Options(duplicates=10, static=True),
    ),
    "bert-whole-word": Preset(
        "arXiv 1810.04805, models of May 2019",
        "BERT that masks whole words",
        Options(masking=Masking(what="word"), duplicates=10, static=True),
    ),
    "bert-lamb": Preset(
        "arXiv 1904.00962",
        "BERT in 8,601 large batches with LAMB",
        Options(
            optimizer="lamb",
            learning_rate=6e-3,
            warmup_steps=2_000,
            bias_correction=True,
            phases=(
                Phase(128, 7_038, 65_536, max_predictions=20),
                Phase(
                    512, 1_563, 32_768, max_predictions=80, learning_rate=4e-3, warmup_steps=200
                ),
            ),
        ),
    ),
    "bert-stacked": Preset(
        "Gong et al., ICML 2019",
        "BERT grown from 3 to 6 to 12 layers",
        Options(stack=(3, 6, 12)),
    ),
    "roberta": Preset(
        "arXiv 1907.11692",
        "dynamic masks, full sentences over documents, no pairs, large batches",
        Options(**_ROBERTA),
    ),
    "high-rate": Preset(
        "arXiv 2202.08005", "40% masked, all of it by [MASK]",
        Options(**_ROBERTA, masking=Masking(rate=0.4, replace=(1.0, 0.0, 0.0))),
    ),
    "random-spans": Preset(
        "arXiv 1910.10683", "15% masked in spans of 3 on average",
        Options(**_ROBERTA, masking=Masking(what="random-span", mean_span=3.0)),
    ),
    "unk": Preset(
        "arXiv 1909.12744", "[UNK] in place of [MASK]",
        Options(masking=Masking(mask_token="unk")),
    ),
    "xlm": Preset(
        "arXiv 1901.07291",
        "streams of 256 tokens, rare tokens masked more often",
        Options(
            objective="mlm",
            source="streams",
            masking=Masking(alpha=0.5),
            phases=(Phase(256, 500_000, 64),),
            warmup_steps=4_000,
            schedule="inverse_sqrt",
            bias_correction=True,
        ),
    ),
    "spanbert": Preset(
        "arXiv 1907.10529",
        "spans masked, and predicted from their boundaries too",
        Options(
            objective="mlm+sbo",
            source="segments",
            masking=_SPANBERT,
            phases=(Phase(512, 2_400_000, 256),),
            eps=1e-8,
            weight_decay=0.1,
            bias_correction=True,
        ),
    ),
    "albert": Preset(
        "arXiv 1909.11942",
        "n-grams of up to 3 masked, and sentence order, with LAMB; layers of their own",
        Options(
            objective="mlm+sop",
            masking=Masking(what="span", span="inverse:3"),
            dropout=0.0,
            phases=(Phase(512, 125_000, 4096),),
            optimizer="lamb",
            learning_rate=1.76e-3,
            bias_correction=True,
            warmup_steps=3_125,
        ),
    ),
    "electra": Preset(
        "arXiv 2003.10555",
        "which tokens a small generator replaced",
        Options(
            objective="rtd",
            source="segments",
            masking=Masking(replace=(0.85, 0.0, 0.15)),
            phases=(Phase(512, 766_000, 256),),
            learning_rate=2e-4,
        ),
    ),
    "ernie": Preset(
        "arXiv 1904.09223",
        "phrases and entities masked whole (of a corpus made with units)",
        Options(masking=_ERNIE),
    ),
    "ernie2": Preset(
        "arXiv 1907.12412",
        "ERNIE's masks with its word, structure and relation tasks, all at once",
        Options(
            objective="mlm+capitalised+elsewhere+reorder+distance",
            masking=_ERNIE,
            phases=(Phase(512, 500_000, 768),),
            learning_rate=5e-5,
            betas=(0.9, 0.98),
            warmup_steps=4_000,
            schedule="inverse_sqrt",
        ),
    ),
    "structbert": Preset(
        "arXiv 1908.04577",
        "word order, and next, previous or other sentence",
        Options(
            objective="mlm+word-order+3way",
            phases=(Phase(512, 1_000_000, 256, max_predictions=80),),
            warmup_steps=100_000,  # a tenth of all
        ),
    ),
    "xlnet": Preset(
        "arXiv 1906.08237",
        "the last sixth of a random order, by two streams",
        Options(
            objective="plm",
            source="segments",
            phases=(Phase(512, 500_000, 2048),),
            learning_rate=4e-4,
            warmup_steps=40_000,
            bias_correction=True,
        ),
    ),
    "unilm2": Preset(
        "arXiv 2002.12804",
        "masked tokens together, and span by span with pseudo masks",
        Options(
            objective="unilm2",
            source="segments",
            masking=Masking(what="span", span=".6,.08,.08,.08,.08,.08"),
            phases=(Phase(512, 500_000, 7_680),),
            learning_rate=6e-4,
            betas=(0.9, 0.98),
            warmup_steps=24_000,
            bias_correction=True,
        ),
    ),
    "bart": Preset(
        "arXiv 1910.13461",
        "sentences permuted and spans taken out, undone by heads",
        Options(
            objective="bart",
            source="segments",
            phases=(Phase(512, 500_000, 8_000),),
            betas=(0.9, 0.98),
            bias_correction=True,
        ),
    ),
    "cramming": Preset(
        "arXiv 2212.14034",
        "one machine, one day: 128 tokens, 25% masked, no dropout, one cycle, a growing batch",
        Options(
            objective="mlm",
            source="full-sentences",
            masking=Masking(rate=0.25),
            dropout=0.0,
            phases=(Phase(128, 60_000, 8_192),),
            learning_rate=1e-3,
            betas=(0.9, 0.98),
            eps=1e-12,
            bias_correction=True,
            max_grad_norm=0.5,
            warmup_steps=30_000,  # one cycle: half of the run up, half of it down
            ramp_start=128,
            ramp_steps=36_000,
        ),
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> Options:
    """The options of a preset, with ``Options.changed``.

    name: in PRESETS, or a .json file: ``Options.to_json``, or the run.json of a run.
    Raises ValueError for an unknown name and for a file of something else.
    """
    if Path(name).suffix == ".json":
        return _read(Path(name)).changed(**changes)
    if name not in PRESETS:
        raise ValueError(
            f"preset: got {name!r}, expected one of {', '.join(PRESETS)}, or a .json file"
        )
    return PRESETS[name].options.changed(**changes)


def _read(path: Path) -> Options:
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        if isinstance(found, dict) and "options" in found:  # a run.json
            text = json.dumps(found["options"])
        return Options.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
