"""Every head against transformers, on padded batches: outputs, losses, gradients, training."""

from __future__ import annotations

import copy

import pytest
import torch


def real_part(x, mask):
    """x without padding, if x is (B, S, …); transformers computes something there, we do not."""
    if x.dim() >= 2 and x.shape[:2] == mask.shape:
        return x[mask]
    return x


def total(out):
    """A scalar of a model's output: its loss, or for BertModel a sum of the pooled."""
    if getattr(out, "loss", None) is not None:
        return out.loss
    weights = torch.linspace(-1, 1, out.pooler_output.numel(), dtype=out.pooler_output.dtype)
    return (out.pooler_output * weights.view_as(out.pooler_output)).sum()


def run(model, batch, **kwargs):
    model.zero_grad()
    out = model(**batch, **kwargs)
    loss = total(out)
    if out.__class__.__name__.startswith("Base"):
        mask = batch["attention_mask"].bool()
        loss = loss + out.last_hidden_state[mask].pow(3).mean()
    loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_as_exact(grads, their_grads, exact_grads, atol=1e-6):
    """Each gradient's error, over its largest element, is at most twice transformers' worst one.

    Not gradient by gradient: which of them gets the worst rounding is chance. Over a dozen models
    the ratio of the two errors of one gradient is 1 in the geometric mean, and 3 now and then.
    """
    relative = {}
    for name, exact in exact_grads.items():
        scale = max(1.0, exact.abs().max().item())
        errors = ((g[name].double() - exact).abs().max().item() for g in (grads, their_grads))
        relative[name] = [error / scale for error in errors]
    allowed = 2 * max(theirs for _, theirs in relative.values()) + atol
    assert {name: ours for name, (ours, _) in relative.items() if ours > allowed} == {}, allowed


def lengths_for(head):
    # transformers' loss over answer spans counts the logits of padding: see test_span_loss.
    return (16, 16, 16, 16) if head == "BertForQuestionAnswering" else (11, 1, 16, 7)


def test_state_dict_is_hugging_faces(head, hf_model, native):
    hf = hf_model(head)
    ours = native(hf)
    assert list(ours.state_dict()) == list(hf.state_dict())
    tied = [(n, m) for n, m in ours.named_parameters(remove_duplicate=False)]
    assert len(tied) == len(list(hf.named_parameters(remove_duplicate=False)))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in hf.parameters())


def test_outputs_loss_and_gradients(head, hf_model, native, inputs, assert_as_exact):
    hf = hf_model(head)
    ours = native(hf)
    batch = inputs(head, lengths_for(head))
    more = {"output_hidden_states": True, "output_attentions": True}
    theirs, their_grads = run(hf, batch, **more)
    exact, exact_grads = run(copy.deepcopy(hf).double(), batch, **more)
    logits = {"return_logits": True} if "MaskedLM" in head or "PreTraining" in head else {}
    out, grads = run(ours, batch, **more, **logits)

    mask = batch["attention_mask"].bool().flatten(0, -2)
    assert out.keys() == tuple(name for name in theirs if name != "cross_attentions")
    for name, value in out.items():
        if name not in ("hidden_states", "attentions"):
            parts = (real_part(x, mask) for x in (value, theirs[name], exact[name]))
            assert_as_exact(*parts, name)
    assert len(out.hidden_states) == len(theirs.hidden_states) == 3
    for parts in zip(out.hidden_states, theirs.hidden_states, exact.hidden_states, strict=True):
        assert_as_exact(*(p[mask] for p in parts), "hidden_states")
    assert len(out.attentions) == len(theirs.attentions) == 2
    for parts in zip(out.attentions, theirs.attentions, exact.attentions, strict=True):
        assert_as_exact(*(p.transpose(1, 2)[mask] for p in parts), "attentions")

    assert grads.keys() == their_grads.keys()
    assert_gradients_as_exact(grads, their_grads, exact_grads)


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu"]
)
def test_activations(act, hf_model, native, inputs, assert_as_exact):
    hf = hf_model("BertForMaskedLM", hidden_act=act)
    batch = inputs("BertForMaskedLM")
    theirs, their_grads = run(hf, batch)
    exact, exact_grads = run(copy.deepcopy(hf).double(), batch)
    out, grads = run(native(hf), batch)
    assert_as_exact(out.loss, theirs.loss, exact.loss)
    for name in grads:
        assert_as_exact(grads[name], their_grads[name], exact_grads[name], name)


