"""Training: dropout, checkpointing, mixed precision, Trainer, LoRA and the loss without logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    Trainer,
    TrainingArguments,
)

from fastbert.hf import accelerate, explain, restore
from fastbert.ops import linear_cross_entropy

from ._models import (
    FAMILY_NAMES,
    batch_for,
    check_parity,
    masked_lm,
    pair,
    run,
    tiny,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")
CHECKPOINTED = [name for name in FAMILY_NAMES if name != "albert"]  # as in transformers


def test_dropout_follows_the_seed() -> None:
    model = accelerate(tiny("BertForPreTraining", dropout=0.2)).train()
    batch = batch_for("BertForPreTraining")
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss)
    assert torch.isfinite(losses[0]) and losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_dropout_everywhere_that_the_original_has_it(family: str) -> None:
    """With one Dropout alone switched on, the loss moves where the original's does."""
    name = masked_lm(family)
    models = pair(name)
    batch = batch_for(name)
    sites = [n for n, m in models[0].named_modules() if isinstance(m, torch.nn.Dropout)]
    assert len(sites) >= 3
    for site in sites:
        moved = []
        for model in models:
            still = model(**batch).loss
            dropout = model.get_submodule(site)
            for training in (True, False):
                dropout.p = 0.5 * training
                model.train(training)
                if training:
                    moved.append(not torch.equal(model(**batch).loss, still))
        assert moved[0] == moved[1], site


def test_eval_mode_leaves_the_generator_alone() -> None:
    model = accelerate(tiny("BertForPreTraining", dropout=0.2))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model(**batch_for("BertForPreTraining"))
    assert torch.equal(torch.rand(3), expected)


