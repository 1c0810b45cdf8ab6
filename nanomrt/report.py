"""What a run shows: a line per step, decoded rollouts, JSON lines, figures and a page of traces.

Nothing here computes anything that training reads. matplotlib is imported only where a figure is drawn.
"""

import html
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nanomrt.config import UserError
from nanomrt.files import replace_text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of lines and bars: Okabe and Ito's
GOOD, BAD, FLAT = "28, 130, 190", "213, 94, 0", "128, 128, 128"  # blue, orange, grey: apart for every kind of eye


def duration(seconds: float) -> str:
    """Six characters at most, below a hundred days.

    >>> duration(7.2), duration(190), duration(3 * 3600 + 240), duration(30 * 3600 * 24)
    ('7s', '3m10s', '3h04m', '30d00h')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, hours = seconds // 60, seconds // 3600
    if hours == 0:
        return f"{minutes}m{seconds % 60:02d}s"
    return f"{hours}h{minutes % 60:02d}m" if hours < 100 else f"{hours // 24}d{hours % 24:02d}h"


def compact(x: float | None, width: int = 4) -> str:
    """A number in exactly `width` characters (4 hold all from -1e9 to 1e99), without the zero before the point.

    >>> compact(0.4126), compact(0.9999), compact(123.4), compact(12345.0), compact(-0.25, 4), compact(None)
    ('.413', '1.00', ' 123', ' 1e4', '-.25', '   -')
    """
    if x is None or not math.isfinite(x):
        return f"{'-' if x is None else x:>{width}}"
    for decimals in reversed(range(width)):
        text = re.sub(r"^(-?)0\.", r"\1.", f"{x:.{decimals}f}")
        if len(text) <= width:
            return f"{text:>{width}}"
    return f"{re.sub(r'e[+]0*', 'e', f'{x:.0e}'):>{width}}"


def step_line(row: dict, steps: int, eta: float) -> str:
    """One line per step, reward first; all lines of a run have one width, whatever happens in it. At its end stand the tokens
    that traces and forced answers have taken since the run began, and the seconds of this step's traces, forks and update."""
    show = lambda key: compact(row[key])
    sampled = "+".join(compact(row[f"{stage}_tokens"] / 1e6) + "M" for stage in ("trace", "fork"))
    seconds = "+".join(compact(row[f"seconds_{stage}"], 3) for stage in ("trace", "fork", "update"))
    return (f"{row['step']:>{len(str(steps)) + 2}}/{steps}  reward {show('reward')}  J {show('J_first')}>{show('J_last')}  "
            f"tokens {show('response_tokens')}  finished {show('finished')}  entropy {show('entropy')}  "
            f"grad {show('grad_norm')}  |dlogp| {row['max_logprob_diff']:5.0e}  "
            f"sampled {sampled}  {seconds} s  eta {duration(eta):>6}")


def show_rollout(example: dict) -> str:
    """A rollout on the terminal: an episode per line, with J after it."""
    J = example["J"]
    lines = [f"    {example['prompt']}" + (f"   J {J[0]:.2f}" if J else "")]
    lines += [f"      {text:<46}" + (f" J {J[j + 1]:.2f}  {J[j + 1] - J[j]:+.2f}" if J else "")
              for j, text in enumerate(example["episodes"])]
    return "\n".join([*lines, f"      {example['answer']}   {'right' if example['reward'] else 'wrong'}"])


def check_writable(folder: Path) -> None:
    """Raises UserError if a folder, there or not yet, can't be written to: to be asked before the work, not after it."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write to {folder}: {there} is no folder, or not yours to write to; name another one")


def check_figure(path: Path) -> None:
    """Raises UserError if no figure can be drawn there: no matplotlib, a kind of file that it doesn't know, no such place."""
    kinds = blank_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise UserError(f"{path} is no figure that matplotlib can draw: end it in .png, .pdf or .svg")
    check_writable(path.parent)


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
    replace_text(path, "".join(json.dumps(row) + "\n" for row in read_jsonl(path) if row.get("step", 0) <= last_step))


def blank_figure(width: float, height: float):
    """A matplotlib Figure of this size in inches. Raises UserError without matplotlib, an optional package."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state; savefig draws with Agg
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def training_figure(path: Path, runs: dict[str, Sequence[dict]]) -> None:
    """Reward, J before and after thinking, and tokens per rollout against the step, runs overlaid."""
    figure = blank_figure(12, 3.4)
    axes = figure.subplots(1, 3)
    for label, rows in runs.items():
        steps = [row["step"] for row in rows]
        axes[0].plot(steps, [row["reward"] for row in rows], label=label)
        first, last = ([math.nan if row[key] is None else row[key] for row in rows] for key in ("J_first", "J_last"))
        if not all(map(math.isnan, last)):  # a step without an episode is a gap in the line
            line = axes[1].plot(steps, last, label=f"{label}: after the last episode")[0]
            axes[1].plot(steps, first, "--", color=line.get_color(), label="before the first")
        axes[2].plot(steps, [row["response_tokens"] for row in rows], label=label)
    for axis, title in zip(axes, ("reward", "J", "tokens per rollout")):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        if axis.lines:
            axis.legend(frameon=False, fontsize="small").set_in_layout(False)  # a long name must not squeeze the axes
    figure.savefig(path, dpi=130)


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
""", encoding="utf-8")
