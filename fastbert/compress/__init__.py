"""Smaller and faster models: quantisation."""

from fastbert.compress.model import QuantizedModel, Report
from fastbert.compress.quantize import SCHEMES, quantize
from fastbert.compress.saved import load
from fastbert.compress.sensitivity import Sensitivity, sensitivity
from fastbert.compress.source import load_float

__all__ = [
    "SCHEMES",
    "QuantizedModel",
    "Report",
    "Sensitivity",
    "load",
    "load_float",
    "quantize",
    "sensitivity",
]
