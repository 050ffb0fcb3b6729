"""What pretraining, fine-tuning and distillation share: optimisers, schedules, checkpoints, logs,
model FLOPs, graphs.

Devices, mixed precision and several processes are Hugging Face accelerate's or torch's own: what is
here works under DDP and FSDP2 and knows no more of them than that.
"""

from fastbert.train import checkpoint
from fastbert.train.buckets import Bucket, Pad, bucket_of, labelled_rows, pad_batch
from fastbert.train.flops import Meter
from fastbert.train.graphs import Graphs, graphs, masked_lm_loss
from fastbert.train.logging import Log
from fastbert.train.optimizers import AdamW, Lamb
from fastbert.train.parameters import clip_grad_norm_, param_groups
from fastbert.train.schedules import SCHEDULES, Schedule, batch_size_ramp

__all__ = [
    "SCHEDULES",
    "AdamW",
    "Bucket",
    "Graphs",
    "Lamb",
    "Log",
    "Meter",
    "Pad",
    "Schedule",
    "batch_size_ramp",
    "bucket_of",
    "checkpoint",
    "clip_grad_norm_",
    "graphs",
    "labelled_rows",
    "masked_lm_loss",
    "pad_batch",
    "param_groups",
]
