"""Tiny random models of every family, batches for them, and the comparison with the original."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import transformers

from fastbert.hf import accelerate
from fastbert.hf.families import FAMILIES
from fastbert.hf.tasks import TASKS

Tensor = torch.Tensor
VOCAB, LABELS, ROWS, COLUMNS = 97, 3, 4, 11
LENGTHS = (11, 1, 7, 4)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {"pad_token_id": 1, "max_position_embeddings": 42}),
    "xlm-roberta": ("XLMRobertaConfig", {"pad_token_id": 1, "max_position_embeddings": 42}),
    "camembert": ("CamembertConfig", {"pad_token_id": 1, "max_position_embeddings": 42}),
    "electra": ("ElectraConfig", {"embedding_size": 24}),
    "albert": (
        "AlbertConfig",
        {"embedding_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2,
         "inner_group_num": 2, "hidden_act": "gelu_new"},
    ),
}  # fmt: skip
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
_DISTILBERT = {
    "vocab_size": VOCAB, "dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 80,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
_DISTILBERT_DROPOUTS = ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout")

FAMILY_NAMES = tuple(FAMILIES)
TASK_NAMES = tuple(name.rsplit(".", 1)[1] for name in TASKS)
MODEL_NAMES = tuple(family.backbone for family in FAMILIES.values()) + TASK_NAMES


def family_of_class(name: str) -> str:
    for family in FAMILIES.values():
        if name.startswith(family.backbone.removesuffix("Model") + "For"):
            return family.name
        if name == family.backbone:
            return family.name
    raise KeyError(name)


def masked_lm(family: str) -> str:
    return FAMILIES[family].backbone.replace("Model", "ForMaskedLM")


def config_of(family: str, dropout: float = 0.0, **changes: Any) -> Any:
    if family == "distilbert":
        values = {**_DISTILBERT, **dict.fromkeys(_DISTILBERT_DROPOUTS, dropout), **changes}
        return transformers.DistilBertConfig(**values)
    name, own = _CONFIGS[family]
    values = {**_COMMON, **dict.fromkeys(_DROPOUTS, dropout), **own, **changes}
    return getattr(transformers, name)(**values)


def tiny(name: str, *, dropout: float = 0.0, seed: int = 0, **changes: Any) -> Any:
    """A model of class ``name`` in eval mode, with weights of a size that makes errors show."""
    family = family_of_class(name)
    if name.endswith(("SequenceClassification", "TokenClassification")):
        changes.setdefault("num_labels", LABELS)
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config_of(family, dropout, **changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
            parameter.normal_(centre, 0.1)
    return model.eval()


def lengths_mask(lengths: tuple[int, ...] = LENGTHS, side: str = "right") -> Tensor:
    mask = torch.arange(COLUMNS) < torch.tensor(lengths)[:, None]
    return (mask if side == "right" else mask.flip(1)).long()


def batch_for(name: str, mask: Tensor | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Tokens, mask and labels for a model of class ``name``; no label stands on padding."""
    g = torch.Generator().manual_seed(seed)
    family = family_of_class(name)
    mask = lengths_mask() if mask is None else mask
    rows, columns = mask.shape
    pad = FAMILIES[family].positions_from_padding * 1
    ids = torch.randint(2, VOCAB, (rows, columns), generator=g)
    batch = {"input_ids": torch.where(mask != 0, ids, pad), "attention_mask": mask}
    if family not in ("distilbert",):
        batch["token_type_ids"] = torch.randint(0, 2, (rows, columns), generator=g) * mask
    task = name.split("For")[-1] if "For" in name else ""
    tokens = torch.randint(0, 2, (rows, columns), generator=g)
    if task in ("MaskedLM", "PreTraining", "TokenClassification") and family + task != (
        "electraPreTraining"
    ):
        top = LABELS if task == "TokenClassification" else VOCAB
        values = torch.randint(0, top, (rows, columns), generator=g)
        batch["labels"] = torch.where((tokens * mask) != 0, values, -100)
    if task == "PreTraining":
        second = {"bert": "next_sentence_label", "albert": "sentence_order_label"}.get(family)
        if second is None:
            batch["labels"] = tokens
        else:
            batch[second] = tokens[:, 0]
    if task == "QuestionAnswering":
        starts = (mask != 0).int().argmax(1)
        batch["start_positions"] = starts
        batch["end_positions"] = starts + mask.sum(1).clamp(min=1) - 1
    if task == "MultipleChoice":
        batch = {k: x.view(rows // 2, 2, columns) for k, x in batch.items()}
        batch["labels"] = tokens[: rows // 2, 0]
    if task == "SequenceClassification":
        batch["labels"] = torch.randint(0, LABELS, (rows,), generator=g)
    if task == "NextSentencePrediction":
        batch["labels"] = tokens[:, 0]
    return batch


class Result(NamedTuple):
    outputs: dict[str, Tensor]
    loss: Tensor | None
    gradients: dict[str, Tensor]


def run(model: Any, batch: dict[str, Any], **kwargs: Any) -> Result:
    """Outputs, loss and gradients; without a loss, of a sum that weighs every real output."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, **kwargs)
    mask = batch.get("attention_mask")
    outputs = {k: x for k, x in output.items() if isinstance(x, torch.Tensor) and k != "loss"}
    if mask is not None and mask.dim() == 2:
        for k, x in outputs.items():
            if x.shape[:2] == mask.shape and mask.shape[0] != mask.shape[1]:
                outputs[k] = x[mask != 0]
    loss = output.get("loss")
    objective = loss
    if loss is None:
        objective = sum((x.double() * weights(x)).sum() for x in outputs.values())
    objective.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Result({k: x.detach() for k, x in outputs.items()}, loss, gradients)


def weights(x: Tensor) -> Tensor:
    return torch.arange(1, x.numel() + 1, dtype=torch.float64).cos().view(x.shape)


def to_double(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in batch.items()
    }


def pair(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """A model and its accelerated copy."""
    original = tiny(name, **kwargs)
    return original, accelerate(copy.deepcopy(original))


def check_parity(
    original: Any, ours: Any, batch: dict[str, Any], our_batch: dict[str, Any] | None = None
) -> None:
    """err(ours, fp64 oracle) <= 2 err(original, fp64 oracle) + atol, tensor by tensor."""
    oracle = run(copy.deepcopy(original).double(), to_double(batch))
    theirs = run(original, batch)
    mine = run(ours, batch if our_batch is None else our_batch)
    assert mine.outputs.keys() == theirs.outputs.keys()
    assert mine.gradients.keys() == theirs.gradients.keys()
    for name, expected in oracle.outputs.items():
        check_close(name, mine.outputs[name], theirs.outputs[name], expected)
    if oracle.loss is not None:
        assert mine.loss is not None and theirs.loss is not None
        check_close("loss", mine.loss.detach(), theirs.loss.detach(), oracle.loss.detach())
    scale = max(float(g.abs().max()) for g in oracle.gradients.values())
    for name, expected in oracle.gradients.items():
        check_close(name, mine.gradients[name], theirs.gradients[name], expected, scale)


def check_close(
    name: str, ours: Tensor, theirs: Tensor, oracle: Tensor, scale: float = 0.0
) -> None:
    assert ours.shape == oracle.shape, name
    error, reference = (float((x.double() - oracle).abs().max()) for x in (ours, theirs))
    atol = torch.finfo(ours.dtype).eps * 4 * (float(oracle.abs().max()) + scale)
    assert error <= 2 * reference + atol, f"{name}: {error:.3e}, original {reference:.3e}"
