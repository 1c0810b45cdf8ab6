"""What a run shows: a line per step, decoded rollouts, JSON lines, figures and a page of traces.

Nothing here computes anything that training reads. matplotlib is imported only where a figure is drawn.
"""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path

GOOD, BAD, FLAT = "28, 130, 190", "213, 94, 0", "128, 128, 128"  # blue, orange, grey: apart for every kind of eye


def duration(seconds: float) -> str:
    """Six characters at most.

    >>> duration(7.2), duration(190), duration(3 * 3600 + 240)
    ('7s', '3m10s', '3h04m')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes}m{seconds % 60:02d}s" if hours == 0 else f"{hours}h{minutes % 60:02d}m"


def step_line(row: dict, steps: int, eta: float) -> str:
    """One line of fixed width per step, reward first."""
    J = f"{row['J_first']:4.2f} > {row['J_last']:4.2f}" if row["J_last"] is not None else " " * 11
    return (f"{row['step']:5d}/{steps:<5d} reward {row['reward']:5.3f}  J {J}  tokens {row['response_tokens']:5.0f}  "
            f"finished {row['finished']:4.2f}  entropy {row['entropy']:4.2f}  grad {row['grad_norm']:5.2f}  "
            f"|dlogp| {row['max_logprob_diff']:5.0e}  {row['tokens_per_second'] / 1000:5.1f}k tok/s  eta {duration(eta):>6}")


def show_rollout(example: dict) -> str:
    """A rollout on the terminal: an episode per line, with J after it."""
    J = example["J"]
    lines = [f"    {example['prompt']}" + (f"   J {J[0]:.2f}" if J else "")]
    lines += [f"      {text:<46}" + (f" J {J[j + 1]:.2f}  {J[j + 1] - J[j]:+.2f}" if J else "")
              for j, text in enumerate(example["episodes"])]
    return "\n".join([*lines, f"      {example['answer']}   {'right' if example['reward'] else 'wrong'}"])


def write_json(path: Path, value: dict) -> None:
    """Replace a JSON file in one step: a reader finds the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


def append_jsonl(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The complete lines of a file; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step`, and a half-written one. Rows without a step stay."""
    rows = [row for row in read_jsonl(path) if row.get("step", 0) <= last_step]
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(aside, path)


def training_figure(path: Path, runs: dict[str, Sequence[dict]]) -> None:
    """Reward, J before and after thinking, and tokens per rollout against the step, runs overlaid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for label, rows in runs.items():
        steps = [row["step"] for row in rows]
        axes[0].plot(steps, [row["reward"] for row in rows], label=label)
        if rows and rows[0]["J_last"] is not None:
            line = axes[1].plot(steps, [row["J_last"] for row in rows], label=f"{label}: after the last episode")[0]
            axes[1].plot(steps, [row["J_first"] for row in rows], "--", color=line.get_color(), label="before the first")
        axes[2].plot(steps, [row["response_tokens"] for row in rows], label=label)
    for axis, title in zip(axes, ("reward", "J", "tokens per rollout")):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    if axes[1].lines:
        axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.trace { border: 1px solid #8884; border-radius: .6rem; padding: .8rem 1rem; margin: 1rem 0; }
.prompt, .answer { font-family: ui-monospace, monospace; }
.episode { font-family: ui-monospace, monospace; display: flex; gap: 1rem; padding: .1rem .6rem; margin: .15rem 0;
           border-left: .35rem solid; border-radius: .2rem; }
.episode span:first-child { flex: 1; }
.number { font-variant-numeric: tabular-nums; white-space: pre; }
.verdict { font-weight: 600; }
"""


def traces_page(path: Path, title: str, examples: Sequence[dict]) -> None:
    """One self-contained page: a card per rollout, its episodes coloured by progress."""
    cards = []
    for example in examples:
        J, blocks = example["J"], []
        for j, text in enumerate(example["episodes"]):
            progress = J[j + 1] - J[j] if J else 0.0
            colour = GOOD if progress > 0 else BAD if progress < 0 else FLAT
            numbers = f"J {J[j]:.2f} → {J[j + 1]:.2f}  {progress:+.2f}" if J else ""
            blocks.append(f'<div class="episode" style="border-color: rgb({colour}); '
                          f'background: rgba({colour}, {0.08 + 0.3 * abs(progress):.2f})">'
                          f'<span>{html.escape(text)}</span><span class="number">{numbers}</span></div>')
        verdict = "✓ right" if example["reward"] else "✗ wrong"
        prompt, answer = html.escape(example["prompt"]), html.escape(example["answer"])
        cards.append(f'<section class="trace"><div class="prompt">{prompt}</div>{"".join(blocks)}'
                     f'<div class="answer">{answer} <span class="verdict">{verdict}</span></div></section>')
    right = sum(bool(example["reward"]) for example in examples)
    path.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{right} of {len(examples)} right. J is the probability of a right answer if thinking stopped there, measured by forcing an
answer. An episode's progress is J after it minus J before it: <b style="color: rgb({GOOD})">blue</b> gained,
<b style="color: rgb({BAD})">orange</b> lost, grey changed nothing.</p>
{"".join(cards)}
</body></html>
""")
