"""torch.compile around accelerated models: one graph, whatever the mask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from fastbert.hf import accelerate, explain, register_attention, restore

from ._models import (
    COLUMNS,
    FAMILY_NAMES,
    MODEL_NAMES,
    batch_for,
    check_parity,
    family_of_class,
    lengths_mask,
    masked_lm,
    pair,
    run,
    tiny,
)

BACKEND = "aot_eager"  # all of Dynamo and AOTAutograd, without waiting for a C++ compiler
LENGTHS = ((11, 1, 7, 4), (3, 9, 11, 11), (0, 5, 0, 1))
_ONE_LAYER: dict[str, dict[str, Any]] = {
    "distilbert": {"n_layers": 1},
    "albert": {"num_hidden_layers": 1, "num_hidden_groups": 1, "inner_group_num": 1},
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def small_pair(name: str, **changes: Any) -> tuple[Any, Any]:
    """As ``pair``, but of one layer: tracing takes as long as there are layers."""
    layers = _ONE_LAYER.get(family_of_class(name), {"num_hidden_layers": 1})
    return pair(name, **layers, **changes)


def compiled_in_place(model: Any, backend: str | Callable[..., Any] = BACKEND) -> Any:
    """A copy of ``model`` that is one compiled graph."""
    twin = copy.deepcopy(model)
    twin.compile(backend=backend, fullgraph=True)
    return twin


def no_recompilation() -> Any:
    return torch.compiler.set_stance("fail_on_recompile")


def check_same(compiled: Any, eager: Any, batch: dict[str, Any], **kwargs: Any) -> None:
    """Outputs, loss and gradients of a compiled model are the eager one's, dropout included."""
    results = []
    for model in (eager, compiled):
        torch.manual_seed(5)
        results.append(run(model, batch, **kwargs))
    expected, result = results
    torch.testing.assert_close(result.outputs, expected.outputs)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.gradients, expected.gradients, rtol=1e-4, atol=1e-5)


# A graph takes seconds to trace: in short, every kind of head once, on the family of most heads.
_ALL = [
    name if name.startswith("Bert") else pytest.param(name, marks=pytest.mark.slow)
    for name in MODEL_NAMES
]


@pytest.mark.parametrize("name", _ALL)
def test_one_graph_for_every_mask(name: str) -> None:
    """In training, with the dropout that eager mode draws from the same seed."""
    _, ours = small_pair(name, dropout=0.2)
    ours.config.problem_type = "single_label_classification"
    compiled = compiled_in_place(ours.train())
    check_same(compiled, ours, batch_for(name))
    with no_recompilation():
        for seed, lengths in enumerate(LENGTHS):
            check_same(compiled, ours, batch_for(name, lengths_mask(lengths), seed))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_equals_the_original(family: str) -> None:
    name = masked_lm(family)
    original, ours = small_pair(name)
    compiled = compiled_in_place(ours)
    check_parity(original, compiled, batch_for(name))
    with no_recompilation():
        check_parity(original, compiled, batch_for(name, lengths_mask(side="left")))
    batch = batch_for(name, lengths_mask((COLUMNS,) * 4))
    del batch["attention_mask"]
    check_parity(original, compiled, batch)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForSequenceClassification"])
def test_other_shapes_are_one_more_compilation(name: str) -> None:
    _, ours = small_pair(name)
    ours.config.problem_type = "single_label_classification"
    compiled = compiled_in_place(ours)
    mask = lengths_mask()
    check_same(compiled, ours, batch_for(name, mask))
    check_same(compiled, ours, batch_for(name, mask[:3, :9]))
    with no_recompilation():
        for rows, columns in ((2, 10), (4, 11), (3, 4)):
            check_same(compiled, ours, batch_for(name, mask[:rows, :columns]))


