"""The benchmark programs without a GPU: what it counts, what it prints, and that it runs from end to end."""

import json
import random
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import kernels
from data.countdown import Countdown
from kernels import bench
from kernels import profile as step_profile
from nanomrt import bench as sampler_bench
from nanomrt.config import RunConfig, UserError
from nanomrt.model import Llama


@pytest.mark.parametrize("lengths", [(1,), (0, 3), (5, 1, 0, 17), tuple(random.Random(0).choices(range(40), k=20))])
def test_attention_flops_are_those_of_the_visible_pairs(lengths):
    """Two products of D multiplications and additions for every key that a query sees; backward has five."""
    H, D = 3, 8
    pairs = sum(1 for T in lengths for i in range(T) for j in range(T) if j <= i)
    flops = bench.attention_flops(lengths, H, D)
    assert flops == {bench.FORWARD: 4 * H * D * pairs, bench.BACKWARD: 10 * H * D * pairs, bench.BOTH: 14 * H * D * pairs}


def test_logprob_flops():
    """2 N V C for each product: one forward, two more backward, and one more for whom computes the logits twice."""
    case = bench.logprob_case(6, 4, 10, "cpu", torch.float32)
    assert case.flops == {bench.FORWARD: 2 * 6 * 10 * 4, bench.BOTH: 6 * 6 * 10 * 4}
    provider = bench.Provider("peer", lambda case: bench.naive(False, case)._replace(recomputes=True))
    rows = bench.bench(case, [provider], "cpu", 1, 1)
    assert [row["flops"] for row in rows] == [480, 1920]


@pytest.mark.parametrize("total, median, longest", [(1, 8, 16), (40, 8, 16), (65536, 1024, 8192)])
def test_lognormal_lengths(total, median, longest):
    lengths = bench.lognormal_lengths(total, median, longest)
    assert sum(lengths) == total and min(lengths) >= 1 and max(lengths) <= longest
    assert lengths == bench.lognormal_lengths(total, median, longest)


def test_goals_belong_to_shapes():
    """One in TFLOP/s is for one head dim and length; a pack's is the speed of its peers, and decoding's a share of a copy's."""
    goals = lambda *lengths, D=64: bench.attention_case("", lengths, 1, 1, D, "cpu", torch.float32).goals
    assert goals(1024)[bench.FORWARD] == {"tflops": (270, 310), bench.FLASH: (1.25,), bench.CUDNN: (0.95,)}
    assert goals(4096, D=128)[bench.BACKWARD] == {"tflops": (230, 280), bench.FLASH: (0.9,)} and bench.BOTH not in goals(1024)
    assert set(goals(1024, 7)[bench.BACKWARD]) == {bench.FLASH, bench.CUDNN, bench.EFFICIENT, bench.FLEX}
    assert "tflops" not in goals(5)[bench.FORWARD] and bench.CUDNN not in goals(5, D=128)[bench.FORWARD]
    goals = bench.logprob_case(2, 4, 8, "cpu", torch.float32).goals
    assert goals[bench.BOTH] == {"tflops": (500, 600), "error": (1e-3, 2e-4)} and goals[bench.FORWARD]["tflops"] == (480, 600)
    goals = [bench.decode_case(1, M, 7, 2, 2, 1, 16, "cpu", torch.float32).goals[bench.FORWARD] for M in (3, 16)]
    assert goals == [{"share": (0.75, 0.88)}, {"share": (0.75, 0.88), bench.UNSHARED: (5, 6.5)}]
    named = {provider.name for provider in (*bench.ATTENTION, *bench.DECODE)}
    assert {bench.FLASH, bench.CUDNN, bench.EFFICIENT, bench.FLEX, bench.UNSHARED} <= named


def test_every_provider_of_a_case_gives_the_same_gradients():
    """What the clock compares is the same work: peers that run here agree with ours, on a pack as well."""
    for case, providers in ((bench.attention_case("", (5, 5), 2, 1, 16, "cpu", torch.float32), bench.ATTENTION[:2]),
                            (bench.logprob_case(6, 16, 40, "cpu", torch.float32), [bench.LOGPROB[0], bench.LOGPROB[2]])):
        results = []
        for provider in providers:
            call = provider.prepare(case)
            results.append(torch.autograd.grad(call.forward(), call.leaves, call.upstream))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_every_way_of_decoding_gives_the_same():
    """And the bytes are those of a cache in which nothing lies twice."""
    case = bench.decode_case(2, 3, 7, 2, 2, 1, 16, "cpu", torch.float32)
    assert case.bytes == {bench.FORWARD: 2 * 4 * 16 * (2 * 7 + 6 * 2)}
    results = [provider.prepare(case).forward().flatten() for provider in bench.DECODE]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-5, rtol=1e-5)


