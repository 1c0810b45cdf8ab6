"""What a run shows: lines of one width, rows that survive a crash, a page that no text can break."""

import json
import random

import pytest

from nanomrt import report


def row(rng: random.Random, step: int, outcome_only: bool = False) -> dict:
    J = None if outcome_only else rng.random()
    return {"step": step, "reward": rng.random(), "J_first": J, "J_last": J, "response_tokens": rng.uniform(1, 9999),
            "finished": rng.random(), "entropy": rng.uniform(0, 9), "grad_norm": 10 ** rng.uniform(-6, 9),
            "max_logprob_diff": 10 ** rng.uniform(-9, 1),
            **{f"{stage}_tokens": 10 ** rng.uniform(0, 12) for stage in ("trace", "fork", "update")},
            **{f"seconds_{stage}": 10 ** rng.uniform(-5, 5) for stage in ("trace", "fork", "update")}}


def test_all_step_lines_have_one_width():
    rng = random.Random(0)
    lines = [report.step_line(row(rng, rng.randint(1, 9999), outcome_only=i % 3 == 0), 9999, rng.uniform(0, 80_000))
             for i in range(300)]
    broken = {"grad_norm": float("nan"), "reward": float("inf"), "max_logprob_diff": float("nan")}
    lines += [report.step_line(row(rng, 1) | {name: value}, 9999, 8e6) for name, value in broken.items()]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-9, 0.99949, 0.9996, 9.996, 99.96, 999.6, 9999.6, 1e12, -0.5, -1e8, None,
                               float("-inf")])
def test_compact_numbers_have_their_width_and_mean_what_they_say(x):
    text = report.compact(x)
    assert len(text) == 4
    if x is not None:
        assert float(text) == pytest.approx(x, rel=0.05, abs=0.001)


@pytest.mark.parametrize("seconds", [0, 59.4, 59.6, 3599.6, 359_999, 360_000, 99 * 86_400])
def test_durations_take_six_characters_at_most(seconds):
    assert len(report.duration(seconds)) <= 6


def test_the_reward_comes_first():
    line = report.step_line(row(random.Random(0), 3) | {"reward": 0.123}, 60, 190)
    assert line.split()[:3] == ["3/60", "reward", ".123"] and line.endswith("3m10s")


def test_a_step_line_ends_with_what_the_run_sampled_and_what_the_step_took():
    """Traces, forced answers, and (in seconds) the update."""
    spent = {"trace_tokens": 1_070_000, "fork_tokens": 52_300, "seconds_trace": 1.12, "seconds_fork": 0.623,
             "seconds_update": 12.2}
    assert "  sampled 1.07M+.052M  1.1+.62+ 12 s  eta " in report.step_line(row(random.Random(0), 3) | spent, 60, 190)


def test_rows_after_the_resumed_step_and_half_written_ones_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ({"commit": "abc"}, {"step": 1}, {"step": 2}, {"step": 3}):
        report.append_jsonl(path, line)
    with open(path, "a") as file:
        file.write('{"step": 4, "rew')
    report.truncate_jsonl(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"commit": "abc"}, {"step": 1}, {"step": 2}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_reading_a_file_that_is_not_there(tmp_path):
    assert report.read_jsonl(tmp_path / "none.jsonl") == []


EXAMPLE = {"step": 1, "prompt": "numbers 3 7 4 target 25", "episodes": ["<try> 7 + 4 = 11", "<try> 3 * 7 = 21 yes", "<try> no"],
           "J": [0.0, 0.25, 1.0, 0.5], "answer": "</think> <answer> 1 </answer>", "reward": 1.0}


def test_a_rollout_is_shown_episode_by_episode_with_its_progress():
    lines = report.show_rollout(EXAMPLE).splitlines()
    assert len(lines) == 5
    assert "J 0.00" in lines[0] and "+0.25" in lines[1] and "+0.75" in lines[2] and "-0.50" in lines[3] and "right" in lines[4]
    assert "J " not in report.show_rollout(EXAMPLE | {"J": []})


def test_the_page_has_every_episode_with_its_sign_and_colour(tmp_path):
    report.traces_page(tmp_path / "t.html", "title", [EXAMPLE, EXAMPLE | {"reward": 0.0, "J": []}])
    page = (tmp_path / "t.html").read_text()
    assert page.count('class="episode"') == 6
    for number in ("+0.25", "+0.75", "-0.50", "1 of 2 right"):
        assert number in page
    assert page.index(report.GOOD) < page.index(report.BAD)


@pytest.mark.parametrize("field", ["prompt", "answer", "episodes"])
def test_hostile_text_stays_text(tmp_path, field):
    hostile = '<script>alert("x")</script>'
    report.traces_page(tmp_path / "t.html", hostile, [EXAMPLE | {field: [hostile] * 3 if field == "episodes" else hostile}])
    page = (tmp_path / "t.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_training_figure_is_drawn_with_and_without_J(tmp_path):
    rng = random.Random(0)
    rows = {"mrt": [row(rng, i) for i in range(3)], "grpo": [row(rng, i, outcome_only=True) for i in range(3)]}
    report.training_figure(tmp_path / "a.png", rows)
    report.training_figure(tmp_path / "b.png", {"grpo": rows["grpo"]})
    report.training_figure(tmp_path / "c.png", {"a gap": [rows["grpo"][0], *rows["mrt"]], "nothing yet": []})
    report.training_figure(tmp_path / "d.png", {})
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png", "c.png", "d.png"))