class Pooled(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return {"embedding": self.scale * (hidden * mask).sum(1) / mask.sum(1)}


def test_a_model_inside_a_module_of_the_users_own() -> None:
    """Without fullgraph, and without the switches over all code that unknown sizes mostly need."""
    original, ours = (Pooled(model) for model in small_pair("BertModel"))
    graphs = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, backend=count)
    for lengths in ((11, 1, 7, 4), (11, 11, 2, 5), (3, 9, 11, 11), (11, 1, 1, 1)):
        batch = batch_for("BertModel", lengths_mask(lengths))
        expected = original(**batch)["embedding"]
        torch.testing.assert_close(compiled(**batch)["embedding"], expected)
    assert len(graphs) == 1 and not counters["graph_break"]


def test_hidden_states() -> None:
    _, ours = small_pair("BertForTokenClassification")
    compiled = compiled_in_place(ours)
    batch = batch_for("BertForTokenClassification")
    result, expected = (m(**batch, output_hidden_states=True) for m in (compiled, ours))
    assert len(result.hidden_states) == 2
    torch.testing.assert_close(result.hidden_states, expected.hidden_states)


def test_tuples_and_embeddings_in() -> None:
    original, ours = small_pair("BertModel")
    batch = batch_for("BertModel")
    batch["inputs_embeds"] = original.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    result = compiled_in_place(ours)(**batch, return_dict=False)
    torch.testing.assert_close(result, ours(**batch, return_dict=False))


def test_loss_without_logits() -> None:
    original, ours = small_pair("BertForMaskedLM")
    compiled = compiled_in_place(accelerate(ours, skip_logits=True))
    for seed in (1, 2):
        batch = batch_for("BertForMaskedLM", seed=seed)
        output = compiled(**batch)
        assert output.logits is None
        torch.testing.assert_close(output.loss, original(**batch).loss)


def test_autocast() -> None:
    _, ours = small_pair("BertForMaskedLM", dropout=0.1)
    compiled = compiled_in_place(ours.train())
    with torch.autocast("cpu", torch.bfloat16):
        for lengths in LENGTHS:
            batch = batch_for("BertForMaskedLM", lengths_mask(lengths))
            losses = []
            for model in (ours, compiled):
                torch.manual_seed(5)
                losses.append(model(**batch).loss)
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")
def test_linears_with_a_lora() -> None:
    name = "BertForSequenceClassification"
    original, ours = small_pair(name, problem_type="single_label_classification")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    torch.manual_seed(0)
    ours = peft.get_peft_model(ours, config)
    compiled = compiled_in_place(ours)
    check_same(compiled, ours, batch_for(name))
    with no_recompilation():
        check_same(compiled, ours, batch_for(name, lengths_mask(LENGTHS[1])))


@pytest.mark.parametrize("path", ["encoder.layer.0.output", "embeddings", "pooler"])
def test_what_is_left_alone(path: str) -> None:
    """Layers, embeddings and heads that are not fused are part of the graph, and are counted."""
    _, ours = small_pair("BertModel")
    ours.get_submodule(path).register_forward_hook(lambda m, args, y: y * 1.5)
    compiled = compiled_in_place(ours)
    check_same(compiled, ours, batch_for("BertModel"))
    with no_recompilation():
        for lengths in LENGTHS:
            check_same(compiled, ours, batch_for("BertModel", lengths_mask(lengths)))
    assert (path == "pooler") or f"{path.rpartition('.')[2]} has hooks" in str(explain(compiled))


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")
def test_gradient_checkpointing() -> None:
    """With frozen embeddings whose dropout is off: the first seed is asked for in a checkpoint."""
    _, ours = small_pair("BertForMaskedLM", attention_probs_dropout_prob=0.2)
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    ours.bert.embeddings.requires_grad_(False)
    ours.enable_input_require_grads()
    compiled = compiled_in_place(ours)
    check_same(compiled, ours, batch_for("BertForMaskedLM"))
    with no_recompilation():
        check_same(compiled, ours, batch_for("BertForMaskedLM", lengths_mask(LENGTHS[1])))


