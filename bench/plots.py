"""Draw the results: ``python bench/plots.py [RESULTS_DIR] [--out DIR]`` makes a PNG of each JSON.

ops_DEVICE.png      every case's speed over its best peer, and its share of the ceiling
model_DEVICE.png    real tokens a second of every candidate, by task and shape
waterfall_DEVICE.png  milliseconds of each step from Hugging Face to ours
Files that are not there are passed over. Needs matplotlib (extra ``plots``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
OURS, PEER, CEILING = "#1b6ca8", "#b0b7bf", "#d1495b"


def _axes(bars: int, panels: int = 1) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, panels, figsize=(6 * panels + 2, 1.5 + 0.26 * max(bars, 4)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    return figure, list(axes[0])


def _bars(axis: Any, names: list[str], values: list[float], colors: list[str]) -> None:
    places = range(len(names))
    axis.barh(places, values, color=colors)
    axis.set_yticks(places, names, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:,.2f}" if value < 100 else f" {value:,.0f}",
                  va="center", fontsize=7)  # fmt: skip


def ops(result: dict[str, Any]) -> Any:
    rows = [row for row in result["rows"] if "speedup" in row]
    names = [f"{row['op']} {row['case']} {row['dtype']}" for row in rows]
    figure, (left, right) = _axes(len(rows), 2)
    speeds = [row["speedup"] for row in rows]
    _bars(left, names, speeds, [OURS if speed >= 1 else CEILING for speed in speeds])
    left.axvline(1, color="black", linewidth=0.8)
    left.set_title("× the best peer of the same run", fontsize=9)
    shares = [row.get("percent_of_matrix", row["percent_of_copy"]) for row in rows]
    _bars(right, [""] * len(rows), shares, [OURS] * len(rows))
    right.axvline(100, color="black", linewidth=0.8)
    right.set_title("% of the ceiling: copy, or matrix product where it multiplies", fontsize=9)
    return figure


def model(result: dict[str, Any]) -> Any:
    names, values, colors = [], [], []
    for row in result["rows"]:
        for name, candidate in row["candidates"].items():
            size = row.get("size", "base")
            names.append(f"{row['task']} {size} {row['shape']} {row['dtype']}: {name}")
            values.append(candidate["tokens_per_s"])
            colors.append(OURS if name.startswith("fastbert") else PEER)
    figure, (axis,) = _axes(len(names))
    _bars(axis, names, values, colors)
    axis.set_title("real tokens a second", fontsize=9)
    return figure


def waterfall(result: dict[str, Any]) -> Any:
    shapes = result["shapes"]
    steps = max(len(rows) for rows in shapes.values())
    figure, axes = _axes(steps, len(shapes))
    for axis, (name, rows) in zip(axes, shapes.items(), strict=True):
        timed = [row for row in rows if "median_ms" in row]
        labels = [f"{row['step']}  {row['over_first']:.2f}×" for row in timed]
        colors = [PEER if row["step"] in ("HF eager", "+ SDPA") else OURS for row in timed]
        _bars(axis, labels, [row["median_ms"] for row in timed], colors)
        axis.set_title(f"BERT-{result['size']} {result['dtype']}, {name}: ms a step", fontsize=9)
    return figure


_PLOTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ops": ops,
    "model": model,
    "waterfall": waterfall,
}


def draw(results: Path, out: Path) -> list[Path]:
    """A PNG in ``out`` for each JSON of ``results`` that a plot is made of, and that holds rows."""
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for kind, plot in _PLOTS.items():
        for path in sorted(results.glob(f"{kind}_*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            if not result.get("rows") and not result.get("shapes"):
                continue
            figure = plot(result)
            machine = result["machine"]
            gpu = machine["gpu"].get("gpu_0") or machine["cpu"]["cpu"]
            figure.suptitle(f"{gpu}, {machine['date']}, {machine['commit']}", fontsize=8)
            made.append(out / f"{path.stem}.png")
            figure.savefig(made[-1], dpi=130)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "results")
    parser.add_argument("--out", type=Path, help="default: the folder of the results")
    args = parser.parse_args()
    made = draw(args.results, args.out or args.results)
    print("\n".join(map(str, made)) or f"{args.results}: no results to draw", flush=True)
    return int(not made)


if __name__ == "__main__":
    sys.exit(main())
