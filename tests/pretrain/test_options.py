"""Options and presets: to JSON and back, changed, scaled; and what the papers say of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastbert import BertConfig
from fastbert.data import Corpus
from fastbert.pretrain import (
    PRESETS,
    Masking,
    Options,
    Phase,
    PretrainingModel,
    assignments,
    collate,
    preset,
    stack,
)
from fastbert.pretrain.options import OPTIMIZERS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(documentation: Corpus, name: str) -> None:
    """From its JSON to a loss, in every phase, on sequences that are shorter."""
    options = Options.from_json(PRESETS[name].options.to_json())
    assert options == PRESETS[name].options
    short = [Phase(length=64 + 32 * n, steps=2, batch=4) for n in range(len(options.phases))]
    options = options.changed(size="tiny", phases=short, warmup_steps=1, ramp_steps=1)
    config = options.config(documentation.vocab_size).replace(
        hidden_size=32, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1
    )
    model = PretrainingModel(config, options.objectives())
    for phase in options.phases:
        data = options.data(documentation, phase, seed=0)
        assert data.lengths.max() <= phase.length
        loss = model(collate([data[i] for i in range(3)])).loss
        assert torch.isfinite(loss)


def test_what_the_papers_say() -> None:
    bert = preset("bert-base")
    assert [(p.length, p.steps, p.batch, p.max_predictions) for p in bert.phases] == [
        (128, 900_000, 256, 20), (512, 100_000, 256, 80)
    ]  # fmt: skip
    assert (bert.duplicates, bert.short, bert.static) == (10, 0.1, True)
    assert (bert.learning_rate, bert.warmup_steps, bert.weight_decay) == (1e-4, 10_000, 0.01)
    assert (bert.betas, bert.eps, bert.bias_correction) == ((0.9, 0.999), 1e-6, False)
    roberta = preset("roberta")
    assert (roberta.betas[1], roberta.learning_rate, roberta.static) == (0.98, 5e-4, False)
    assert roberta.phases[0].batch == 2048 and roberta.source == "full-sentences"
    lamb = preset("bert-lamb")
    assert [(p.steps, p.batch) for p in lamb.phases] == [(7_038, 65_536), (1_563, 32_768)]
    assert (lamb.optimizer, lamb.learning_rate, lamb.phases[1].learning_rate) == (
        "lamb",
        6e-3,
        4e-3,
    )
    assert preset("spanbert").masking.span == "geometric:.2:10"
    assert preset("spanbert").masking.per == "group"
    assert preset("xlm").masking.alpha == 0.5 and preset("xlm").phases[0].length == 256
    assert preset("cramming").dropout == 0.0 and preset("cramming").ramp_start is not None
    assert preset("bert-stacked").stack == (3, 6, 12)
    assert preset("unk").masking.mask_token == "unk"
    assert {p.options.optimizer for p in PRESETS.values()} == set(OPTIMIZERS)


def test_changes() -> None:
    options = preset("roberta", rate=0.4, what="word", size="tiny", objective="mlm")
    assert options.masking == Masking(rate=0.4, what="word") and options.size == "tiny"
    (objective,) = options.objectives()
    assert objective.masking.rate == 0.4  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="options: got colour, expected some of .*objective"):
        options.changed(colour=1)
    with pytest.raises(ValueError, match="rate: plm masks nothing"):
        preset("xlnet", rate=0.4)
    with pytest.raises(ValueError, match="rate: got 2.0"):
        preset("roberta", rate=2.0)
    with pytest.raises(ValueError, match="preset: got 'berta', expected one of .*bert-base"):
        preset("berta")


def masked(options: Options) -> list[int]:
    """How many tokens of a full sequence of each phase are masked."""
    return [
        next(o for o in options.objectives(phase) if o.name == "mlm").masking.budget(phase.length)  # type: ignore[attr-defined]
        for phase in options.phases
    ]


def test_phases_have_their_own_max_predictions() -> None:
    options = preset("bert-base")
    assert masked(options) == [19, 77]  # round(.15 S), which 20 and 80 let through
    assert options.phases[0].batch_tokens == 128 * 256
    assert masked(options.changed(max_predictions=10)) == [10, 10]
    assert masked(options.changed(max_predictions=None, rate=0.5)) == [64, 256]


@pytest.mark.parametrize("name", ["bert-base", "bert-lamb", "structbert"])
def test_what_is_changed_is_not_overruled_by_the_phases(name: str) -> None:
    """Not by limits that were made for other rates and lengths, nor by a peak of their own."""
    for rate in (0.05, 0.15, 0.4, 0.5):
        options = preset(name, rate=rate)
        assert masked(options) == [round(rate * phase.length) for phase in options.phases]
        assert preset(name, masking=Masking(rate=rate)).phases == options.phases
    for length in (32, 64, 256, 1024):
        options = preset(name, length=length, rate=0.3)
        assert {phase.length for phase in options.phases} == {length}
        assert masked(options) == [round(0.3 * length)] * len(options.phases)
    assert (
        preset(name, rate=0.15, length=512).changed(rate=0.15).phases
        == preset(name, length=512).phases
    )
    lower = preset(name, learning_rate=preset(name).learning_rate / 2, batch=8)
    assert {phase.batch for phase in lower.phases} == {8}
    own = [phase.learning_rate for phase in lower.phases]
    assert own == [x and x / 2 for x in (phase.learning_rate for phase in preset(name).phases)]


def test_a_preset_from_a_file(tmp_path: Path) -> None:
    """As --show prints it, and as a run keeps it."""
    options, path = preset("albert", rate=0.3), tmp_path / "own.json"
    path.write_text(options.to_json())
    assert preset(str(path)) == options
    path.write_text(json.dumps({"corpus": "c", "options": json.loads(options.to_json())}))
    assert preset(str(path), size="tiny") == options.changed(size="tiny")
    for text, message in (
        ("{", "own.json: "),
        ('{"colour": 1}', "own.json: options: got colour"),
        ('{"options": 3}', "options: got a int, expected an object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            preset(str(path))


def test_assignments() -> None:
    texts = ["optimizer=lamb", "masking.alpha=0.5", "betas=[0.9,0.98]", "max_grad_norm=null",
             "objective_options.rtd.divisor=4", "objective_options.rtd.weight=25",
             "masking.replace=[1,0,0]", "static=true", "warmup_steps=100"]  # fmt: skip
    options = preset("xlm", **assignments(texts))
    assert (options.optimizer, options.betas, options.max_grad_norm) == ("lamb", (0.9, 0.98), None)
    assert options.masking == Masking(alpha=0.5, replace=(1.0, 0.0, 0.0))
    assert options.objective_options == {"rtd": {"divisor": 4, "weight": 25}}
    assert options.static and options.warmup_steps == 100
    more = options.changed(**assignments(["objective_options.rtd.divisor=2"]))
    assert more.objective_options == {"rtd": {"divisor": 2, "weight": 25}}
    for text, message in (
        ("optimizer", "set: got 'optimizer', expected name=value"),
        ("=3", "set: got '=3', expected name=value"),
        ("masking.alpha.x=1", "set: got 'masking.alpha.x', expected a name"),
        ("colour=1", "options: got colour, expected some of"),
        ("masking.colour=1", "options: got colour"),
        ("learning_rate=fast", "learning_rate: got 'fast', expected a number"),
        ("betas=[0.9]", r"betas: got \[0.9\], expected a list of 2 numbers"),
        ("stack=3", "stack: got 3, expected a list of whole numbers"),
        ("static=1", "static: got 1, expected true or false"),
        ("warmup_steps=true", "warmup_steps: got True, expected a whole number"),
        ("phases=3", "phases: got 3, expected a list of objects"),
        ("objective_options=3", "objective_options: got 3, expected an object"),
        ("objective_options.rtd.divisor=x", "objective rtd: divisor: got 'x', expected a whole"),
        ("masking.replace=[1,0]", r"replace: got \[1, 0\], expected a list of 3 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            preset("electra", **assignments([text]))
    with pytest.raises(ValueError, match="set: got objective_options both whole and in parts"):
        assignments(["objective_options.rtd.divisor=2", 'objective_options={"rtd": {}}'])
    with pytest.raises(ValueError, match="set: got masking.rate twice"):
        assignments(["masking.rate=.2", "masking.rate=.3"])
    with pytest.raises(ValueError, match="phases: got length beside them"):
        preset("minutes", length=64, phases=[{"length": 32, "steps": 9000, "batch": 2}])


@pytest.mark.parametrize("steps", [2, 3, 10, 1000, 123_457, 5_000_000])
def test_scaled(steps: int) -> None:
    scaled = preset("bert-lamb").scaled(steps)
    assert scaled.total_steps == steps and scaled.warmup_steps <= steps
    assert scaled.phases[0].steps == pytest.approx(7038 / 8601 * steps, abs=1)
    assert scaled.phases[0].batch == 65_536
    same = preset("bert-lamb").scaled(8601)
    assert same == preset("bert-lamb")


@pytest.mark.parametrize("shares", [(1, 1, 998), (998, 1, 1), (1, 998, 1)])
def test_every_phase_keeps_a_step(shares: tuple[int, ...]) -> None:
    phases = tuple(Phase(64, steps, 4) for steps in shares)
    scaled = Options(phases=phases, warmup_steps=0).scaled(3)
    assert [phase.steps for phase in scaled.phases] == [1, 1, 1]


def test_config(tmp_path: Path) -> None:
    config = Options(size="mini", dropout=0.0).config(1234)
    assert config == BertConfig.preset(
        "mini", vocab_size=1234, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "hidden_size": 48, "num_attention_heads": 3,
                                "max_position_embeddings": 256}))  # fmt: skip
    own = Options(size=str(path), phases=(Phase(256, 10, 2),), warmup_steps=1).config(99)
    assert (own.hidden_size, own.vocab_size, own.hidden_dropout_prob) == (48, 99, 0.1)
    with pytest.raises(ValueError, match="phases: got a length of 512, expected at most"):
        Options(size=str(path)).config(99)
    long = Options(size="tiny", phases=(Phase(1024, 10, 2),), warmup_steps=1).config(99)
    assert long.max_position_embeddings == 1024
    with pytest.raises(ValueError, match="preset: unknown name 'huge'"):
        Options(size="huge").config(99)


def test_bad_options() -> None:
    for options, message in (
        ({"source": "books"}, "source: got 'books', expected one of pairs"),
        ({"optimizer": "sgd"}, "optimizer: got 'sgd', expected one of adamw, lamb"),
        ({"schedule": "none"}, "schedule: got 'none', expected one of linear"),
        ({"phases": ()}, "phases: got none"),
        ({"stack": (3, 12)}, r"stack: got \(3, 12\), expected each to be twice"),
        ({"stack": (1, 2, 4, 8)}, r"stack: got \(1, 2, 4, 8\), expected up to 3 numbers"),
        ({"stack": (0, 0)}, r"stack: got \(0, 0\), expected up to 3 numbers of 1 or more"),
        ({"warmup_steps": 2_000_000}, "warmup_steps: got 2000000"),
        ({"objective": "mlm+abc"}, "objective: got 'abc'"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**options)
    for values, message in (
        ({"length": 4, "steps": 1, "batch": 1}, "length: got 4, expected 8 or more"),
        ({"length": 8, "steps": 0, "batch": 1}, "steps: got 0, expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Phase(**values)
    for text, message in (
        ("[]", "options: got a list, expected an object"),
        ("{", "options: "),
        ('{"colour": 1}', "options: got colour, expected some of"),
        ('{"masking": {"what": "letter"}}', "options: what: got 'letter'"),
        ('{"phases": [{"length": 8}]}', "options: .*missing"),
    ):
        with pytest.raises(ValueError, match=message):
            Options.from_json(text)
    with pytest.raises(ValueError, match="steps: got 1, expected 2 or more, a phase"):
        preset("bert-lamb").scaled(1)


# --- stacking ---------------------------------------------------------------------------------


def test_stack() -> None:
    """Layers i and i + L are copies of layer i; everything else stays; moments go the same way."""
    from ._models import CONFIG, batch_of, model_of, texts

    objectives = preset("bert-base").objectives()
    shallow = model_of(objectives)
    shallow(batch_of(objectives, texts(9, 12))).loss.backward()
    deep = PretrainingModel(CONFIG.replace(num_hidden_layers=6), objectives).double()
    stacked = stack(shallow.state_dict())
    deep.load_state_dict(stacked)
    for layer in range(6):
        for name, tensor in shallow.bert.encoder.layer[layer % 3].state_dict().items():
            assert torch.equal(stacked[f"bert.encoder.layer.{layer}.{name}"], tensor)
    own, copied = stacked["bert.encoder.layer.0.output.dense.bias"], "bert.encoder.layer.3.output"
    assert own.data_ptr() != stacked[f"{copied}.dense.bias"].data_ptr()

    moments = {
        name: {"exp_avg": p.grad, "exp_avg_sq": p.grad**2, "step": torch.tensor(3.0)}
        for name, p in shallow.named_parameters()
    }
    grown = stack(moments)
    assert set(grown) == {name for name, _ in deep.named_parameters()}
    for name, state in grown.items():
        part = name.replace("layer.3.", "layer.0.").replace("layer.4.", "layer.1.")
        below = moments[part.replace("layer.5.", "layer.2.")]
        assert state.keys() == below.keys()
        assert all(torch.equal(state[key], below[key]) for key in state)

    with torch.no_grad():  # twice the layers, once over what they compute
        batch = batch_of(objectives, texts(9)).inputs
        hidden = shallow.bert.encode(batch, False, False)[0]
        twice = shallow.bert.encoder(hidden, batch, _plain_pass())[0]
        torch.testing.assert_close(deep.bert.encode(batch, False, False)[0], twice)


def _plain_pass() -> object:
    from fastbert.nn.layer import Pass

    return Pass()


def test_stack_leaves_a_generator_alone() -> None:
    named = {
        "bert.encoder.layer.0.w": 1, "bert.encoder.layer.1.w": 2,
        "heads.rtd.generator.encoder.layer.0.w": 3, "bert.embeddings.w": 4,
    }  # fmt: skip
    assert stack(named) == {**named, "bert.encoder.layer.2.w": 1, "bert.encoder.layer.3.w": 2}
    assert stack({"encoder.layer.0.w": 1}, within="") == {
        "encoder.layer.0.w": 1, "encoder.layer.1.w": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"named: got layers \[1\] in bert\., expected all from 0"):
        stack({"bert.encoder.layer.1.w": 1})
    with pytest.raises(ValueError, match=r"named: got layers \[\]"):
        stack({"w": 1})
