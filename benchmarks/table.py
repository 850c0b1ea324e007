"""One line for each result of bench_losses.py, as a table in Markdown.

python benchmarks/table.py results/bench_losses_W*.json
"""

import json
import sys
from pathlib import Path

from bench_losses import COMPILED, COMPILED_GRAPH, EAGER, GRAPH, NATIVE, mib, table


def line(path: Path) -> list[str]:
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    native, w = rows[NATIVE], report["workload"]

    def ms(name: str, key: str | None = None) -> str:
        """Milliseconds, and in brackets the share of the copy rate or how many times the native kernels' time."""
        row = rows.get(name, {})
        if "step_ms" not in row:
            return "out of memory" if "memory" in row.get("left_out", "") else "-"
        note = f"{row['bandwidth_share']:.0%}" if key else f"{row['step_ms'] / native['step_ms']:.1f}x"
        return f"{row['step_ms']:.3g} ({note})"

    return [
        path.stem.removeprefix("bench_losses").strip("_") or "default",
        f"{w['batch']} x {w['maps']}, {w['dtype']}, {w['boxes']} of {w['categories']}",
        ms(NATIVE, "share"),
        ms(GRAPH, "share"),
        ms(EAGER),
        ms(COMPILED),
        ms(COMPILED_GRAPH),
        *(mib(native, what) for what in ("kept", "peak")),
        f"{native['launches']}, {native['synchronisations']}" if "launches" in native else "-",
    ]


def main(paths: list[str]) -> None:
    header = ["", "batch x maps, boxes of categories", "sea_kernels ms (of copy rate)", "CUDA graph", "eager"]
    header += ["torch.compile", "its CUDA graph", "kept MiB", "peak MiB", "launches, syncs"]
    print(table(header, [line(Path(p)) for p in paths]))


if __name__ == "__main__":
    main(sys.argv[1:])
