"""``fastbert pretrain``: a corpus to a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.cli.pretrain_shown import Shown, print_list


def pretrain(
    corpus: Annotated[
        Path | None,
        typer.Option(help="Folder that `fastbert prepare` wrote; with --resume the run's own."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run: new, or with --resume that of a run.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Published recipe to start from: bert-base, roberta, electra, … (--list shows "
            "all), or a .json file, as --show prints and run.json is; default minutes."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the model: tiny, mini, small, medium, base, large, or a config.json; "
            "default the preset's, which is tiny for minutes and base for the others."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="How long, in updates; in place of --minutes.", min=1)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="How long, by the clock; default 10, with --demo 1.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="What is learned, joined by +, such as mlm+sop; default the preset's."),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            help="What is masked: token, word (or whole-word), span, random-span or unit; default "
            "the preset's."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Part of the tokens that is masked, such as 0.4; default the preset's."),
    ] = None,
    span: Annotated[
        str | None,
        typer.Option(
            help="Lengths of masked spans: geometric:0.2, inverse:3, or the probabilities of 1, 2, "
            "… words; default the preset's."
        ),
    ] = None,
    replace: Annotated[
        str | None,
        typer.Option(help="What masked tokens become: mask or unk; default the preset's."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="How text is cut into sequences: pairs, full-sentences, segments or streams; "
            "default the preset's."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence, in every phase; default the preset's.", min=8),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Sequences of an update, in every phase; default the preset's.", min=1),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate; default the preset's.")
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option(
            help="Numbers of layers to grow through, such as 3,6,12; the last is the model's, "
            "whatever its --size."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other option that --show prints, such as optimizer=lamb, masking.alpha=0.5 "
            "or objective_options.rtd.divisor=4; may be given several times.",
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder of a BERT to go on from, in the size that it has."),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that a process computes at once; default 4096.", min=8),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Mixed precision: no, bf16 or fp16; default no.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything that is random; default 0.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that make batches, 0 for this one; default 1.", min=0),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(help="Held-out evaluation every so many steps; default 500.", min=1),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Checkpoint every so many steps; default 500.", min=1)
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(help="Where to show the log of OUT/log.jsonl too: tensorboard or wandb."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out, as it was begun; it may take longer."
        ),
    ] = False,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="A minute on Python's own documentation: nothing is downloaded."
        ),
    ] = False,
    list_all: Annotated[
        bool,
        typer.Option(
            "--list", help="Objectives, maskings, sources and presets, with their papers."
        ),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the options as JSON, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Pretrain a BERT on a corpus, or go on with one, in the way of a published recipe.

    A preset is a set of options: the others here change one of them each. The result in OUT/model
    is a Hugging Face folder. Under `accelerate launch` or torchrun it runs on several devices; with
    `accelerate launch --use_fsdp --fsdp_version 2` these hold a part of the model each.
    """
    if list_all:
        return print_list()
    from fastbert.pretrain import RunRecord, Setting
    from fastbert.pretrain import preset as preset_options
    from fastbert.pretrain import pretrain as run

    if demo:
        folder = out or Path("pretrain-demo")
        out = folder / "run"
    changed = _changes(
        {
            **_checked(mask, replace), "size": size, "objective": objective, "rate": rate,
            "span": span, "source": source, "length": length, "batch": batch, "learning_rate": lr,
            "stack": None if stack is None else _numbers(stack),
        },
        changes or [],
    )  # fmt: skip
    asked = _given(
        {
            "steps": steps, "minutes": minutes, "batch_tokens": batch_tokens,
            "precision": precision, "seed": seed, "workers": workers,
            "evaluate_every": evaluate_every, "save_every": save_every, "tracker": log,
        }
    )  # fmt: skip
    if init is not None and "size" in changed:
        raise ValueError(f"--size: got {changed['size']} beside --init, whose model has its own")
    if resume and out is not None:
        begun = RunRecord.read(out)
        options = begun.options if preset is None else preset_options(preset)
        setting = dataclasses.replace(begun.setting, **asked)
        corpus = corpus or begun.corpus
    else:
        options = preset_options(preset or "minutes")
        if steps is None and minutes is None:
            asked["minutes"] = 1.0 if demo else 10.0
        setting = Setting(**asked)
    options = options.changed(**changed)
    if show:
        return print(options.to_json(), end="")
    if demo and corpus is None:
        corpus = _documentation(folder)
    if corpus is None or out is None:
        missing = "--corpus" if corpus is None else "--out"
        raise ValueError(f"{missing}: missing, expected a folder")
    with Shown(hidden=as_json) as shown:
        last = run(corpus, out, options, setting, init=init, resume=resume, tell=shown.tell)
    if not shown.is_main_process:
        return
    if as_json:
        print(json.dumps({"out": str(out), "validation": last}, indent=2))
    else:
        print(out / "model")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _changes(flags: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """What flags and --set change, none of it twice."""
    from fastbert.pretrain import assignments

    given, more = _given(flags), assignments(texts)
    if twice := given.keys() & more.keys():
        raise ValueError(f"--set: got {', '.join(sorted(twice))}, which another flag gives too")
    return given | more


def _checked(mask: str | None, replace: str | None) -> dict[str, str | None]:
    """--mask and --replace under the names that Masking has for them; it would say those of what is
    wrong. Whole words go by two names."""
    from fastbert.pretrain.masking import MASK_TOKENS, WHAT

    for flag, value, known in (
        ("--mask", mask, (*WHAT, "whole-word")),
        ("--replace", replace, tuple(MASK_TOKENS)),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{flag}: got {value!r}, expected one of {', '.join(known)}")
    return {"what": "word" if mask == "whole-word" else mask, "mask_token": replace}


def _documentation(folder: Path) -> Path:
    """A corpus of the standard library's documentation, in ``folder / "corpus"``."""
    from pydoc_data.topics import topics

    from fastbert.data import prepare

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "documentation.txt"
    # A page a document: blank lines would end it.
    pages = (
        "\n".join(line for line in page.split("\n") if line.strip()) for page in topics.values()
    )
    text.write_text("\n\n".join(pages), encoding="utf-8")
    prepare([text], folder / "corpus", tokenizer="train:4000", held_out=0.05)
    return folder / "corpus"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--stack: got {text!r}, expected numbers with commas: 3,6,12") from None
