"""Modules: parameters under Hugging Face's names, and one call to the functional layer each."""

from fastbert.nn.embeddings import BertEmbeddings
from fastbert.nn.encoder import BertEncoder, BertLayer
from fastbert.nn.heads import LMPredictions, Pooler

__all__ = ["BertEmbeddings", "BertEncoder", "BertLayer", "LMPredictions", "Pooler"]
