"""packed_layout: the places of real tokens, in eager mode and in one graph for all masks."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import gather_rows, packed_layout, scatter_rows

MASKS = (
    [[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1]],
    [[1, 1, 1]] * 4,
    [[0, 0, 0]] * 4,
    [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]],
)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", MASKS)
def test_values(rows: list[list[int]], dtype: torch.dtype) -> None:
    indices, cu_seqlens, occupied = packed_layout(torch.tensor(rows, dtype=dtype))
    assert indices.dtype == occupied.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
    places = [3 * b + s for b, row in enumerate(rows) for s, real in enumerate(row) if real]
    assert indices.tolist() == places
    assert cu_seqlens.tolist() == [sum(map(sum, rows[:b])) for b in range(len(rows) + 1)]
    assert occupied.tolist() == [b for b, row in enumerate(rows) if any(row)]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_one_graph_for_every_mask(fullgraph: bool) -> None:
    """Also without fullgraph: no switch of the user's is needed for sizes without a value."""

    def there_and_back(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        indices, cu_seqlens, occupied = packed_layout(mask)
        packed = gather_rows(x, indices)
        first = gather_rows(packed, cu_seqlens[:-1].long()[occupied])
        return scatter_rows(packed, indices, 12) + scatter_rows(first, occupied, 12)

    torch.compiler.reset()
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=fullgraph)
    for number, rows in enumerate(MASKS):
        x, mask = torch.randn(12, 5, requires_grad=True), torch.tensor(rows)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            y = compiled(x, mask)
            y.square().sum().backward()
        gradient, x.grad = x.grad, None
        expected = there_and_back(x, mask)
        expected.square().sum().backward()
        assert torch.equal(y, expected) and torch.equal(gradient, x.grad)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"mask: got int64 \(3,\) on cpu, expected shape \(B, S\)"):
        packed_layout(torch.ones(3, dtype=torch.int64))
