"""What a model's folder says beside its weights: tokenizer, longest text, pooling, prompts.

A folder of sentence-transformers lists its modules in modules.json; of others only the tokenizer's
files are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fastbert import models
from fastbert.hf.quantized import load_float as load_with_transformers
from fastbert.models.quantized import MODEL_NAMES


def load_float(folder: str | Path) -> nn.Module:
    """The float model of a Hugging Face or sentence-transformers folder, of the class that its
    config.json names: fastbert's own for BERTs, else that of transformers. Nothing is downloaded.

    Raises ValueError where nothing, or no such model, is there.
    """
    folder = Path(folder)
    if (folder / "modules.json").is_file():
        folder = _read_modules(folder, {})
    config = _object(folder / "config.json")
    if not config:
        raise ValueError(f"{folder}: holds no config.json, expected a Hugging Face folder")
    check_plain(config)
    name = (config.get("architectures") or ["BertModel"])[0]
    if config.get("model_type", "bert") == "bert" and name in MODEL_NAMES:
        return getattr(models, name).from_pretrained(folder)
    return load_with_transformers(folder)


def check_plain(config: Any) -> None:
    """Raises ValueError for a model to which ``fastbert.finetune``'s methods have added parts that
    stay: adapters, say. config: of the model, or what its config.json holds."""
    values = config if isinstance(config, dict) else getattr(config, "extra", vars(config))
    methods = values.get("finetune_methods")
    if methods:
        raise ValueError(
            f"model: was fine-tuned with {', '.join(methods)}, which leaves it parts that are not "
            "quantised; expected a plain one"
        )


_NOT_A_LIMIT = 10**6  # transformers writes 10^30 where a tokenizer has no longest length
# The flags of Pooling's config.json before sentence-transformers 6 -> the mode as named since then.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLINGS = ("mean", "cls", "max")


def text_settings(folder: Path | None, positions: int) -> dict[str, Any]:
    """The facts max_length, pooling, normalize, lower_case, prompts and default_prompt.

    folder: where the model came from, None if that is not known.  positions: the longest sequence
    of the encoder.  Raises ValueError for sentence-transformers modules that nothing here computes.
    """
    facts: dict[str, Any] = {
        "max_length": positions,
        "pooling": "mean",
        "normalize": False,
        "lower_case": False,
        "prompts": {},
        "default_prompt": None,
    }
    if folder is None:
        return facts
    lengths = [_object(folder / "tokenizer_config.json").get("model_max_length")]
    # Older versions of sentence-transformers put their first module into a folder of its own.
    outside = folder.parent if folder.name == "0_Transformer" else folder
    if (outside / "modules.json").is_file():
        _read_modules(outside, facts)
        own = _object(folder / "sentence_bert_config.json")
        lengths.append(own.get("max_seq_length"))
        facts["lower_case"] = bool(own.get("do_lower_case", False))
        outer = _object(outside / "config_sentence_transformers.json")
        facts["prompts"] = dict(outer.get("prompts") or {})
        facts["default_prompt"] = outer.get("default_prompt_name")
    limits = [n for n in lengths if isinstance(n, int) and 0 < n < _NOT_A_LIMIT]
    facts["max_length"] = min([positions, *limits])
    return facts


def _read_modules(folder: Path, facts: dict[str, Any]) -> Path:
    """Pooling and normalisation of a sentence-transformers folder; returns its transformer's."""
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf-8"))
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    wanted = ["Transformer", "Pooling"]
    if kinds not in (wanted, [*wanted, "Normalize"]):
        raise ValueError(
            f"{path}: got {', '.join(kinds)}, expected Transformer, Pooling and perhaps Normalize"
        )
    facts["normalize"] = "Normalize" in kinds
    pooling = folder / modules[1]["path"] / "config.json"
    config = _object(pooling)
    mode: Any = config.get("pooling_mode")
    if mode is None:
        flags = [name for flag, name in _FLAGS.items() if config.get(flag)]
        mode = flags[0] if len(flags) == 1 else flags or "mean"
    if mode not in _POOLINGS or config.get("include_prompt", True) is not True:
        raise ValueError(
            f"{pooling}: got pooling {mode!r}, include_prompt {config.get('include_prompt')}, "
            f"expected one of {', '.join(_POOLINGS)}, with include_prompt"
        )
    facts["pooling"] = mode
    return folder / modules[0]["path"]


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def tokenizer_json(tokenizer: Any, folder: Path | None) -> str | None:
    """The text of a tokenizer.json: of ``tokenizer`` if it is given, else of the model's folder.

    tokenizer: of tokenizers, of transformers (a fast one), or None. A folder with nothing but a
    vocab.txt is BERT's WordPiece.
    """
    if tokenizer is not None:
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(inner, "to_str"):
            raise ValueError(
                f"tokenizer: got {type(tokenizer).__name__}, expected a tokenizers.Tokenizer or a "
                "fast tokenizer of transformers"
            )
        return inner.to_str()
    if folder is None:
        return None
    if (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json").read_text(encoding="utf-8")
    if (folder / "vocab.txt").is_file():
        from tokenizers import BertWordPieceTokenizer

        config = _object(folder / "tokenizer_config.json")
        lower = config.get("do_lower_case", True)
        pieces = BertWordPieceTokenizer(
            str(folder / "vocab.txt"),
            lowercase=lower,
            strip_accents=config.get("strip_accents"),
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        )
        return pieces._tokenizer.to_str()
    return None
