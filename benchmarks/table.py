"""One line for each result of bench_losses.py, as a table in Markdown.

python benchmarks/table.py results/bench_losses_W*.json
"""

import json
import sys
from pathlib import Path

import report
from steps import COMPILED, COMPILED_GRAPH, EAGER, GRAPH, NATIVE

OF_COPY_RATE, TIMES_NATIVE = "{step_ms:.3g} ({bandwidth_share:.0%})", "{step_ms:.3g} ({times_native:.1f}x)"


def line(path: Path) -> dict:
    result = json.loads(path.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    native, w = rows[NATIVE], result["workload"]

    def ms(name: str, form: str = TIMES_NATIVE) -> str:
        row = rows.get(name, {})
        if "step_ms" in row:
            return form.format_map(row | {"times_native": row["step_ms"] / native["step_ms"]})
        return "out of memory" if "memory" in row.get("left_out", "") else "-"

    size = f"{w['batch']} x {w['maps']}, {w['dtype']}, {w['boxes']} of {w['categories']}"
    return {
        "": path.stem.removeprefix("bench_losses").strip("_") or "default",
        "batch x maps, boxes of categories": size,
        "sea_kernels ms (of copy rate)": ms(NATIVE, OF_COPY_RATE),
        "CUDA graph": ms(GRAPH, OF_COPY_RATE),
        "eager": ms(EAGER),
        "torch.compile": ms(COMPILED),
        "its CUDA graph": ms(COMPILED_GRAPH),
        "saved MiB": report.cell(native, "{saved_mib:.4g} ({saved_percent:.1f}%)"),
        "peak MiB": report.cell(native, "{peak_mib:.4g} ({peak_percent:.1f}%)"),
        "launches, syncs": report.cell(native, "{launches}, {synchronizations}"),
    }


def main(paths: list[str]) -> None:
    lines = [line(Path(p)) for p in paths]
    print(report.table([*lines[0]], [[*x.values()] for x in lines]))


if __name__ == "__main__":
    report.run(lambda: main(sys.argv[1:]))