def test_bytes_of_norms_rotations_and_swiglu():
    """Five rows of 16 numbers: fp32 in and bf16 out, and a weight; else two bytes a number, and the angles."""
    make = lambda name, *width: bench.elementwise_case(name, 5, width, "cpu", torch.bfloat16)
    norm, turn, gate = make("rms_norm", 16), make("rotate", 2, 16), make("swiglu", 16)
    assert norm.bytes == {bench.FORWARD: 80 * (4 + 2) + 64, bench.BACKWARD: 80 * (4 + 2 + 4) + 2 * 64}
    assert turn.bytes == {phase: 160 * (2 + 2) + 5 * 16 * 4 for phase in (bench.FORWARD, bench.BACKWARD)}
    assert gate.bytes == {bench.FORWARD: 80 * 2 * 3, bench.BACKWARD: 80 * 2 * 5}
    for case in (norm, turn, gate):
        rows = bench.bench(case, bench.ELEMENTWISE[:2], "cpu", 1, 1)
        assert [(row["provider"], row["pass"]) for row in rows] == [
            (name, phase) for name in ("nanomrt", "PyTorch") for phase in (bench.FORWARD, bench.BACKWARD)]
        assert all(row["gbs"] > 0 and "error" not in row for row in rows)


def test_a_padded_pack_holds_the_pack():
    lengths = (2, 5, 3)
    case = bench.attention_case("", lengths, 2, 1, 16, "cpu", torch.float32)
    mine, padded = bench.ours(case).forward(), bench.sdpa("FLASH_ATTENTION", case).forward()  # (N,H,D), (B,H,T,D)
    assert padded.shape == (3, 2, 5, 16)
    rows = torch.cat([padded[b, :, :T].transpose(0, 1) for b, T in enumerate(lengths)])
    torch.testing.assert_close(rows, mine, atol=1e-5, rtol=1e-5)


def test_a_failing_provider_is_a_row_with_its_reason():
    def refuse(case):
        raise RuntimeError("no such | kernel\nand a second line" + " word" * 100)

    case = bench.logprob_case(6, 4, 10, "cpu", torch.float32)
    huge = bench.Provider("huge", lambda case: bench.naive(False, case), lambda case: 2**63)
    rows = bench.bench(case, [bench.Provider("peer", refuse), huge, bench.LOGPROB[2]], "cpu", 1, 1)
    assert [row["pass"] for row in rows] == [None, None, bench.FORWARD, bench.BOTH]
    assert rows[0]["reason"].startswith("not available: no such | kernel and") and len(rows[0]["reason"]) < 120
    assert "GB are free" in rows[1]["reason"]
    bench.compare(rows, 1.0, 1.0)
    lines = bench.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1


def test_ratio_is_against_the_best_peer():
    """And, for ours, against those that are named. The share of the matmul rate counts what was computed: at 4 TFLOP/s half of
    8, whatever the task needed; the floor counts the task, or its bytes at the rate of a copy."""
    row = lambda provider, ms: {"case": "c", "pass": "forward", "provider": provider, "ms": ms, "flops": (ms or 0) * 4e9,
                                "task_flops": 4e9, "bytes": None, "goals": {"b": (1.0,)} if provider == bench.OURS else {}}
    rows = [row(bench.OURS, 2.0), row("nanomrt, one pass", 1.0), row("a", 3.0), row("b", 4.0), row(bench.FLASH, 6.0),
            row(bench.CUDNN, None)]
    rows[1] |= {"gbs": 4.0, "bytes": 4e6}
    bench.compare(rows, 8.0, 16.0)
    assert [x.get("ratio") for x in rows] == [1.5, 3.0, 1.0, 0.75, 0.5, None]
    assert [x.get("share") for x in rows] == [0.5, 0.25, 0.5, 0.5, 0.5, None]
    assert [x.get("floor_ms") for x in rows] == [0.5, 0.25, 0.5, 0.5, 0.5, None]
    assert [x.get("against") for x in rows] == [{"b": 2.0, bench.FLASH: 3.0}, {bench.FLASH: 6.0}, None, None, None, None]
    assert "| b 2.00 (goal 1.00), SDPA FLASH 3.00 |" in bench.table(rows)


