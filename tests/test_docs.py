"""What the documents say is true: files exist, line counts are right, commands parse, links resolve."""

import ast
import io
import json
import re
import shlex
import tokenize
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compare
from evaluate import summary_table
from nanomrt import methods, mrt
from nanomrt.config import ALGORITHMS, RunConfig, UserError
from nanomrt.report import step_line

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    source = path.read_text()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in skipped
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


ROWS = re.findall(r"^\| `([\w/]+\.py)` \| (\d*) \|", README, flags=re.MULTILINE)


def test_the_reading_order_lists_files():
    assert len(ROWS) >= 8


@pytest.mark.parametrize("name, stated", ROWS)
def test_stated_line_counts_are_true(name, stated):
    assert stated == str(code_lines(ROOT / name))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_resolve(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:nanomrt|kernels|data|tests|config)/[\w.]+)`", README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("script", ["train", "evaluate", "sample", "compare"])
def test_every_command_explains_itself(script, capsys):
    try:
        status = import_module(script).main(["--help"])
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 0 and "usage" in capsys.readouterr().out.lower()


def test_the_family_is_listed():
    """Every algorithm has its place in the README's table."""
    table = README[README.index("### The family\n") : README.index("A new credit-assignment idea")]
    assert set(re.findall(r"`(\w+)`", table.split("\n", 6)[-1])) >= set(ALGORITHMS)


def test_the_example_of_a_new_method_works():
    """The README's function credits a hand-made trace of three episodes: one that fails, one that finds, one that checks."""
    code, row = re.search(r"```python\n(def .*?)\n\n(.*?)\n```", README, flags=re.DOTALL).groups()
    there = dict(vars(mrt))
    exec(code, there)
    token, first, start = torch.arange(7), torch.zeros(1).long(), torch.tensor([1, 3, 5])
    batch = mrt.Batch(token, first + 7, token > 0, 0.0 * token, first + 1.0, first, first == 0)
    episodes = mrt.Episodes(first.repeat(3), start, start + 2, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0]))
    credit = there["first_hit_credit"](batch, episodes, RunConfig(alpha=0.5))
    assert credit.tolist() == [0, 0, 0, 0.5, 0.5, -0.5, -0.5]
    name, method = eval(f"{{{row}\n}}", vars(methods) | {"mrt": SimpleNamespace(**there)}).popitem()
    assert name == "first_hit" and method.gather is methods.traces_with_J and method.credit is there["first_hit_credit"]


def test_the_newcomers_run_is_the_one_that_is_kept():
    """Both step lines, the table but for two columns, and the largest |dlogp|."""
    run = ROOT / "results/newcomer"
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "reward" in row]
    summary = json.loads((run / "summary.json").read_text())
    assert README.count(f"\n{step_line(rows[-1], len(rows), eta=0.0)}\n") == 2
    cells = lambda line: re.split(r"  +", line.strip())
    shown = [cells(line) for line in README.splitlines()]
    for row in map(cells, summary_table({"small": summary}).splitlines()):
        assert [*row[:5], row[6]] in shown  # without the regret to 54 and to 144 tokens
    assert f"({max(row['max_logprob_diff'] for row in rows):.1e} at most in this run)".replace("e-0", "e-") in README
    assert f"commit {summary['commit']}" in README


def test_the_share_of_forced_answers_is_that_of_the_runs_in_the_table():
    stages = [json.loads((ROOT / f"results/small/mrt_online-seed={seed}.json").read_text())["stages"] for seed in range(5)]
    share = sum(run["fork"] / sum(run.values()) for run in stages) / len(stages)
    assert f"({share:.0%} of a step in\n  these runs;".replace("%", " %") in README


def test_quoted_configurations_exist():
    for name in re.findall(r"config/\w+\.py", README):
        assert (ROOT / name).is_file()


def comparisons() -> list[str]:
    """Every `compare.py` command of the README and of docs/results.md, but the one of a method that is yet to be written."""
    joined = (README + RESULTS).replace("\\\n", "")
    rows = RESULTS.split("\n## The command of each table\n")[1]
    found = re.findall(r"^python compare\.py (.*)$", joined, re.MULTILINE) + re.findall(r"`(config/[^`]*|--name [^`]*)`", rows)
    return [command for command in found if "first_hit" not in command]


@pytest.mark.parametrize("command", comparisons())
def test_the_command_of_each_table_can_be_run(command, tmp_path, monkeypatch):
    """Its arms and keys are right; what is missing here is the runs."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    config = [] if words[0].startswith("config/") else ["config/study.py"]  # a second table of that config
    with pytest.raises(UserError, match="has no such run of .* leave out --report to train it"):
        compare.main([*config, *words, "--report", "--results", str(tmp_path)])


def quoted(text: str) -> list[tuple[float, float, float, int]]:
    """Every 'value [low high]' of a table, and the digits after its point."""
    found = re.findall(r"([+-]?[\d.]+) \[([+-]?[\d.]+) ([+-]?[\d.]+)\]", text.replace("−", "-").replace("*", ""))
    return [(*map(float, numbers), len(numbers[0].partition(".")[2])) for numbers in found]


MEASURED = {numbers[:3] for path in (ROOT / "results").rglob("*.md") for numbers in quoted(path.read_text())}
MEASURED |= {(-value, -high, -low) for value, low, high in MEASURED}  # of a difference, the other way round


@pytest.mark.parametrize("text, least", [
    (README.split("\n## Results\n")[1].split("\n## ")[0], 30),
    (README.split("\n## The method\n")[1].split("\n## ")[0], 1),
    (RESULTS.split("\n## What earlier runs showed\n")[0], 80),
], ids=["README, results", "README, method", "docs/results.md"])
def test_the_documents_quote_the_tables_of_the_runs(text, least):
    """Every value with its interval stands in a table that `compare.py` or `nanomrt.influence` wrote."""
    stated = quoted(text)
    assert len(stated) >= least
    for *numbers, digits in stated:
        near = 0.5 * 10**-digits + (0.06 if digits == 0 else 1e-9)  # of what the table rounded already
        assert any(all(abs(a - b) <= near for a, b in zip(numbers, row)) for row in MEASURED), numbers
