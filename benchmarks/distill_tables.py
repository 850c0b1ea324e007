"""What the finished runs of the accuracy study say: tables and a picture."""

import statistics
from pathlib import Path

import balance
import report
import small_detectors
from distill_runs import ALONE, EVERY_ROW, ROWS, SEA, TEACHER, read
from plot import plt

# Quantiles 0.975 of Student's t; beyond, the last one is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def in_words(metrics: dict) -> str:
    return ", ".join(f"{k} {metrics[k]:.2f}" for k in small_detectors.METRICS)


def collect(out: Path) -> list[dict]:
    """Of all finished runs, one entry for each row, rule and share: values, means, deviations, differences."""
    groups: dict[tuple, list[dict]] = {}
    for file in sorted((out / "runs").glob("*.json")):
        result = read(file)
        groups.setdefault((result["row"], result["rule"], result["share"]), []).append(result)
    rank = [*EVERY_ROW, TEACHER]

    def paired(results, others):
        others = {r["seed"]: r["metrics"] for r in others}
        pairs = [(r["metrics"], others[r["seed"]]) for r in results if r["seed"] in others]
        return {k: interval([a[k] - b[k] for a, b in pairs]) for k in small_detectors.METRICS} if pairs else None

    rows = []
    for key in sorted(groups, key=lambda key: (rank.index(key[0]), key[1] or "", key[2] or 0)):
        results = sorted(groups[key], key=lambda r: r["seed"])
        row = {"name": key[0], "rule": key[1], "share": key[2], "seeds": [r["seed"] for r in results], "runs": results}
        values = {k: [r["metrics"][k] for r in results] for k in small_detectors.METRICS}
        row |= {"values": values, "mean": {k: statistics.fmean(v) for k, v in values.items()}}
        row["deviation"] = {k: statistics.stdev(v) if len(v) > 1 else None for k, v in values.items()}
        if key[0] not in (ALONE, TEACHER):
            row["gain"] = paired(results, groups.get((ALONE, None, None), []))
            ours = [k for k in groups if k[:2] == ("all three", key[1])]
            if key[0] != "all three" and len(ours) == 1:
                row["all three over it"] = paired(groups[ours[0]], results)
        rows.append(row)
    return rows


def interval(differences: list[float]) -> dict:
    """Mean and, of two seeds or more, half the width of its 95% confidence interval."""
    n = len(differences)
    half = None if n < 2 else _T[min(n - 1, len(_T)) - 1] * statistics.stdev(differences) / n**0.5
    return {"mean": statistics.fmean(differences), "half": half, "differences": differences}


def _plus_minus(mean: float, spread: float | None, form: str = "{:.2f}") -> str:
    return form.format(mean) + (f" ± {spread:.2f}" if spread is not None else "")