def test_memory_that_runs_out_while_measuring_drops_one_provider():
    def fails(_):
        raise torch.OutOfMemoryError

    failed, measured = bench.measure([(lambda: 1, fails), (lambda: 1, lambda x: x)], "cpu", 1, 3)
    assert failed == [] and len(measured) == 3


@pytest.mark.parametrize("only", [None, "attention", "logprob", "decode", "elementwise"])
def test_dry_run(only, tmp_path, capsys):
    """From end to end: tables on the screen, every row in the file, a figure beside it."""
    assert bench.main(["--dry-run", "--out", str(tmp_path / "new"), *(["--only", only] if only else [])]) == 0
    name = "kernels-dry-run-on-a-cpu" + (f"-{only}" if only else "")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{name}.json", f"{name}.png"]
    saved = json.loads((tmp_path / "new" / f"{name}.json").read_text())
    assert set(saved["rows"]) == ({only} if only else set(bench.SHOWN)) and len(saved["machine"]) == 2
    assert saved["versions"]["torch"] == torch.__version__
    for rows in saved["rows"].values():
        mine = [row for row in rows if row["provider"] == "nanomrt"]
        assert mine and all(row["ms"] > 0 and row["share"] > 0 and row["floor_ms"] > 0 and row["repeats"] == 1 for row in mine)
    shown = capsys.readouterr().out
    assert "| nanomrt" in shown and ("### attention" in shown) == (only in (None, "attention"))
    assert ("GB/s" in shown.partition("### ")[2]) == (only in (None, "decode", "elementwise"))


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device.*--dry-run"):
        bench.main([])


@pytest.mark.parametrize("arguments", [["--only", "sampler"], ["--nonsense"], ["--out"]])
def test_wrong_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--dry-run", *arguments])
    assert "usage: python -m kernels.bench" in capsys.readouterr().err


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        bench.main(["--dry-run", "--out", str(tmp_path / "file")])


def test_dry_run_of_the_sampler(tmp_path, capsys):
    """Every provider that runs here is a row in the file and on the screen; products are the floor."""
    path = sampler_bench.main(["--dry-run", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)])
    saved = json.loads(path.read_text())
    rows, shown = saved["rows"], capsys.readouterr().out
    assert {row["provider"] for row in rows} >= {"nanomrt", "products", "branches of the trace", "traces", "forced answers",
                                                 "nanomrt, nothing shared"}
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert all(row["share_of_floor"] == 1 for row in rows if row["provider"] == "products") and " 100% " in shown
    assert shown.count("\n") == len(rows) + 2
    assert torch.__version__.startswith(saved["versions"]["torch"]) and saved["processor"] == sampler_bench.processor()


def test_one_part_of_the_sampler(tmp_path, capsys):
    """It has a file of its own; the roofline has none where it would take a CPU hours."""
    options = ["--device", "cpu", "--out", str(tmp_path), "--only"]
    assert sampler_bench.main(["--dry-run", *options, "forks"]).name.endswith("-forks.json")
    assert capsys.readouterr().out.count("2 x 12 forks") == 2
    with pytest.raises(SystemExit, match="2"):
        sampler_bench.main([*options, "roofline"])
    assert "needs a CUDA device" in capsys.readouterr().err


