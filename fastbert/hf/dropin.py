"""accelerate and restore: put the replacements on a model, and take them off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from fastbert.hf.attention_interface import register_attention
from fastbert.hf.backbone import FusedBackbone
from fastbert.hf.families import FAMILIES, Family, family_of, known_class
from fastbert.hf.heads import FusedTask
from fastbert.hf.layer import FusedLayer
from fastbert.hf.replacement import Replacement, replacement_of
from fastbert.hf.tasks import task_of
from fastbert.ops import BackendError

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, strict: bool = False, skip_logits: bool = False) -> Model:
    """Run every supported Hugging Face model inside ``model`` on fastbert's kernels, in place.

    model: any module that is or holds models of the BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT,
        ELECTRA or ALBERT classes of ``transformers`` (MiniLM is a BertModel): a task model, a
        SentenceTransformer, a PeftModel, your own.
    strict: an error wherever a part could not be fused, now or in a later call, in place of the
        original path.
    skip_logits: a masked-language or pretraining model that is given labels takes its loss from the
        labelled rows alone and returns None for the vocabulary logits.

    The model keeps its class, parameters and state_dict keys; outputs, losses and gradients are the
    original's, with zeros (question answering: the lowest number) where the original has what it
    computed for padding. Labels on padding do not count, and with padding on the left the pooled
    token is the first real one. Hooks fire as before, but those on encoder
    layers, Linears and heads see packed tokens, (T, H) for (B, S, H); one on a module that the
    kernels go around, such as a LayerNorm, makes its layer run as it was.
    Calling accelerate again only changes the two flags. ``restore`` undoes it.
    Raises ValueError where nothing supported is inside, and (as BackendError) in strict mode.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    register_attention()
    fused = 0
    skipped = []
    for name, module in list(model.named_modules()):
        family = family_of(module)
        if family is not None:
            reason = why_not(family, module)
            if reason is not None:
                skipped.append(f"{name or type(module).__name__}: {reason}")
                continue
            fused += 1
            _put_on_backbone(family, module, strict)
        elif task_of(module) is not None and _is_free(module, FusedTask):
            _put_on_task(module, strict, skip_logits)
    if not fused:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise ValueError(
            f"model: {type(model).__name__} holds no model that fastbert accelerates{why}; "
            f"expected one of the families {', '.join(FAMILIES)}"
        )
    if strict:
        for name, replacement in replacements(model):
            obstacle = replacement.obstacle()
            left = [obstacle] if obstacle else replacement.left()
            skipped.extend(f"{name or type(model).__name__}: {part}" for part in left)
        if skipped:
            restore(model)
            raise BackendError(f"model: strict mode, and not all is fused: {'; '.join(skipped)}")
    return model


def restore(model: Model) -> Model:
    """Undo ``accelerate``: every module of ``model`` runs its own forward again."""
    for module in model.modules():
        replacement = replacement_of(module)
        if replacement is not None:
            replacement.remove()
    return model


def replacements(model: nn.Module) -> Iterator[tuple[str, Replacement]]:
    """The name and the replacement of every accelerated module in ``model``."""
    for name, module in model.named_modules():
        replacement = replacement_of(module)
        if replacement is not None:
            yield name, replacement


def why_not(family: Family, backbone: Any) -> str | None:
    """Why this bare model cannot be accelerated; None when it can."""
    if getattr(backbone.config, "is_decoder", False):
        return "it is a decoder (config.is_decoder)"
    if not _is_free(backbone, FusedBackbone):
        return "another library has replaced its forward"
    if not all(_is_free(layer, FusedLayer) for layer in family.layers(backbone)):
        return "another library has replaced the forward of its layers"
    return None


def _is_free(module: nn.Module, kind: type[Replacement]) -> bool:
    """True when the module's forward is its class's, or a replacement of ours."""
    forward = module.__dict__.get("forward")
    return forward is None or isinstance(replacement_of(module), kind)


def _put_on_backbone(family: Family, backbone: nn.Module, strict: bool) -> None:
    for layer in family.layers(backbone):
        if not _has(layer, FusedLayer, strict):
            FusedLayer(layer, family, strict).install()
    if not _has(backbone, FusedBackbone, strict):
        FusedBackbone(backbone, family, strict).install()


def _put_on_task(model: nn.Module, strict: bool, skip_logits: bool) -> None:
    if not _has(model, FusedTask, strict):
        name = known_class(model)
        assert name is not None
        FusedTask(model, name, strict, skip_logits).install()
    replacement = replacement_of(model)
    assert isinstance(replacement, FusedTask)
    replacement.skip_logits = skip_logits


def _has(module: nn.Module, kind: type[Replacement], strict: bool) -> bool:
    """True when the module has its replacement already; that takes the new flag."""
    replacement = replacement_of(module)
    if not isinstance(replacement, kind):
        return False
    replacement.strict = strict
    return True
