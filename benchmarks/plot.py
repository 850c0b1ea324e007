"""The picture of one benchmark report: time and memory of every row, and one panel for each sweep."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

FORWARD, BACKWARD, BOTH, PEAK, SAVED = "#4477aa", "#99bbdd", "#6699cc", "#cc6677", "#eeaaaa"
LINES = {
    "sea_kernels": {"color": "#4477aa", "marker": "o"},
    "eager reference": {"color": "#cc6677", "marker": "s"},
    "torch.compile reference": {"color": "#998833", "marker": "^"},
}


def draw(report, path):
    sweeps = report["sweeps"]
    figure = plt.figure(figsize=(13, 8 if sweeps else 4.4), layout="constrained")
    w, threads = report["workload"], f", {report['machine']['threads']} threads"
    on_gpu = report["machine"].get("capability") is not None
    allocator = "" if on_gpu else f", {report['machine']['instruction_set']}, {report['machine']['allocator']}"
    figure.suptitle(
        f"{report['machine']['device']}{'' if on_gpu else threads}{allocator}, torch {report['versions']['torch']}\n"
        f"batch {w['batch']}, {w['height']}x{w['width']}, {w['channels']} channels, {w['dtype']}, "
        f"{w['maps']} map{'s' * (w['maps'] > 1)} per branch, {w['boxes']} boxes of {w['categories']} categories"
        + ", channels_last"
        * w["channels_last"],
        fontsize=11,
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1)) if sweeps else (figure, None)
    time_axis, memory_axis = top.subplots(1, 2)
    _times(time_axis, [row for row in report["rows"] if "step_ms" in row], report["floor"]["ms"])
    _memory(memory_axis, [row for row in report["rows"] if "peak_percent" in row])
    if sweeps:
        axes = bottom.subplots(1, len(sweeps), squeeze=False, sharey=True)[0]
        for axis, (name, points) in zip(axes, sweeps.items(), strict=True):
            _sweep(axis, name, points)
        axes[0].set_ylabel("forward+backward, ms")
        handles, labels = axes[0].get_legend_handles_labels()
        bottom.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis, rows):
    axis.set_yticks(range(len(rows)), [row["name"].replace(", ", ",\n") for row in rows])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.25)  # room for the numbers


def _times(axis, rows, floor):
    axis.axvline(floor, color="#333333", linestyle=":", linewidth=1)
    for y, row in enumerate(rows):
        forward = row.get("forward_ms", 0)
        axis.barh(y, forward, color=FORWARD, label="forward" if y == 0 else None)
        axis.barh(
            y,
            row["step_ms"] - forward,
            left=forward,
            color=BACKWARD if forward else BOTH,
            label="backward" if y == 0 else None,
        )
        ratio = f"  ({row['floor_ratio']:.1f}x)" if "floor_ratio" in row else ""
        axis.text(row["step_ms"], y, f" {row['step_ms']:.4g}{ratio}", va="center", fontsize=9)
    _bars(axis, rows)
    axis.set_xlabel(f"ms; in brackets: times the floor ({floor:.3g} ms, dotted)")
    axis.set_title("Time, from boxes to gradients", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)


def _memory(axis, rows):
    for y, row in enumerate(rows):
        for key, offset, color in (("peak", -0.2, PEAK), ("saved", 0.2, SAVED)):
            value = row[f"{key}_percent"]
            axis.barh(y + offset, value, height=0.38, color=color, label=key if y == 0 else None)
            axis.text(value, y + offset, f" {value:.3g}" if value < 100 else f" {value:.0f}", va="center", fontsize=9)
    _bars(axis, rows)
    axis.set_xlabel("% of a feature set (the student's maps of both branches)")
    axis.set_title("Memory over inputs and gradients", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)


def _sweep(axis, name, points):
    for row_name, style in LINES.items():
        times = [next((r.get("step_ms") for r in p["rows"] if r["name"] == row_name), None) for p in points]
        if any(t is not None for t in times):
            axis.plot([t if t is not None else float("nan") for t in times], label=row_name, **style)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(range(len(points)), [p["label"] for p in points], fontsize=9 if len(points) < 4 else 8)
    axis.margins(x=0.15)
    axis.set_title(name, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