def test_dry_run_of_the_profile(tmp_path, capsys):
    """Each operation is in one group, the groups hold all of the time, and the file has what the screen shows."""
    assert step_profile.main(["--dry-run", "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "profile-dry-run-on-a-cpu.json").read_text())
    assert sum(row["ms"] for row in saved["groups"]) == pytest.approx(saved["busy_ms"])
    assert {row["group"] for row in saved["operations"]} >= {"products", "attention", "log-probs", "norms", "SwiGLU"}
    assert 0 < saved["elementwise_ms"] < saved["busy_ms"] and saved["mfu"] > 0
    assert "| products" in capsys.readouterr().out


def test_the_flops_of_a_step():
    """One layer, two tokens, counted by hand: 6 per weight and token, and 14 D for each of three visible pairs and two heads."""
    config = replace(step_profile.TINY, num_hidden_layers=1)
    C, F, V, H, K, D = 32, 64, 118, 2, 1, 16
    weights = C * H * D + 2 * C * K * D + H * D * C + 3 * C * F + V * C
    assert step_profile.flops(Llama(config), (2,)) == 6 * weights * 2 + 14 * D * H * 3


def test_the_floor_of_a_step():
    """One layer, one token, 7 weights: every tensor that is read or written, by the bytes of its numbers."""
    config = replace(step_profile.TINY, num_hidden_layers=1)
    stream, half = 4, 2  # fp32 and bf16
    norm = (stream + half) + (stream + half + stream)  # x, y; x, dy, dx
    residual = (stream + half + stream) + (stream + half) + (stream + stream + stream)  # a + b; db of dy; dy + the norm's dx
    rotation = (half + half) + (half + half)  # x, y; dy, dx
    swiglu = (half + half + half) + (half + half + half + half + half)  # gate, up, y; gate, up, dy, dgate, dup
    cast = (4 + 2) + (2 + 4)  # a weight; its gradient
    assert step_profile.floor_bytes(config, 1, 7) == 2 * (norm + residual) * 32 + rotation * 3 * 16 + swiglu * 64 + cast * 7


def test_a_kernel_is_not_counted_beside_its_operation(monkeypatch):
    """On a GPU the profiler lists both, and both have the kernel's time; so may have an overhead of the profiler's own."""
    event = lambda key, device: SimpleNamespace(key=key, device_type=device, self_device_time_total=100.0, count=1)
    events = [event("aten::mul", DeviceType.CPU), event("void at::native::vectorized_kernel", DeviceType.CUDA),
              event("Command Buffer Full", DeviceType.CPU)]
    recorded = nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(step_profile, "profile", lambda activities: recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert [row["operation"] for row in step_profile.by_operation(lambda: None, "cuda")] == ["aten::mul"]


def test_the_forward_pass_of_an_operator_of_ours_counts_as_its_own():
    """Autograd runs it inside of a function with a name of its own, to which the profiler gives its kernels."""
    @torch.library.custom_op("nanomrt::attention_of_a_test", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_autograd(lambda ctx, g: double(g))
    x = torch.ones(9, requires_grad=True)
    rows = {row["operation"]: row for row in step_profile.by_operation(lambda: double(x).sum().backward(), "cpu")}
    assert rows["nanomrt::attention_of_a_test"]["group"] == "attention"
    assert not any(name.endswith("_default") for name in rows)


def test_a_peer_that_fails_loses_no_figures(capsys):
    """It is left out and named, whether it fails in a call or before; a failure of ours is one."""
    def fails() -> None:
        raise RuntimeError("no such op")

    timing = sampler_bench.Timing(2)
    seconds = timing.medians("batch 1", {"nanomrt": lambda: None}, {"a": lambda: fails, "b": fails, "absent": lambda: None})
    assert list(seconds) == ["nanomrt"] and timing.without == {"a", "b"}
    lines = capsys.readouterr().err
    assert all(f"batch 1, {name}: left out from here on: no such op" in lines for name in "ab") and "absent" not in lines
    with pytest.raises(RuntimeError, match="no such op"):
        timing.medians("batch 1", {"nanomrt, alone": fails})


def test_a_slow_peer_is_called_once(capsys):
    """It is interrupted, even if it takes the interruption for a failure of its own; ours has as much time as it needs."""
    calls = []

    def slow() -> None:
        calls.append("slow")
        try:
            time.sleep(5)
        except Exception:
            time.sleep(5)

    timing, began = sampler_bench.Timing(1, limit=0.2), time.monotonic()
    for label in ("batch 1", "batch 2"):
        seconds = timing.medians(label, {"nanomrt": lambda: time.sleep(0.22)}, {"slow": lambda: slow, "fast": lambda: int})
        assert list(seconds) == ["nanomrt", "fast"] and seconds["nanomrt"] > 0.2
    assert calls == ["slow"] and time.monotonic() - began < 5
    assert capsys.readouterr().err.count("batch 1, slow: left out from here on: not done after 0.2 s") == 1


def test_peers_can_be_left_out(monkeypatch, capsys, tmp_path):
    """By name, and then nothing of theirs is loaded; a name that nobody has is an error."""
    def loads(*_, **__):
        raise RuntimeError("loaded")

    for name in ("their_llama", "trl_steps"):
        monkeypatch.setattr(sampler_bench, name, loads)
    monkeypatch.setattr(sampler_bench, "grpo_step", lambda *_: int)
    options = ["--dry-run", "--device", "cpu", "--out", str(tmp_path), "--only", "grpo"]
    sampler_bench.main(options)
    assert "TRL GRPOTrainer: left out from here on: loaded" in capsys.readouterr().err
    sampler_bench.main([*options, "--without", "TRL GRPOTrainer", "Hugging Face generate"])
    assert "loaded" not in capsys.readouterr().err
    timing = sampler_bench.Timing(1, without={"Hugging Face generate"})
    task = Countdown(RunConfig())
    sampler_bench.decode_rows(sampler_bench.small_llama(task, "cpu"), task, {"": torch.tensor([1])}, timing)
    assert "loaded" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sampler_bench.main([*options, "--without", "Hugging Face"])
    assert "invalid choice: 'Hugging Face' (choose from" in capsys.readouterr().err


def test_ragged_rows_count_their_own_tokens(monkeypatch):
    """And `generate` has to go on to the longest; a floor for all rows would be none for these."""
    task, asked = Countdown(RunConfig()), []
    model, budgets = sampler_bench.small_llama(task, "cpu"), torch.tensor([3, 1, 5])
    monkeypatch.setattr(sampler_bench, "hugging_face", lambda *arguments: asked.append(arguments[-1]) or int)
    rows = sampler_bench.decode_rows(model, task, {"ragged": budgets}, sampler_bench.Timing(1))
    assert [row["provider"] for row in rows] == ["nanomrt", "nanomrt, alone", "Hugging Face generate"] and asked == [5]
    assert all(row["tokens_per_second"] * row["seconds"] == pytest.approx(9) for row in rows)
    assert all(row["share_of_floor"] is None for row in rows)
    samples = sampler_bench.ours(model, sampler_bench.random_rows(model, 1, sampler_bench.PROMPT), budgets)()
    assert samples.is_action.sum(1).tolist() == [3, 1, 5]


def test_the_floor_of_a_decoding_step():
    """One layer by hand, fp32: few rows are bound by the weights' bytes, many by arithmetic, and the cache comes on top."""
    model = Llama(replace(step_profile.TINY, num_hidden_layers=1))
    C, F, V, H, K, D = 32, 64, 118, 2, 1, 16
    weights = C * H * D + 2 * C * K * D + H * D * C + 3 * C * F + V * C
    token = 4 * 2 * K * D
    floor = lambda rows: sampler_bench.step_floor(model, rows, 10, copy=1e3, matmul=1e4)
    assert floor(1) == pytest.approx((4 * weights + 10 * token) / 1e3)
    assert floor(100) == pytest.approx(2 * 100 * weights / 1e4 + 10 * token / 1e3)


def test_a_step_of_the_roofline_sees_its_contexts(monkeypatch):
    """Each of STEPS steps attends to the whole prefix and to a suffix that grows by one, and nobody finishes; what is counted is
    what is read."""
    seen, read = [], []
    attend = kernels.branch_attention

    def watched(q, prefix_k, prefix_v, positions, limit, group, place, suffix_k, suffix_v, length):
        seen.append((positions[:, None] < limit[..., None]).sum(-1).flatten()[place] + length)
        read.append(prefix_k.shape[0] * prefix_k.shape[2] + int(length.sum()))
        return attend(q, prefix_k, prefix_v, positions, limit, group, place, suffix_k, suffix_v, length)

    monkeypatch.setattr(kernels, "branch_attention", watched)
    S, M, L, t, steps = 2, 3, 20, 4, sampler_bench.STEPS
    model = Llama(replace(step_profile.TINY, num_hidden_layers=1))
    sampler_bench.step_seconds(model, S, M, L, t, sampler_bench.Timing(1), "")
    assert [rows.tolist() for rows in seen] == 2 * [[L + t + i + 1] * (S * M) for i in range(steps)]
    asked = []
    monkeypatch.setattr(sampler_bench, "step_floor", lambda model, rows, entries, *_: asked.append(entries) or 1.0)
    sampler_bench.roofline_rows(step_profile.TINY, "cpu", [(S, M, L, t)], sampler_bench.Timing(1))
    assert asked == [sum(read[:steps]) / steps]


def test_the_profile_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device.*--dry-run"):
        step_profile.main([])
