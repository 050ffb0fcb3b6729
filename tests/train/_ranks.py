"""What each rank of tests/train/test_distributed.py does, importable by the processes it spawns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbert
from fastbert.train import AdamW, Lamb, checkpoint, clip_grad_norm_, param_groups
from fastbert.train.states import unwrapped, whole

Tensor = torch.Tensor
WORLD_SIZE, STEPS, ROWS, COLUMNS, VOCAB = 2, 3, 4, 9, 31
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# name -> (model, wrapper, optimiser)
CASES = {
    f"{model}-{wrapper}-{kind.__name__}": (model, wrapper, kind)
    for model in ("native", "accelerated")
    for wrapper, kind in (("ddp", AdamW), ("fsdp2", AdamW), ("fsdp2", Lamb))
}


def build(model: str) -> Any:
    torch.manual_seed(0)
    if model == "native":
        return fastbert.BertForMaskedLM(fastbert.BertConfig(**SIZES)).train()
    import transformers

    made = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).train()
    return fastbert.accelerate(made)


def batch_of(step: int) -> dict[str, Tensor]:
    """Four rows of unlike lengths; three labels a row, so that ranks have as many as each other."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCAB, (ROWS, COLUMNS), generator=generator)
    mask = (torch.arange(COLUMNS) < torch.tensor([9, 4, 6, 7])[:, None]).long()
    labels = torch.full_like(ids, -100)
    labels[:, 1:4] = ids[:, 1:4]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def wrapped(model: Any, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    return model


def train(
    model: nn.Module, kind: Any, rows: slice, steps: range, checkpoints: Path, resume: bool = False
) -> dict[str, Tensor]:
    """Losses of this rank's rows, the first step's gradients (whole) and norm, and the parameters
    at the end; a checkpoint after the second step."""
    optimizer = kind(param_groups(model, 0.1), lr=0.05, max_grad_norm=0.5)
    if resume:
        folder = checkpoint.latest(checkpoints)
        assert folder is not None
        checkpoint.load(folder, model=model, optimizer=optimizer)
    found: dict[str, Tensor] = {}
    losses = []
    for step in steps:
        batch = {name: x[rows] for name, x in batch_of(step).items()}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            for name, p in unwrapped(model).named_parameters():
                assert p.grad is not None, name
                found[f"gradient {name}"] = whole(p.grad).clone()
        optimizer.step()
        assert optimizer.grad_norm is not None
        found[f"norm {step}"] = optimizer.grad_norm.clone()
        if step == 1 and not resume:
            checkpoint.save(checkpoints, step, model=model, optimizer=optimizer)
    found["losses"] = torch.stack(losses)
    for name, p in unwrapped(model).named_parameters():
        found[f"parameter {name}"] = whole(p).clone()
    # The clipping of a user's own, too.
    norm = clip_grad_norm_(model.parameters(), 1e-3)
    again = clip_grad_norm_(model.parameters(), 1.0)
    found["clipped"] = torch.stack([norm, again])
    return found


def run_rank(rank: int, folder: str) -> None:
    """All cases one after the other; results to FOLDER/CASE-RANK.safetensors."""
    torch.set_num_threads(1)
    place = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=WORLD_SIZE
    )
    rows = slice(rank * ROWS // WORLD_SIZE, (rank + 1) * ROWS // WORLD_SIZE)
    for name, (model, wrapper, kind) in CASES.items():
        made = wrapped(build(model), wrapper)
        found = train(made, kind, rows, range(STEPS), place / name)
        save_file(found, place / f"{name}-{rank}.safetensors")
        if wrapper == "fsdp2":
            # From the checkpoint of one process, which the parent has written.
            made = wrapped(build(model), wrapper)
            single = place / f"{model}-{kind.__name__}"
            found = train(made, kind, rows, range(2, STEPS), single, resume=True)
            save_file(found, place / f"{name}-resumed-{rank}.safetensors")
    dist.destroy_process_group()
