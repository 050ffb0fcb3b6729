"""One rank of a run under FSDP2: what ``accelerate launch --use_fsdp --fsdp_version 2`` starts.

accelerate itself shards on accelerators only; told that this is one, it does the same on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from fastbert.pretrain import Options, Setting, pretrain


class Sharding(Accelerator):
    distributed_type = DistributedType.FSDP
    is_fsdp2 = True

    def __init__(self) -> None:
        super().__init__(cpu=True)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip


def main(corpus: str, out: str, options: str, setting: str, resume: str) -> None:
    accelerator = Sharding()
    seen = []

    def tell(trainer, noted):
        layers = trainer.model.bert.encoder.layer
        seen.append({type(p).__name__ for layer in layers for p in layer.parameters()})

    pretrain(
        corpus, out, Options.from_json(options), Setting(**json.loads(setting)),
        resume=resume == "True", accelerator=accelerator, tell=tell,
    )  # fmt: skip
    assert seen and all(kinds == {"DTensor"} for kinds in seen), seen
    if accelerator.is_main_process:
        assert (Path(out) / "model" / "model.safetensors").is_file()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
