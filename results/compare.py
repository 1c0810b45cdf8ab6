"""The table and the figure of the README, from the summaries under results/small.

    python results/compare.py

Each arm's number is the mean over its seeds with a 95 % t-interval, and each seed's value. The figure shows the mean curve of
each arm; its band reaches from the lowest seed to the highest.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from evaluate import budget_figure  # noqa: E402

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 0.975 quantile of Student's t with n - 1 degrees of freedom
ROWS = {  # label: (value of a section of summary.json, digits)
    "accuracy": (lambda section: section["accuracy"], 3),
    "tokens per right answer": (lambda section: section["tokens_per_correct"], 1),
    "thinking tokens": (lambda section: section["mean_thinking_tokens"], 1),
    **{f"regret to {horizon} tokens": (lambda section, h=horizon: section["regret"][h], 3) for horizon in ("54", "108", "144")},
}


def load(arm: str) -> list[dict]:
    """The summaries of an arm, by seed."""
    paths = sorted((HERE / "small").glob(f"{arm}*/summary.json"))
    return [json.loads(path.read_text()) for path in paths if path.parent.name.split("-")[0] == arm]


def cell(sections: list[dict], value, digits: int) -> str:
    seeds = np.array([value(section)["value"] for section in sections])
    half = T95[len(seeds)] * seeds.std(ddof=1) / len(seeds) ** 0.5
    return f"{seeds.mean():.{digits}f} ± {half:.{digits}f} ({', '.join(f'{x:.{digits}f}' for x in seeds)})"


def mean_curve(sections: list[dict], name: str) -> list[dict]:
    rows = []
    for points in zip(*(section[name] for section in sections)):
        seeds = [point["J"]["value"] for point in points]
        rows.append({"budget": points[0]["budget"], "J": {"value": float(np.mean(seeds)), "low": min(seeds), "high": max(seeds)}})
    return rows


def main() -> None:
    mrt, grpo = load("small"), load("small_grpo")
    arms = {"warm start": [run["warm_start"] for run in mrt], "GRPO": [run["test"] for run in grpo],
            "MRT": [run["test"] for run in mrt]}
    print(f"| | {' | '.join(arms)} |\n|---|{'---|' * len(arms)}")
    for label, (value, digits) in ROWS.items():
        print(f"| {label} | {' | '.join(cell(sections, value, digits) for sections in arms.values())} |")
    ood = {"GRPO": [run["ood"] for run in grpo], "MRT": [run["ood"] for run in mrt]}
    value, digits = ROWS["accuracy"]
    print(f"| accuracy, OOD | | {' | '.join(cell(sections, value, digits) for sections in ood.values())} |")
    budget_figure(HERE / "small/budget.png", {
        label: {"thinking_budget": sections[0]["thinking_budget"],
                **{name: mean_curve(sections, name) for name in ("budget_curve", "extrapolation")}}
        for label, sections in arms.items()})


if __name__ == "__main__":
    main()
