"""Pretrain a tiny BERT for some minutes, here and with Hugging Face's Trainer:
``python bench/pretraining.py --corpus DIR --minutes 10``.

Both train BertForMaskedLM of one config on the same tokens of the corpus that ``fastbert prepare``
wrote, one after the other, each in a process of its own and for as long by the clock (evaluation
and saving apart): the options of ``fastbert pretrain --preset minutes`` (25% masked, no dropout,
AdamW, 5% warm-up, then a linear decay to the end of the minutes), the same number of tokens in a
step. The peer has no padding: its sequences are the corpus cut to 128 tokens each, as transformers'
run_mlm.py cuts it; its attention is SDPA, its optimiser torch's fused AdamW.

Both models, as Hugging Face folders, then predict the same masked tokens of the held-out text in
transformers' own BertForMaskedLM. Tokens a second are real ones of the training itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from timing import machine, write  # noqa: E402

from fastbert.data import Corpus  # noqa: E402
from fastbert.pretrain import Options, preset  # noqa: E402
from fastbert.train import SCHEDULES  # noqa: E402

_OURS, _PEER = "fastbert", "Hugging Face Trainer, SDPA"
_BARS = {"tokens_per_s_ratio": 1.5, "perplexity_ratio": 1.0}


def sequences(corpus: Corpus, length: int) -> np.ndarray:
    """(N, length) int64: the tokens one behind the other, cut; [CLS] and [SEP] around each."""
    special = corpus.special_ids
    inner = length - 2
    tokens = corpus.tokens(0, corpus.num_tokens // inner * inner).astype(np.int64)
    body = tokens.reshape(-1, inner)
    ends = [np.full((len(body), 1), token, np.int64) for token in (special.cls, special.sep)]
    return np.concatenate((ends[0], body, ends[1]), 1)


def collator(corpus: Corpus, options: Options, seed: int | None = None) -> Any:
    """transformers' own masking, at our rate."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus.folder / "tokenizer")
    return transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=options.masking.rate, seed=seed
    )


# --- training ----------------------------------------------------------------------------------


def train_ours(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-c", "from fastbert.cli import main; main()", "pretrain", "--json",
        "--corpus", str(args.corpus), "--out", str(out), "--preset", "minutes",
        "--size", args.size, "--minutes", str(args.minutes), "--workers", str(args.workers),
        "--batch-tokens", str(args.batch_tokens), "--seed", str(args.seed),
        "--evaluate-every", "1000000", "--save-every", "1000000",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment(args))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    return {key: last[key] for key in ("step", "tokens", "seconds")}


