"""BertConfig: Hugging Face's config.json in and out, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import transformers

from fastbert import BertConfig

MINILM = {  # a config.json of 2021, with keys that have since gone
    "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.8.2",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}


NAMED = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}


def test_defaults_are_hugging_faces():
    theirs = transformers.BertConfig()
    for name, value in BertConfig().to_dict().items():
        assert getattr(theirs, name) == value, name


@pytest.mark.parametrize("changes", [{}, {"num_labels": 5}, NAMED])
def test_same_file_as_transformers(changes, tmp_path):
    transformers.BertConfig(**changes).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    ours = BertConfig.from_json(tmp_path / "config.json")
    written = json.loads(ours.to_json())
    assert theirs.items() <= written.items()
    assert written.keys() - theirs.keys() <= {"classifier_dropout"}
    (tmp_path / "config.json").write_text(ours.to_json())
    again = transformers.BertConfig.from_pretrained(tmp_path)
    assert again.num_labels == ours.num_labels and again.id2label == ours.id2label


def test_nothing_is_lost_on_the_way_through():
    written = json.loads(BertConfig.from_dict(MINILM).to_json())
    assert MINILM.items() <= written.items()
    assert BertConfig.from_dict(written) == BertConfig.from_dict(MINILM)
    labelled = {**MINILM, "id2label": {"0": "x", "1": "y", "2": "z"}, "problem_type": "regression"}
    config = BertConfig.from_dict(labelled)
    assert config.num_labels == 3 and config.label2id == {"x": 0, "y": 1, "z": 2}
    assert json.loads(config.to_json())["id2label"] == labelled["id2label"]
    assert BertConfig.from_dict(config.to_dict()) == config


def test_labels_follow_from_each_other():
    assert BertConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert BertConfig(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = BertConfig(id2label={0: "no", 1: "maybe", 2: "yes"})
    assert named.num_labels == 3 and named.label2id["maybe"] == 1
    assert named.replace(hidden_size=96, num_attention_heads=3).id2label == named.id2label
    assert named.replace(num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert named.replace(id2label={0: "one"}).num_labels == 1


def test_presets():
    sizes = {
        "tiny": (2, 128, 2, 512),
        "mini": (4, 256, 4, 1024),
        "small": (4, 512, 8, 2048),
        "medium": (8, 512, 8, 2048),
        "base": (12, 768, 12, 3072),
        "large": (24, 1024, 16, 4096),
    }
    for name, size in sizes.items():
        c = BertConfig.preset(name)
        assert (
            c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.intermediate_size
        ) == size  # fmt: skip
        assert c.head_dim == 64
    assert BertConfig.preset("base") == BertConfig()
    assert BertConfig.preset("tiny", vocab_size=100).vocab_size == 100
    with pytest.raises(ValueError, match="unknown name 'huge', expected one of tiny"):
        BertConfig.preset("huge")


def test_is_a_value():
    config = BertConfig(num_labels=3)
    assert hash(config) == hash(BertConfig(num_labels=3))
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    with pytest.raises(AttributeError):
        config.hidden_size = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 100}, r"hidden_size: got 100, expected a multiple .*\(12\)"),
        ({"hidden_size": 0}, "hidden_size: got 0, expected an int >= 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: got -1"),
        ({"vocab_size": 3.5}, "vocab_size: got 3.5"),
        ({"vocab_size": True}, "vocab_size: got True"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: got 1.0, expected 0 <= "),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob"),
        ({"classifier_dropout": 2}, "classifier_dropout"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob: got None"),
        ({"layer_norm_eps": 0}, "layer_norm_eps: got 0"),
        ({"initializer_range": float("nan")}, "initializer_range: got nan"),
        ({"hidden_act": "gelo"}, "hidden_act: got 'gelo', expected one of gelu"),
        ({"problem_type": "ranking"}, "problem_type: got 'ranking'"),
        ({"pad_token_id": 30522}, "pad_token_id: got 30522"),
        ({"num_labels": 0}, "num_labels: got 0"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "id2label: got 1 names for 3 labels"),
        ({"model_type": "roberta"}, "model_type: got 'roberta'.*transformers.*accelerate"),
        ({"is_decoder": True}, "is_decoder: got True; this encoder computes is_decoder = False"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: got 'relative_key'",
        ),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict(values)


def test_files_that_are_wrong(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="config.json"):
        BertConfig.from_json(path)
    for text, message in (("{", "not JSON"), ("[1]", "got a JSON list"), ("{}", None)):
        path.write_text(text)
        if message is None:
            assert BertConfig.from_json(path) == BertConfig()
            continue
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            BertConfig.from_json(path)
    path.write_text('{"vocab_size": -1}')
    with pytest.raises(ValueError, match="config.json: vocab_size: got -1"):
        BertConfig.from_json(path)
