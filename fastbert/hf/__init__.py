"""Hugging Face models on fastbert's kernels, in place: the only part that imports ``transformers``.

``accelerate`` puts a callable in place of the forward of every encoder layer, bare model and task
model that it knows, on the instance; parameters, classes and checkpoints stay what they are.
"""

from fastbert.hf.attention_interface import register_attention
from fastbert.hf.dropin import accelerate, restore
from fastbert.hf.explain import Explanation, explain
from fastbert.hf.verify import Report, verify

__all__ = [
    "Explanation",
    "Report",
    "accelerate",
    "explain",
    "register_attention",
    "restore",
    "verify",
]