def test_monte_carlo_dropout() -> None:
    """Dropout modules in training mode inside a model in eval mode drop, as in the original."""
    model = accelerate(tiny("BertModel", dropout=0.2))
    batch = batch_for("BertModel")
    still = model(**batch)[0]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    assert not torch.equal(model(**batch)[0], still)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    name = masked_lm(family)
    plain = accelerate(tiny(name, dropout=0.1)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = count_layer_calls(checkpointed)
    batch = batch_for(name)
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(7)
        results.append(run(model, batch))
    assert len(calls) == 2 * 3  # once forward, once again for backward: never checkpointed twice
    assert torch.equal(results[0].loss, results[1].loss)
    for key, gradient in results[0].gradients.items():
        assert torch.equal(gradient, results[1].gradients[key]), key
    checkpointed.gradient_checkpointing_disable()
    torch.manual_seed(7)
    assert torch.equal(checkpointed(**batch).loss, results[0].loss)


def count_layer_calls(model: Any) -> list[int]:
    """Grows with every computation of a layer, also those inside a checkpoint."""
    calls: list[int] = []
    for module in model.modules():
        if type(module).__name__ in ("BertAttention", "DistilBertSelfAttention"):
            continue
        replacement = module.__dict__.get("forward")
        if type(replacement).__name__ == "FusedLayer":
            packed = replacement._packed

            def counted(*args: Any, packed: Any = packed) -> Any:
                calls.append(1)
                return packed(*args)

            replacement._packed = counted
    return calls


def test_checkpointing_in_a_restored_model() -> None:
    original, ours = pair("BertForMaskedLM")
    restore(ours).train().gradient_checkpointing_enable()
    check_parity(original, ours, batch_for("BertForMaskedLM"))


def test_frozen_embeddings_with_reentrant_checkpointing() -> None:
    """peft's recipe: embeddings frozen, their output made to require gradients by a hook."""
    name = "BertForMaskedLM"
    original, ours = pair(name)
    for model in (original, ours):
        model.train()
        model.bert.embeddings.requires_grad_(False)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    check_parity(original, ours, batch_for(name))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_autocast(family: str) -> None:
    name = masked_lm(family)
    original, ours = pair(name)
    batch = batch_for(name)
    oracle = run(copy.deepcopy(original).double(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = run(original, batch), run(ours, batch)
    assert mine.loss is not None and theirs.loss is not None and oracle.loss is not None
    assert mine.loss.dtype == theirs.loss.dtype
    error, reference = (abs(float(r.loss.detach() - oracle.loss.detach())) for r in (mine, theirs))
    assert error <= 2 * reference + 2**-8 * float(oracle.loss.detach())
    largest = max(float(g.norm()) for g in oracle.gradients.values())
    for key, expected in oracle.gradients.items():
        assert mine.gradients[key].dtype == torch.float32
        errors = [float((r.gradients[key].double() - expected).norm()) for r in (mine, theirs)]
        # The gradient of a key bias is 0 but for rounding: hence the share of the largest.
        atol = 2**-8 * (float(expected.norm()) + largest)
        assert errors[0] <= 2 * errors[1] + atol, key


def test_autocast_returns_the_originals_dtype() -> None:
    original, ours = pair("BertModel")
    batch = batch_for("BertModel")
    with torch.autocast("cpu", torch.bfloat16):
        expected = original(**batch, output_hidden_states=True)
        output = ours(**batch, output_hidden_states=True)
    assert output[0].dtype == expected[0].dtype == torch.float32
    assert output.hidden_states[1].dtype == expected.hidden_states[1].dtype
    assert output.pooler_output.dtype == expected.pooler_output.dtype


# --- the loss without logits --------------------------------------------------------------------

LANGUAGE_MODELS = [masked_lm(f) for f in FAMILY_NAMES] + [
    "BertForPreTraining",
    "AlbertForPreTraining",
]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_skip_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(tiny(name))
    batch = batch_for(name)
    full = run(model, batch)
    accelerate(model, skip_logits=True)
    calls = []
    monkeypatch.setattr(
        "fastbert.hf.losses.linear_cross_entropy",
        lambda *args: calls.append(args[0].shape) or linear_cross_entropy(*args),
    )
    skipped = run(model, batch)
    assert calls == [
        (int((batch["labels"] != -100).sum()), model.get_output_embeddings().in_features)
    ]
    field = "prediction_logits" if "PreTraining" in name else "logits"
    assert field in full.outputs and field not in skipped.outputs
    assert skipped.loss is not None and full.loss is not None
    torch.testing.assert_close(skipped.loss, full.loss)
    for key, gradient in full.gradients.items():
        torch.testing.assert_close(skipped.gradients[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    del batch["labels"]
    assert model(**batch)[field].shape == (4, 11, 97)


def test_skip_logits_with_a_decoder_that_is_wrapped_or_untied() -> None:
    name = "BertForMaskedLM"
    original, ours = pair(name, tie_word_embeddings=False)
    accelerate(ours, skip_logits=True)
    batch = batch_for(name)
    torch.testing.assert_close(ours(**batch).loss, original(**batch).loss)
    for model in (original, ours):
        model.cls.predictions.decoder.register_forward_hook(lambda m, a, y: y * 1.2)
    torch.testing.assert_close(ours(**batch).loss, original(**batch).loss)
    for model in (original, ours):
        model.cls.predictions.register_forward_hook(lambda m, a, y: y + torch.arange(97) / 97)
    torch.testing.assert_close(ours(**batch).loss, original(**batch).loss)
    assert ours(**batch).logits is None or not ours(**batch).logits.numel()


def test_skip_logits_without_any_label() -> None:
    original, ours = pair("BertForMaskedLM")
    batch = batch_for("BertForMaskedLM")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    accelerate(ours, skip_logits=True)
    assert original(**batch).loss.isnan() and ours(**batch).loss.isnan()


# --- Trainer ------------------------------------------------------------------------------------


def rows_for_trainer() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (24,), generator=g).tolist()
    return [
        {"input_ids": torch.randint(2, 97, (n,), generator=g).tolist(), "labels": n % 3,
         "unused column": 1}
        for n in lengths
    ]  # fmt: skip


class Pad:
    """Pads a list of rows to its longest, as DataCollatorWithPadding does with a tokenizer."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        assert all("unused column" not in row for row in rows)
        ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_trainer(changes: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for model in pair("BertForSequenceClassification"):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=6, use_cpu=True,
            learning_rate=1e-3, report_to=[], logging_steps=1, save_strategy="no", seed=0,
            disable_tqdm=True, **changes,
        )  # fmt: skip
        rows = rows_for_trainer()
        trainer = Trainer(
            model, arguments, data_collator=Pad(), train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        prediction = trainer.predict(rows)
        assert prediction.predictions.shape == (24, 3)
        results.append((torch.tensor(losses), prediction.metrics["test_loss"]))
        trainer.save_model(str(tmp_path / "saved"))
        assert not explain(accelerate(model)).to_json().count("calls so far")
    (theirs, their_test), (mine, my_test) = results
    tolerance = 3e-2 if "bf16" in changes else 1e-4
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert my_test == pytest.approx(their_test, rel=tolerance)


# --- LoRA ---------------------------------------------------------------------------------------


def lora(model: Any, **changes: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **changes)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("before", [True, False], ids=["peft then accelerate", "accelerate first"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BertForSequenceClassification",
         {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        ("RobertaForSequenceClassification",
         {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("DistilBertForMaskedLM", {"target_modules": ["q_lin", "lin1"]}),
        ("BertForMaskedLM", {"target_modules": ["word_embeddings", "dense"]}),
        ("ElectraForTokenClassification",
         {"target_modules": ["key"], "modules_to_save": ["classifier"]}),
    ],
)  # fmt: skip
def test_lora(name: str, changes: dict[str, Any], before: bool) -> None:
    original = lora(tiny(name), **changes)
    if before:
        ours = accelerate(lora(tiny(name), **changes))
    else:
        ours = lora(accelerate(tiny(name)), **changes)
    check_parity(original, ours, batch_for(name))
    text = str(explain(ours))
    assert "as it is" in text or "not a plain Embedding" in text


def test_lora_merged_is_fused_again() -> None:
    ours = accelerate(lora(tiny("BertModel"), target_modules=["query"]))
    batch = batch_for("BertModel")
    adapted = ours(**batch)[0]
    assert "query: Linear" in str(explain(ours))
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(**batch)[0], adapted, rtol=1e-4, atol=1e-5)
    assert "query" not in str(explain(merged))


def test_prefix_tuning_takes_the_original_path() -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    results = []
    for model in pair("BertForSequenceClassification"):
        torch.manual_seed(0)
        batch = batch_for("BertForSequenceClassification")
        results.append(peft.get_peft_model(model, config).eval()(**batch).logits)
    torch.testing.assert_close(*results)
