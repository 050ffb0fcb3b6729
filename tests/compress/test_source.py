"""What folders say: sentence-transformers' modules in old and new form, limits, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from fastbert.compress.source import load_float, text_settings, tokenizer_json

MODULES = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_N", "models.Normalize")]


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def modules(count: int = 3, first: str = "") -> list[dict[str, str]]:
    listed = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in MODULES]
    listed[0]["path"] = first
    return listed[:count]


def test_an_unknown_source_and_a_plain_folder(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        facts = text_settings(folder, 512)
        assert facts["max_length"] == 512 and facts["pooling"] == "mean" and not facts["normalize"]
    write(tmp_path, tokenizer_config={"model_max_length": 10**30})
    assert text_settings(tmp_path, 512)["max_length"] == 512
    write(tmp_path, tokenizer_config={"model_max_length": 128})
    assert text_settings(tmp_path, 512)["max_length"] == 128
    assert text_settings(tmp_path, 64)["max_length"] == 64


def test_sentence_transformers_old_and_new(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write(
        old, modules=modules(), sentence_bert_config={"max_seq_length": 256, "do_lower_case": True},
        **{"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": 0}},
    )  # fmt: skip
    facts = text_settings(old, 512)
    assert facts["pooling"] == "cls" and facts["normalize"] and facts["lower_case"]
    assert facts["max_length"] == 256 and facts["prompts"] == {}
    write(
        new, modules=modules(2), tokenizer_config={"model_max_length": 100},
        config_sentence_transformers={"prompts": {"q": "query: "}, "default_prompt_name": "q"},
        **{"1_Pooling__config": {"pooling_mode": "max", "include_prompt": True}},
    )  # fmt: skip
    facts = text_settings(new, 512)
    assert facts["pooling"] == "max" and not facts["normalize"] and facts["max_length"] == 100
    assert facts["prompts"] == {"q": "query: "} and facts["default_prompt"] == "q"


def test_the_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write(
        tmp_path, modules=modules(first="0_Transformer"),
        **{"0_Transformer__sentence_bert_config": {"max_seq_length": 77},
           "1_Pooling__config": {"pooling_mode_max_tokens": True}},
    )  # fmt: skip
    facts = text_settings(tmp_path / "0_Transformer", 512)
    assert facts["max_length"] == 77 and facts["pooling"] == "max" and facts["normalize"]


@pytest.mark.parametrize(
    "config", [{"pooling_mode": "lasttoken"}, {"pooling_mode": "mean", "include_prompt": False},
               {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}],
)  # fmt: skip
def test_pooling_that_is_not_here(config: Any, tmp_path: Path) -> None:
    write(tmp_path, modules=modules(), **{"1_Pooling__config": config})
    with pytest.raises(ValueError, match="1_Pooling.*expected one of mean, cls, max"):
        text_settings(tmp_path, 512)


def test_modules_that_are_not_here(tmp_path: Path) -> None:
    dense = {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    write(tmp_path, modules=[*modules(), dense], **{"1_Pooling__config": {}})
    with pytest.raises(ValueError, match="modules.json.*Dense"):
        text_settings(tmp_path, 512)


def test_tokenizers(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "Cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write(tmp_path, tokenizer_config={"do_lower_case": False})
    made = Tokenizer.from_str(str(tokenizer_json(None, tmp_path)))
    assert made.encode("Cat cat").ids == [2, 6, 5, 3]
    fast = BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, do_lower_case=True)
    assert Tokenizer.from_str(str(tokenizer_json(fast, None))).encode("Cat").ids == [2, 5, 3]
    assert tokenizer_json(made, None) == made.to_str()
    (tmp_path / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    assert tokenizer_json(None, tmp_path) == made.to_str()
    assert tokenizer_json(None, tmp_path / "nothing") is tokenizer_json(None, None) is None
    with pytest.raises(ValueError, match="tokenizer: got str"):
        tokenizer_json("bert-base-uncased", None)


def test_load_float(tmp_path: Path) -> None:
    from ..hf._models import tiny

    tiny("BertForSequenceClassification").save_pretrained(tmp_path / "bert")
    tiny("ElectraForTokenClassification").save_pretrained(tmp_path / "electra")
    native, foreign = (load_float(tmp_path / name) for name in ("bert", "electra"))
    assert type(native).__module__ == "fastbert.models.tasks"
    assert type(foreign).__name__ == "ElectraForTokenClassification"
    with pytest.raises(ValueError, match="config.json"):
        load_float(tmp_path)