def flattened() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 90, (1, 9))
    return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (flattened(), "flattened"),
        ({**batch_for("BertModel"), "output_attentions": True}, "output_attentions"),
    ],
)
def test_what_runs_between_two_graphs(
    given: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, ours = small_pair("BertModel", attn_implementation="eager")
    compiled = torch.compile(ours, backend=BACKEND)
    for _ in range(2):
        torch.testing.assert_close(compiled(**given).to_tuple(), ours(**given).to_tuple())
    (row,) = (row for row in explain(ours).rows if row["takes"] == "between graphs")
    assert reason in row["what"] and row["why"].startswith("2 ")
    assert reason in caplog.text
    torch.compiler.reset()
    with pytest.raises(Exception, match="fastbert has logged why"):
        torch.compile(ours, backend=BACKEND, fullgraph=True)(**given)


def test_restored_and_copied() -> None:
    original, ours = small_pair("BertForMaskedLM")
    batch = batch_for("BertForMaskedLM")
    compiled = torch.compile(ours, backend=BACKEND, fullgraph=True)
    torch.testing.assert_close(compiled(**batch).loss, original(**batch).loss)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(compiled(**batch).loss, original(**batch).loss)
    again = torch.compile(twin, backend=BACKEND, fullgraph=True)
    torch.testing.assert_close(again(**batch).loss, twin(**batch).loss)
    restore(ours)
    torch.testing.assert_close(compiled(**batch).logits, original(**batch).logits)


def test_compiled_attention_interface() -> None:
    """One graph for every mask, without breaks, with the gradients of the original."""
    register_attention()
    original, ours = tiny("BertModel"), tiny("BertModel")
    ours.set_attn_implementation("fastbert")
    compiled = torch.compile(ours, backend=BACKEND, fullgraph=True)
    for lengths in LENGTHS:
        batch = batch_for("BertModel", lengths_mask(lengths))
        mask = batch["attention_mask"] != 0
        expected, output = original(**batch)[0][mask], compiled(**batch)[0][mask]
        torch.testing.assert_close(output, expected)
        for model, x in ((original, expected), (ours, output)):
            model.zero_grad()
            (x**3).mean().backward()
        for p, q in zip(ours.parameters(), original.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    del batch["attention_mask"]
    torch.testing.assert_close(compiled(**batch)[0], original(**batch)[0])


def test_layers_compiled_one_by_one_under_the_attention_interface() -> None:
    """Their mask comes from outside of the graph, and its lengths do not compile anything anew."""
    register_attention()
    original, ours = tiny("BertModel"), tiny("BertModel")
    ours.set_attn_implementation("fastbert")
    for layer in ours.encoder.layer:
        layer.compile(backend=BACKEND, fullgraph=True)
    for lengths in LENGTHS:
        batch = batch_for("BertModel", lengths_mask(lengths))
        mask = batch["attention_mask"] != 0
        torch.testing.assert_close(ours(**batch)[0][mask], original(**batch)[0][mask])
    assert counters["stats"]["unique_graphs"] <= len(ours.encoder.layer)


def test_export_takes_the_original_path() -> None:
    original, ours = pair("BertModel")
    batch = batch_for("BertModel")
    program = torch.export.export(ours, (), batch, strict=False)
    other = batch_for("BertModel", seed=5)
    mask = other["attention_mask"] != 0
    output = program.module()(**other)[0]
    torch.testing.assert_close(output[mask], original(**other)[0][mask])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "RobertaForSequenceClassification", "BertForQuestionAnswering"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_inductor(name: str, dropout: float) -> None:
    """In training. Where inductor is told to draw eager mode's random numbers, and not its own,
    dropout is the eager one, forward and backward."""
    _, ours = small_pair(name, dropout=dropout)
    ours.config.problem_type = "single_label_classification"
    with inductor_config.patch(fallback_random=True):
        compiled = compiled_in_place(ours.train(), "inductor")
        check_same(compiled, ours, batch_for(name))
        with no_recompilation():
            for lengths in LENGTHS:
                check_same(compiled, ours, batch_for(name, lengths_mask(lengths)))