def train_peer(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--peer", str(out), "--corpus", str(args.corpus)]
    for name in ("size", "minutes", "batch_tokens", "seed", "peer_workers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment(args))
    return json.loads((out / "training.json").read_text())


def _environment(args: argparse.Namespace) -> dict[str, str]:
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return os.environ | threads | {"TOKENIZERS_PARALLELISM": "false"}


def peer(args: argparse.Namespace) -> None:
    """The training of the peer, in this process; to the folder ``args.peer``."""
    import transformers

    corpus, options = Corpus(args.corpus), preset("minutes", size=args.size)
    length = options.phases[0].length
    rows = sequences(corpus, length)
    data = [{"input_ids": row} for row in rows]
    transformers.set_seed(args.seed)
    values = json.loads(options.config(corpus.vocab_size).to_json())
    config = transformers.BertConfig(**values, attn_implementation="sdpa")
    model = transformers.BertForMaskedLM(config)
    settings = transformers.TrainingArguments(
        output_dir=str(args.peer), per_device_train_batch_size=args.batch_tokens // length,
        max_steps=10**9, learning_rate=options.learning_rate, optim="adamw_torch_fused",
        adam_beta1=options.betas[0], adam_beta2=options.betas[1], adam_epsilon=options.eps,
        weight_decay=options.weight_decay, max_grad_norm=options.max_grad_norm or 0.0,
        dataloader_num_workers=args.peer_workers, dataloader_drop_last=True, seed=args.seed,
        save_strategy="no", eval_strategy="no", logging_steps=100, report_to=[], disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    clock = _Clock(60 * args.minutes, options)

    class Stopping(transformers.TrainerCallback):
        def on_train_begin(self, *given: Any, **more: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            control.should_training_stop = clock.seconds() >= clock.length
            return control

    class ByTheClock(transformers.Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.rate)
            return self.lr_scheduler

    trainer = ByTheClock(
        model, settings, collator(corpus, options), data, callbacks=[Stopping()]
    )  # fmt: skip
    trainer.train()
    seconds, steps = clock.seconds(), trainer.state.global_step
    tokens = steps * settings.per_device_train_batch_size * length
    trainer.save_model(str(args.peer))
    found = {"step": steps, "tokens": tokens, "seconds": seconds}
    (args.peer / "training.json").write_text(json.dumps(found))


class _Clock:
    """How long a run has gone, and what part of the learning rate it has now: ours."""

    def __init__(self, length: float, options: Options) -> None:
        self.length, self._options = length, options
        self._begun = time.perf_counter()

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def rate(self, step: int) -> float:
        o = self._options
        place = min(1.0, self.seconds() / self.length) * o.total_steps if step else 0.0
        return SCHEDULES[o.schedule](place + 1, o.warmup_steps, o.total_steps + 1)


# --- evaluation --------------------------------------------------------------------------------


def masked_text(corpus: Path, options: Options, seed: int) -> dict[str, torch.Tensor]:
    """Held-out text, masked once for both."""
    held_out = Corpus(corpus, "valid")
    rows = sequences(held_out, options.phases[0].length)
    return dict(collator(held_out, options, seed)([{"input_ids": row} for row in rows]))


@torch.no_grad()
def perplexity(folder: Path, text: dict[str, torch.Tensor]) -> dict[str, float]:
    """By transformers, of the model in ``folder``: e to the mean loss of the masked tokens."""
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    total = right = count = 0.0
    for first in range(0, len(text["labels"]), 32):
        part = {name: x[first : first + 32] for name, x in text.items()}
        labels = part.pop("labels")
        masked = labels != -100
        logits = model(**part).logits[masked].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[masked], reduction="sum"))
        right += float((logits.argmax(1) == labels[masked]).sum())
        count += int(masked.sum())
    return {
        "perplexity": math.exp(total / count),
        "loss": total / count,
        "accuracy": right / count,
        "masked_tokens": int(count),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each of the two")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=1, help="of fastbert's loader")
    parser.add_argument("--peer-workers", type=int, default=1, help="of the Trainer's loader")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(args)
        return 0
    torch.set_num_threads(args.threads)
    options = preset("minutes", size=args.size)
    text = masked_text(args.corpus, options, args.seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as scratch:
        for name, train, model in ((_OURS, train_ours, "model"), (_PEER, train_peer, "")):
            out = Path(scratch) / train.__name__
            trained = train(args, out)
            found = {"name": name, **trained, **perplexity(out / model, text)}
            found["tokens_per_s"] = found["tokens"] / found["seconds"]
            print(
                f"{name}: {found['tokens_per_s']:,.0f} tokens/s over {found['seconds']:.0f} s, "
                f"{found['step']:,} steps; held out: perplexity {found['perplexity']:.2f}, right "
                f"{found['accuracy']:.1%}",
                flush=True,
            )
            rows.append(found)
    ours, theirs = rows
    ratios = {
        "tokens_per_s_ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "perplexity_ratio": ours["perplexity"] / theirs["perplexity"],
    }
    print(
        f"ratios: {ratios['tokens_per_s_ratio']:.2f}x tokens/s (bar 1.5x), perplexity "
        f"{ratios['perplexity_ratio']:.3f} of the peer's (bar: below 1)"
    )
    result = {
        "machine": machine(),
        "minutes": args.minutes,
        "size": args.size,
        "batch_tokens": args.batch_tokens,
        "threads": args.threads,
        "workers": {_OURS: args.workers, _PEER: args.peer_workers},
        "options": json.loads(options.to_json()),
        "rows": rows,
        **ratios,
        "bars": _BARS,
    }
    where = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.out or Path(__file__).parent / "results" / f"pretraining_{where}.json"
    write(path, result)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