def test_erf_and_tanh_gelu_are_not_mixed_up(hf_model, native, inputs):
    batch = inputs("BertModel")
    erf = hf_model("BertModel").double()
    tanh = copy.deepcopy(erf)
    tanh.config.hidden_act = "gelu_new"
    assert not torch.allclose(native(erf)(**batch)[0], native(tanh)(**batch)[0], atol=1e-5)


@pytest.mark.parametrize("head", ["BertForPreTraining", "BertForSequenceClassification"])
def test_ten_steps_of_adamw(head, hf_model, native, inputs, assert_as_exact):
    hf = hf_model(head)
    models = native(hf), hf, copy.deepcopy(hf).double()
    batches = [inputs(head) for _ in range(5)]
    losses = []
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        trajectory = []
        for step in range(10):
            optimizer.zero_grad()
            loss = model(**batches[step % 5]).loss
            loss.backward()
            optimizer.step()
            trajectory.append(loss.detach())
        losses.append(torch.stack(trajectory))
    assert losses[2][5:].mean() < losses[2][:5].mean()
    # Adam divides by sqrt(v), which makes rounding of tiny gradients visible: hence the atol.
    assert_as_exact(*losses, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, hf_model, native, inputs, assert_as_exact):
    exact = hf_model("BertForSequenceClassification").double()
    hf = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(hf.state_dict())  # the rounded weights
    batch = inputs("BertForSequenceClassification")
    outs = [model(**batch) for model in (native(hf), hf, exact)]
    assert outs[0].logits.dtype == dtype
    assert_as_exact(*(o.logits for o in outs), atol=1e-3)


def test_fp64_agrees_to_the_last_digits(head, hf_model, native, inputs):
    hf = hf_model(head).double()
    batch = inputs(head, lengths_for(head))
    (theirs, their_grads), (out, grads) = run(hf, batch), run(native(hf), batch)
    torch.testing.assert_close(total(out), total(theirs), rtol=1e-10, atol=1e-10)
    for name in grads:
        torch.testing.assert_close(grads[name], their_grads[name], rtol=1e-7, atol=1e-9)


def test_position_ids_and_inputs_embeds(hf_model, native):
    hf = hf_model("BertModel").double()
    ours = native(hf)
    positions = torch.stack([torch.arange(9), torch.arange(9).flip(0)])
    embeds = torch.randn(2, 9, 32, dtype=torch.float64)
    grads = []
    for model in (ours, hf):
        x = embeds.clone().requires_grad_()
        model(inputs_embeds=x, position_ids=positions).last_hidden_state.pow(2).mean().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])
    ids = torch.randint(1, 97, (2, 9))
    for shape in (positions, positions[:1]):
        torch.testing.assert_close(ours(ids, position_ids=shape)[0], hf(ids, position_ids=shape)[0])


def test_left_padding(hf_model, native):
    hf = hf_model("BertModel").double()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.randint(1, 97, (2, 5))
    ours, theirs = native(hf)(ids, mask), hf(ids, mask)
    torch.testing.assert_close(ours[0][mask == 1], theirs[0][mask == 1])
    assert (ours[0][mask == 0] == 0).all()
    # The pooler reads the first real token, where transformers reads column 0, here padding.
    first = torch.stack([theirs[0][0, 2], theirs[0][1, 0]])
    torch.testing.assert_close(ours[1], torch.tanh(hf.pooler.dense(first)))


def test_autocast(hf_model, native, inputs, assert_as_exact):
    hf = hf_model("BertForMaskedLM")
    batch = inputs("BertForMaskedLM")
    exact, exact_grads = run(copy.deepcopy(hf).double(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_grads = run(hf, batch)
        out, grads = run(native(hf), batch)
    assert_as_exact(out.loss, theirs.loss, exact.loss, atol=1e-2)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    # The largest of some thousand rounding errors is chance; their norm is not.
    vectors = (
        torch.cat([g[n].double().flatten() for n in grads])
        for g in (grads, their_grads, exact_grads)
    )
    ours, theirs, exact = vectors
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