def markdown(result: dict) -> str:
    header = ["", "share", *small_detectors.METRICS, "AP over student alone", "AP of all three over it", "seeds"]
    rules = {row["rule"] for row in result["rows"] if row["rule"]}
    lines = []
    for row in result["rows"]:
        cells = [_plus_minus(row["mean"][k], row["deviation"][k]) for k in small_detectors.METRICS]
        for gain in (row.get("gain"), row.get("all three over it")):
            cells.append(_plus_minus(gain["AP"]["mean"], gain["AP"]["half"], "{:+.2f}") if gain else "-")
        share = "-" if row["share"] is None else f"{row['share']:g}" + f" ({row['rule']})" * (len(rules) > 1)
        lines.append([row["name"], share, *cells, str(len(row["seeds"]))])
    p, m = result["settings"], result["machine"]
    text = (
        f"{m['device']}, torch {result['versions']['torch']}, "
        f"torchvision {result['versions']['torchvision']}; preset {result['preset']}\n"
        f"{p['size']}x{p['size']}, objects of 8 to {p['largest']:g} pixels; {p['train']} train, {p['tune']} tuning and "
        f"{p['val']} validation images; batch {p['batch']}; a student sees {p['student_images']} images "
        f"({p['tuning_images']} in tuning), the teacher {p['teacher_images']}\n"
    )
    for rule in sorted(rules):
        text += (
            f"Weights by {rule}: each loss has a share of the detection loss: {balance.RULES[rule]}, measured at "
            f"every {balance.EVERY}th of the first {balance.UNTIL} steps, then frozen\n"
        )
    text += (
        "Mean and sample deviation over the seeds; every row of one seed has the same initialization and batches, so "
        "differences are paired (mean and 95% confidence interval); one teacher\n\n" + report.table(header, lines)
    )
    lines = [
        [
            f"{_label(row)}: {term}",
            f"{statistics.fmean(run['weights'][term] for run in row['runs']):.3g}",
            *_pulls(row, term),
        ]
        for row in result["rows"]
        if row["rule"]
        for term in EVERY_ROW[row["name"]].terms
    ]
    if lines:
        header = ["", "weight", *(f"{100 * (i + 1) // p['points']}%" for i in range(p["points"]))]
        text += (
            "\n\nNorm of a loss's gradient, weighted, over that of the detection loss, at the student's maps that the "
            "loss compares, in one batch after so much of the training\n\n" + report.table(header, lines)
        )
    header = ["", *result["categories"]]
    lines = [
        [
            _label(row),
            *(f"{statistics.fmean(run['metrics']['categories'][c] for run in row['runs']):.1f}" for c in header[1:]),
        ]
        for row in result["rows"]
        if row["name"] in (*ROWS, TEACHER)
    ]
    text += "\n\nAP of each category, the most frequent one first, means over the seeds\n\n"
    text += report.table(header, lines)
    if result["tuning"]:
        shares = sorted({run["share"] for run in result["tuning"]})
        found = {(run["row"], run["rule"], run["share"]): run["metrics"]["AP"] for run in result["tuning"]}
        lines = [
            [f"{row} ({rule})", *(f"{found[row, rule, x]:.2f}" if (row, rule, x) in found else "-" for x in shares)]
            for row, rule in dict.fromkeys(key[:2] for key in found)
        ]
        text += "\n\nAP on the tuning set, which chose the shares\n\n"
        text += report.table(["", *(f"share {x:g}" for x in shares)], lines)
    return text


def _pulls(row, term):
    """A cell for each point of the curve, where training measured last."""
    points = len(row["runs"][0]["curve"])
    ratios = zip(*([m["gradients"].get(term) for m in run["measured"][-points:]] for run in row["runs"]))
    weights = [run["weights"][term] for run in row["runs"]]
    return ["-" if None in at else f"{statistics.fmean(w / r for w, r in zip(weights, at)):.3g}" for at in ratios]


def draw(result: dict, path: Path) -> None:
    rows = result["rows"]
    size = (13, max(4.5, 0.36 * len(rows) + 1.6))
    figure, (bars, curves) = plt.subplots(1, 2, figsize=size, layout="constrained")
    gains = [row for row in rows if row.get("gain")]
    for y, row in enumerate(gains):
        gain = row["gain"]["AP"]
        bars.barh(y, gain["mean"], xerr=gain["half"] or 0, color=_color(row), capsize=3)
        bars.plot(gain["differences"], [y] * len(gain["differences"]), "k.", markersize=4)
    bars.set_yticks(range(len(gains)), [_label(row) for row in gains])
    bars.invert_yaxis()
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set_xlabel("AP over the student alone (bar: mean, whisker: 95% interval, dots: seeds)")
    for row in rows:
        points = [[point["metrics"]["AP"] for point in run["curve"]] for run in row["runs"]]
        images = [point["images"] / 1000 for point in row["runs"][0]["curve"]]
        style = {"color": "black", "linestyle": "--" if row["name"] == TEACHER else "-"}
        curves.plot(
            images,
            [statistics.fmean(x) for x in zip(*points)],
            label=_label(row),
            **(style if row["name"] in (ALONE, TEACHER) else {"alpha": 0.8}),
        )
    curves.set_xlabel("thousand images")
    curves.set_ylabel("AP")
    curves.legend(fontsize=8, frameon=False)
    for axis in (bars, curves):
        axis.spines[["top", "right"]].set_visible(False)
    p = result["settings"]
    figure.suptitle(
        f"{result['machine']['device']}, {p['size']}x{p['size']}, {p['val']} validation images", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(row):
    return row["name"] + (f" ({row['rule']} {row['share']:g})" if row["rule"] else "")


def _color(row):
    return "#4477aa" if set(EVERY_ROW[row["name"]].terms) <= set(SEA) else "#cc6677"
