"""The ten ways of gathering a batch: what is context and what is action, where J or V is asked for, and what it costs."""

import random
import zlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_mrt import make_batch, make_episodes

import train
from data.countdown import Countdown
from nanomrt import mrt, rollout
from nanomrt.config import ALGORITHMS, READ_BY, SUPERVISED, RunConfig
from nanomrt.methods import METHODS, Gathered, measured, stopping, traces_for_progress, traces_with_J
from nanomrt.model import Llama, Packed
from nanomrt.rollout import boundaries, examples, force_answers, grade, roll_out, training_sampling
from nanomrt.run import Run

PROBLEMS, GROUP = 6, 4


class Verdicts(Countdown):
    """A task whose verdict a random model can earn: the parity of a hash of what is said after the thinking."""

    def grade(self, problem, response: str) -> float:
        _, close, answer = response.rpartition("</think>")
        return float(bool(close) and zlib.crc32(f"{problem} {answer}".encode()) % 2)


@pytest.fixture
def task() -> Countdown:
    return Verdicts(RunConfig())


@pytest.fixture
def model(config, task) -> Llama:
    """What it says depends on the context and is far from uniform: often `<try>`, sometimes `</think>` or `</answer>`."""
    model = Llama(replace(config, tie_word_embeddings=False)).initialise(generator(0))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
        model.lm_head.weight.mul_(15)
        model.lm_head.weight[task.open_episode] *= 2.5
        model.lm_head.weight[[task.close_thinking, task.close_answer]] *= 1.5
    return model


@pytest.fixture
def asked(monkeypatch) -> list[SimpleNamespace]:
    """Every call of the sampler, in order: whose context, what was forced, what was drawn."""
    calls, branch = [], rollout.branch

    def spy(model, prefix, segment, contexts, forced, sampling, generator, keep=True):
        samples = branch(model, prefix, segment, contexts, forced, sampling, generator, keep)
        again = [len(given) > 2 for given in forced]  # the context's last token once more
        contexts = [[*context, *given[:n]] for context, given, n in zip(contexts, forced, again, strict=True)]
        forced = [list(given[n:]) for given, n in zip(forced, again, strict=True)]
        calls.append(SimpleNamespace(contexts=contexts, forced=forced, sampling=sampling,
                                     samples=samples, drawn=[n[m].tolist() for n, m in zip(samples.tokens, samples.is_action)]))
        return samples

    monkeypatch.setattr(rollout, "branch", spy)
    return calls


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(algorithm: str, **keys) -> RunConfig:
    return RunConfig(**dict(algorithm=algorithm, prompts_per_step=PROBLEMS, group_size=GROUP, thinking_budget=40) | keys)


def gather(model: Llama, task: Countdown, config: RunConfig, seed: int = 0) -> Gathered:
    problems = task.problems("train", config.prompts_per_step, 0)
    return METHODS[config.algorithm].gather(model, task, problems, config, generator(seed))


def actions(gathered: Gathered) -> list[list[bool]]:
    """Of each row."""
    return [part.tolist() for part in gathered.batch.is_action.split(gathered.batch.lengths.tolist())]


def episodes(gathered: Gathered) -> list[tuple[int, int, int, float, float]]:
    """(row, start, end, value before, value after), places counted from the row's first token."""
    E, offset = gathered.episodes, gathered.batch.offset
    columns = (E.row, E.start - offset[E.row], E.end - offset[E.row], E.J_before, E.J_after)
    return list(zip(*(x.tolist() for x in columns), strict=True))


def greedy_J(model: Llama, task: Countdown, gathered: Gathered, row: list[int], position: list[int]) -> list[float]:
    """The default J, one greedy answer, which tests/test_sampler.py checks against decoding from scratch."""
    return force_answers(model, task, gathered.rollouts, row, position, 1, 0.0, None).J.tolist()


def new_episodes(task: Countdown, gathered: Gathered, r: int, begin: int) -> list[int]:
    """Where the episodes of a row end that begin at or behind this place."""
    start = gathered.rollouts.prompt_length[r]
    return [start + end for end in task.episode_ends(gathered.rollouts.response(r)) if start + end > begin]


# --- What all methods share ---


@pytest.mark.parametrize("verdict", [float("nan"), float("inf")])
def test_a_verdict_that_is_no_number_is_an_error_that_names_its_row(task, monkeypatch, verdict):
    problem = task.problems("train", 1, 0)[0]
    monkeypatch.setattr(task, "grade", lambda problem, text: verdict if "7" in text else 1.0)
    responses = [task.tokenizer.encode(text) for text in ("8", "7")]
    assert grade(task, [problem], responses[:1]) == [1.0]
    with pytest.raises(ValueError, match=f"row 1: .*grade says {verdict} of '7', an answer to Problem"):
        grade(task, [problem] * 2, responses)


def test_who_measures_twice_pays_twice(model, task):
    """A method of one's own may: what a value costs is added to what has been measured before."""
    config, g = RunConfig(group_size=GROUP), torch.Generator().manual_seed(0)
    gathered = traces_with_J(model, task, task.problems("train", PROBLEMS, 0), config, g)
    again = measured(gathered, *boundaries(task, gathered.rollouts), stopping(model, task, config, g))
    assert again.fork_tokens == 2 * gathered.fork_tokens > 0 and again.fork_seconds > gathered.fork_seconds > 0


@pytest.fixture
def forced(model, task) -> SimpleNamespace:
    """A step of mrt_online without `forced_on`, with all of it, and the rows that stopped with budget left."""
    config, problems = RunConfig(group_size=GROUP, progress_norm="none", J_discount=0.5), task.problems("train", PROBLEMS, 0)
    gather = lambda share: traces_for_progress(model, task, problems, replace(config, forced_on=share), generator(3))
    free, both = gather(0.0), gather(1.0)
    stops = [task.thinking_tokens(free.rollouts.response(r)) for r in range(PROBLEMS * GROUP)]
    rows = [r for r, stop in enumerate(stops) if stop < config.thinking_budget and
            free.rollouts.response(r)[stop] == task.close_thinking]
    assert 3 < len(rows) < PROBLEMS * GROUP
    return SimpleNamespace(config=config, free=free, both=both, rows=rows, stops=[stops[r] for r in rows])


def test_forced_on_a_trace_goes_on_from_its_stop_to_the_end_of_the_budget(forced, task):
    """What stands before is the trace's own; a <try> takes the place of every </think>, and neither they nor what was before
    is an action."""
    free, batch, own = forced.free, forced.both.batch, PROBLEMS * GROUP
    lengths = batch.lengths.tolist()
    tokens, is_action = (x.split(lengths) for x in (batch.tokens, batch.is_action))
    assert len(lengths) == own + len(forced.rows)
    full = training_sampling(task, forced.config).max_new_tokens
    for more, r, stop in zip(range(own, len(lengths)), forced.rows, forced.stops, strict=True):
        cut = free.rollouts.prompt_length[r] + stop
        assert tokens[more][:cut].tolist() == free.rollouts.tokens[r][:cut] and not is_action[more][:cut].any()
        later = tokens[more][cut:]
        assert later[0] == task.open_episode and task.close_thinking not in later
        assert torch.equal(is_action[more][cut:], later != task.open_episode)
        assert len(later) == full - stop or later[-1] == task.close_answer
    assert batch.finished[own:].all() and batch.prompt_id.unique(return_counts=True)[1].tolist() == [GROUP] * PROBLEMS + [
        1] * len(forced.rows)


def test_what_is_forced_on_is_credited_with_its_progress_and_with_no_outcome(forced):
    """Its first J is that at the stop, and what changes nothing costs nothing: who is forced on did not choose to. Rollouts that
    nobody forced have the credit that they have without, to the last bit."""
    free, batch, E, own = forced.free, forced.both.batch, forced.both.episodes, PROBLEMS * GROUP
    credit = lambda gathered: mrt.progress_credit(gathered.batch, gathered.episodes, forced.config)
    plain, advantage = credit(free), credit(forced.both)
    assert torch.equal(advantage[: len(plain)], plain)
    assert torch.equal(advantage[len(plain) :], (mrt.spread(batch, E, E.progress(0.5)) * batch.is_action)[len(plain) :])
    follows = (E.row[1:] == E.row[:-1]) & (E.row[1:] >= own)
    assert torch.equal(E.J_before[1:][follows], 0.5 * E.J_after[:-1][follows]) and E.J_after[1:][follows].any()
    at_stop = {int(row): float(J) for row, J in zip(free.episodes.row, free.episodes.J_after)}  # the last one of each row
    first = {}
    for row, J in zip((E.row - own).tolist(), E.J_before.tolist()):
        first.setdefault(row, J)
    compared = [(first[i], 0.5 * at_stop[r]) for i, r in enumerate(forced.rows) if i in first and r in at_stop]
    assert len(compared) > 3 and all(a == b for a, b in compared)


def test_the_trainer_scores_what_was_forced_on_as_the_sampler_did(forced, model):
    batch = forced.both.batch
    rescored = train.rescore(model, batch, forced.config)
    torch.testing.assert_close(rescored[batch.is_action], batch.logprob[batch.is_action], atol=1e-4, rtol=0)


def test_the_log_is_of_rollouts_that_nobody_forced_and_the_ledger_of_all(forced, asked):
    free, both = forced.free, forced.both
    assert both.metrics() == free.metrics()
    assert both.trace_tokens - free.trace_tokens == int(both.batch.lengths[PROBLEMS * GROUP :].sum()) - sum(
        free.rollouts.prompt_length[r] + stop + 1 for r, stop in zip(forced.rows, forced.stops))
    assert both.fork_tokens > free.fork_tokens


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_forced_on_is_a_share_of_the_rollouts_that_stop(forced, model, task, share):
    draws = [len(traces_for_progress(model, task, task.problems("train", PROBLEMS, 0), replace(forced.config, forced_on=share),
                                     generator(seed)).batch.lengths) - PROBLEMS * GROUP for seed in range(8)]
    assert abs(sum(draws) / (8 * len(forced.rows)) - share) < 0.17


def test_every_algorithm_of_the_config_is_a_method():
    """The same names in the same order; and the loss of the supervised ones has no ratio to clip."""
    assert tuple(METHODS) == ALGORITHMS and set(SUPERVISED) < set(ALGORITHMS)
    assert set(READ_BY["clip_low"]) == set(READ_BY["clip_high"]) == set(ALGORITHMS) - set(SUPERVISED)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_is_a_function_of_its_generator(model, task, algorithm):
    """Same seed: the same rollouts and values, bit for bit; another seed: others. Neither reads nor moves a global generator,
    and the weights stay."""
    config = settings(algorithm, forks=2, fork_temperature=1.0)
    weights = [weight.clone() for weight in model.parameters()]
    before = random.getstate(), torch.get_rng_state()
    a, b, c = (gather(model, task, config, seed) for seed in (1, 1, 2))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert all(map(torch.equal, weights, model.parameters()))
    for part in ("batch", "episodes"):
        mine, again = getattr(a, part), getattr(b, part)
        assert (mine is None) == (again is None)
        assert mine is None or all(map(torch.equal, vars(mine).values(), vars(again).values()))
    assert (a.trace_tokens, a.fork_tokens) == (b.trace_tokens, b.fork_tokens)
    assert a.rollouts.tokens == b.rollouts.tokens != c.rollouts.tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_groups_verdicts_and_the_ledger(model, task, asked, algorithm):
    """GROUP rows per problem, each with the verdict on its own response; credit for actions only; every token that the sampler
    drew is counted once, and J or V of equal contexts is asked for once."""
    config = settings(algorithm, forks=2, fork_temperature=1.0)
    gathered, problems = gather(model, task, config), task.problems("train", PROBLEMS, 0)
    rollouts, batch = gathered.rollouts, gathered.batch
    assert rollouts.problems == [problem for problem in problems for _ in range(GROUP)]
    assert batch.prompt_id.tolist() == [i for i in range(PROBLEMS) for _ in range(GROUP)]
    assert batch.tokens.tolist() == sum(rollouts.tokens, []) and batch.lengths.tolist() == list(map(len, rollouts.tokens))
    for r, problem in enumerate(rollouts.problems):
        prompt = task.prompt(problem)
        assert rollouts.tokens[r][: len(prompt)] == prompt
        assert batch.reward[r] == task.grade(problem, task.tokenizer.decode(rollouts.tokens[r][len(prompt) :]))
    credit = METHODS[algorithm].credit(batch, gathered.episodes, config)
    assert credit.shape == batch.tokens.shape and credit.isfinite().all()
    assert credit.any() and not credit[~batch.is_action].any() and not batch.logprob[~batch.is_action].any()

    drawn = [call.samples.generated for call in asked]
    traces = 0 if algorithm == "sft" else 2 if algorithm in ("mrt", "mrt_b") else 1  # calls; then at most one for values
    assert (gathered.trace_tokens, gathered.fork_tokens) == (sum(drawn[:traces]), sum(drawn[traces:]))
    assert len(asked) == traces + (algorithm in READ_BY["forks"])
    assert all(set(Counter(map(tuple, call.contexts)).values()) == {2} for call in asked[traces:])  # `forks` times each


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_method_trains(model, task, tmp_path, algorithm):
    """Two steps: a gradient that is finite and not 0 moves all weights, and the second step samples from the new ones."""
    config = settings(algorithm, thinking_budget=20, warmup_steps=0, learning_rate=1e-2)
    optimizer, run = torch.optim.SGD(model.parameters(), lr=0.0), Run(config, tmp_path, "cpu")
    for step in range(2):
        before, gathered = [weight.clone() for weight in model.parameters()], gather(model, task, config, step)
        advantage = METHODS[algorithm].credit(gathered.batch, gathered.episodes, config)
        learned = train.update(model, optimizer, gathered.batch, advantage, None, run)
        assert 0 < learned["grad_norm"] < float("inf") and learned["max_logprob_diff"] < 1e-3
        assert run.skipped == 0 and not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("algorithm", ["star", "grpo", "length_penalty", "mrt_online", "vineppo", "anytime"])
def test_these_learn_from_the_policys_own_traces(model, task, algorithm):
    """The same traces, whatever is measured inside of them: all after the prompt is action, with the sampler's log-prob."""
    gathered, grpo = gather(model, task, settings(algorithm)), gather(model, task, settings("grpo"))
    assert all(map(torch.equal, vars(gathered.batch).values(), vars(grpo.batch).values()))
    for r, mine in enumerate(actions(gathered)):
        assert mine == [t >= gathered.rollouts.prompt_length[r] for t in range(len(mine))]
    assert gathered.trace_tokens == int(gathered.batch.is_action.sum()) == grpo.trace_tokens
    assert (gathered.batch.logprob[gathered.batch.is_action] < 0).all()


# --- What alpha = 0 saves ---


@pytest.mark.parametrize("algorithm", ["mrt_online", "mrt", "mrt_b"])
def test_alpha_zero_asks_for_nothing(model, task, asked, algorithm):
    """Without a bonus J has no reader: no fork, no episode, and the credit is the outcome's."""
    config = settings(algorithm, alpha=0.0)
    gathered = gather(model, task, config)
    assert gathered.episodes is None and gathered.fork_tokens == 0
    assert gathered.trace_tokens == sum(call.samples.generated for call in asked)
    credit = METHODS[algorithm].credit(gathered.batch, None, config)
    assert torch.equal(credit, METHODS["grpo"].credit(gathered.batch, None, config)) and credit.any()


def test_what_has_no_bonus_does_not_heed_alpha(model, task):
    """vineppo, anytime and mrt_star measure their values whatever alpha is."""
    for algorithm in ("vineppo", "anytime", "mrt_star"):
        zero, one = (gather(model, task, settings(algorithm, alpha=alpha)) for alpha in (0.0, 1.0))
        assert zero.fork_tokens == one.fork_tokens > 0
        before, after = (METHODS[algorithm].credit(x.batch, x.episodes, settings(algorithm, alpha=alpha))
                         for x, alpha in ((zero, 0.0), (one, 1.0)))
        assert torch.equal(before, after) and after.any()


# --- mrt_online, anytime ---


@pytest.mark.parametrize("algorithm", ["mrt_online", "anytime"])
def test_J_is_known_at_every_boundary(model, task, algorithm):
    """An episode for every one of the task's, from the end of the prompt to the end of the thinking, and J at its two ends."""
    gathered = gather(model, task, settings(algorithm))
    row, position = boundaries(task, gathered.rollouts)
    J = dict(zip(zip(row, position), greedy_J(model, task, gathered, row, position)))
    expected = []
    for r, start in enumerate(gathered.rollouts.prompt_length):
        ends = new_episodes(task, gathered, r, 0)
        expected += [(r, a, b, J[r, a], J[r, b]) for a, b in zip([start, *ends], ends)]
    assert episodes(gathered) == expected and len(expected) > 30 and 0 < sum(x[4] - x[3] != 0 for x in expected)


@pytest.mark.parametrize("m", [2, 8])
def test_fact_8_the_noise_of_progress_that_is_none(config, m):
    """A policy that says every word with the same probability, and p of all words are right, wherever it is stopped: over many
    places J is a mean of m verdicts, progress has std sqrt(2 p (1 - p) / m), and neighbours, which share an estimate,
    the covariance -p (1 - p) / m."""
    task = Countdown(RunConfig())
    right = set(task.tokenizer.decode([word]) for word in range(0, len(task.tokenizer), 3))
    task.grade = lambda problem, response: float(response.split()[-1] in right)
    inside = lambda response: response[: len(response) - (response[-1] == task.close_answer)]  # what ends a row is never fed
    task.episode_ends, task.answer_tokens = lambda response: list(range(1, len(inside(response)) + 1)), 1
    indifferent = Llama(replace(config, tie_word_embeddings=False)).initialise(generator())
    with torch.no_grad():
        indifferent.lm_head.weight.zero_()
    config = settings("mrt_online", prompts_per_step=4, thinking_budget=50, forks=m, fork_temperature=1.0)
    E = gather(indifferent, task, config).episodes
    p, x, within = len(right) / len(task.tokenizer), E.progress(), E.row[1:] == E.row[:-1]
    assert len(x) > 500 and E.J_after.mean().item() == pytest.approx(p, abs=0.05)
    assert x.std().item() == pytest.approx((2 * p * (1 - p) / m) ** 0.5, rel=0.1)
    assert (x[1:] * x[:-1])[within].mean().item() == pytest.approx(-p * (1 - p) / m, rel=0.25)


# --- vineppo ---


def test_V_is_the_mean_verdict_of_going_on_within_what_training_allows(model, task, asked):
    """V asks each different context at a boundary once, `forks` times, and a branch has as many tokens left as training would
    have left its trace."""
    config = settings("vineppo", forks=3, fork_temperature=1.0)
    gathered, (whole, call) = gather(model, task, config), asked
    assert not any(call.forced) and call.sampling.temperature == config.temperature
    problem, V, cut_off = {}, {}, 0
    for r, row in enumerate(gathered.rollouts.tokens):
        for end in range(len(row)):
            problem[tuple(row[:end])] = r
    for i, (context, drawn) in enumerate(zip(call.contexts, call.drawn, strict=True)):
        assert context == call.contexts[i - i % 3]
        r = problem[tuple(context)]
        response = (context + drawn)[gathered.rollouts.prompt_length[r] :]
        assert len(response) <= whole.sampling.max_new_tokens + 1  # at the very end one token is drawn, which answers nothing
        cut_off += len(response) == whole.sampling.max_new_tokens
        right = task.grade(gathered.rollouts.problems[r], task.tokenizer.decode(response))
        V[tuple(context)] = V.get(tuple(context), 0) + right / 3
    assert cut_off > 3 and len(call.contexts) == 3 * len(V)
    for r, start, end, before, after in episodes(gathered):
        row = gathered.rollouts.tokens[r]
        assert before == pytest.approx(V[tuple(row[:start])])
        assert after == pytest.approx(V[tuple(row[:end])] if end < len(row) else gathered.rollouts.reward[r])


def test_the_answer_is_vineppos_last_episode_and_progress_sums_to_the_outcome(model, task):
    """Boundaries: the end of the prompt, of every episode, and of the response, where V is the reward. So a rollout's progress
    sums to reward - V_0, also of one without an episode and of one that was cut off inside of one."""
    gathered = gather(model, task, settings("vineppo", forks=3, fork_temperature=1.0))
    rollouts, mine = gathered.rollouts, episodes(gathered)
    for r, start in enumerate(rollouts.prompt_length):
        own, end = [x for x in mine if x[0] == r], len(rollouts.tokens[r])
        inner = [place for place in new_episodes(task, gathered, r, 0) if place < end]
        assert [x[1:3] for x in own] == list(zip([start, *inner], [*inner, end]))
        assert all(a[4] == b[3] for a, b in zip(own, own[1:])) and own[-1][4] == rollouts.reward[r]
        assert sum(x[4] - x[3] for x in own) == pytest.approx(rollouts.reward[r] - own[0][3])
    first = {r: before for r, start, _, before, _ in mine if start == rollouts.prompt_length[r]}
    assert all(first[r] == first[r - r % GROUP] for r in first)  # V of a prompt is one estimate
    answered, thinking = (any(task.episode_ends(rollouts.response(r)) and stopped == bool(finished) for r, finished in
                              enumerate(gathered.batch.finished)) for stopped in (True, False))
    assert answered and thinking and any(not task.episode_ends(rollouts.response(r)) for r in first)


# --- mrt: the prefix form ---


def test_prefixes_are_cut_row_by_row_and_half_of_a_group_stops(model, task, asked):
    """One trace per problem; each row keeps 0 … T-1 of its T episodes. The first half of a group is forced to answer there, the
    other half goes on. Prompt, prefix and forced tokens are context; what was drawn after them is action."""
    gathered, (base, call, _) = gather(model, task, settings("mrt", group_size=8)), asked
    assert len(base.contexts) == PROBLEMS and call.sampling == base.sampling
    kept = {i: Counter() for i in range(PROBLEMS)}
    for r, (row, action) in enumerate(zip(gathered.rollouts.tokens, actions(gathered), strict=True)):
        i, prompt = r // 8, gathered.rollouts.prompt_length[r]
        trace, cut = base.contexts[i] + base.drawn[i], len(call.contexts[r])
        places = [0, *task.episode_ends(base.drawn[i])[:-1]]
        assert cut - prompt in places and call.contexts[r] == trace[:cut]
        kept[i][places.index(cut - prompt)] += 1
        stop = task.forced_stop if r % 8 < 4 else []
        assert row == trace[:cut] + stop + call.drawn[r]
        assert action == [t >= cut + len(stop) for t in range(len(row))]
    assert any(len(cuts) > 1 for cuts in kept.values()) and sum(cuts[0] for cuts in kept.values()) < 8 * PROBLEMS


def test_the_decision_to_stop_can_be_learned(model, task):
    """decision_in_loss: `</think>` of a stopped row is an action with the policy's log-prob; `<answer>` stays context, the ledger
    as it was."""
    without, learned = (gather(model, task, settings("mrt", group_size=8, decision_in_loss=x)) for x in (False, True))
    more = learned.batch.is_action & ~without.batch.is_action
    assert torch.equal(learned.batch.tokens, without.batch.tokens) and learned.trace_tokens == without.trace_tokens
    assert (learned.batch.tokens[more] == task.close_thinking).all() and int(more.sum()) == 4 * PROBLEMS
    assert (learned.batch.row[more] % 8 < 4).all() and not (without.batch.is_action & ~learned.batch.is_action).any()
    packed = Packed.of(learned.batch.lengths)
    logp = (model(learned.batch.tokens, packed.position_ids, packed) @ model.head.T).log_softmax(1)
    torch.testing.assert_close(learned.batch.logprob[more], logp[more.nonzero().squeeze(1) - 1, task.close_thinking])


def test_every_number_of_kept_episodes_is_as_likely_as_the_others(model, task, asked):
    """Of T = 0 or 1 none is kept, and of T > 1 the shares of 0 … T-1 are 1/T within four standard deviations."""
    asked_for, count = settings("mrt", group_size=160, prompts_per_step=3, thinking_budget=20, alpha=0.0), Counter()
    for seed in range(2):
        gathered = gather(model, task, asked_for, seed)
        base, call = asked[-2:]
        for r, context in enumerate(call.contexts):
            ends = task.episode_ends(base.drawn[r // 160])
            count[max(len(ends), 1), [0, *ends].index(len(context) - gathered.rollouts.prompt_length[r])] += 1
    for T in {T for T, _ in count}:
        n = sum(count[T, k] for k in range(T))
        assert sum(count[key] for key in count if key[0] == T) == n  # never all T
        for k in range(T):
            assert abs(count[T, k] / n - 1 / T) <= 4 * ((1 - 1 / T) / T / n) ** 0.5
    assert max(T for T, _ in count) > 1


def test_the_prefix_form_measures_the_first_new_episode_of_those_that_go_on(model, task, asked):
    """From J at the cut to J where the first new episode ends; none for the stopped half, nor where none is begun."""
    gathered = gather(model, task, settings("mrt", group_size=8))
    expected = []
    for r, context in enumerate(asked[1].contexts):
        new = new_episodes(task, gathered, r, len(context))
        if r % 8 >= 4 and new:
            expected.append((r, len(context), new[0], *greedy_J(model, task, gathered, [r, r], [len(context), new[0]])))
    assert episodes(gathered) == expected and len(expected) > 3
    assert any(start > gathered.rollouts.prompt_length[r] for r, start, *_ in expected)


# --- mrt_b: the backtracking form ---


def test_what_follows_an_attempt_of_ones_own(model, task, asked):
    """Each row draws at most one attempt's tokens, keeps its first episode z_1 (nothing if it opened none) as context, and goes
    on from there: one episode up to its end, from J(z_1) to the verdict on the whole."""
    gathered, (base, call, _) = gather(model, task, settings("mrt_b")), asked
    assert base.sampling == replace(call.sampling, max_new_tokens=task.attempt_tokens)
    ends = [(task.episode_ends(drawn) or [0])[0] for drawn in base.drawn]
    cut = [start + end for start, end in zip(gathered.rollouts.prompt_length, ends, strict=True)]
    for r, (row, action) in enumerate(zip(gathered.rollouts.tokens, actions(gathered), strict=True)):
        z_1 = (base.contexts[r] + base.drawn[r])[: cut[r]]
        assert call.contexts[r] == z_1 and row == z_1 + call.drawn[r] and action == [t >= cut[r] for t in range(len(row))]
    J = greedy_J(model, task, gathered, list(range(len(cut))), cut)
    assert episodes(gathered) == [(r, cut[r], len(row), J[r], gathered.rollouts.reward[r])
                                  for r, row in enumerate(gathered.rollouts.tokens)]
    assert {0, task.attempt_tokens} < set(ends) and len(set(ends)) > 2
    assert any(len({tuple(call.contexts[r]) for r in range(i, i + GROUP)}) > 1 for i in range(0, len(cut), GROUP))


# --- sft and mrt_star ---


def test_what_nobody_sampled_lies_where_the_model_is(task):
    """The batch of written traces, and J of no place at all; "meta" stands for any device but the default."""
    elsewhere = SimpleNamespace(device="meta")
    batch = gather(elsewhere, task, settings("sft")).batch
    assert {x.device.type for x in vars(batch).values()} == {"meta"}
    assert force_answers(elsewhere, task, None, [], [], 1, 0.0, None).J.device.type == "meta"


@pytest.mark.parametrize("keys", [{}, {"forks": 3, "fork_temperature": 1.0}], ids=["one greedy answer", "three sampled"])
def test_traces_are_cut_at_the_earliest_largest_J_and_end_right(model, task, asked, keys):
    """By brute force over what the forks said: the first boundary whose share of right answers no other exceeds, then the first
    right answer given there. Where all were wrong, or there is no boundary, the trace stays, and its verdict is its own."""
    gathered, forks = gather(model, task, settings("mrt_star", **keys)), keys.get("forks", 1)
    traces = gather(model, task, settings("grpo")).rollouts
    call, changed, said = asked[1], 0, {}
    for context, drawn in zip(call.contexts, call.drawn, strict=True):
        said.setdefault(tuple(context), []).append(task.forced_stop + drawn)
    row, position = boundaries(task, traces)
    for r, trace in enumerate(traces.tokens):
        right = lambda answer, r=r: task.grade(traces.problems[r], task.tokenizer.decode(answer)) == 1
        places = [p for owner, p in zip(row, position) if owner == r]
        J = [sum(map(right, said[tuple(trace[:p])])) / forks for p in places]
        if any(J):
            place = places[J.index(max(J))]
            trace = trace[:place] + next(filter(right, said[tuple(trace[:place])]))
            assert gathered.rollouts.reward[r] == 1
            changed += 1
        assert gathered.rollouts.tokens[r] == trace
    others = set(range(len(traces.tokens))) - set(row)
    assert 5 < changed < len(traces.tokens) and any(gathered.rollouts.reward[r] for r in others)
    assert gathered.episodes is None and not gathered.batch.logprob.any() and gathered.batch.finished.all()


def test_written_traces_are_learned_as_a_whole(model, task):
    """Also the forced stop: it is what the policy shall say there of its own accord. Only the prompt is context."""
    for algorithm in ("sft", "mrt_star"):
        gathered = gather(model, task, settings(algorithm))
        for r, mine in enumerate(actions(gathered)):
            assert mine == [t >= gathered.rollouts.prompt_length[r] for t in range(len(mine))]


def test_search_traces_are_the_warm_starts(task, asked):
    """`group_size` different traces of each problem, flaws included, that nobody sampled: no token, no log-prob, no model."""
    task, nobody = Countdown(RunConfig(trace_backtrack=0.5)), SimpleNamespace(device="cpu")
    gathered = gather(nobody, task, settings("sft"))
    assert not asked and gathered.trace_tokens == gathered.fork_tokens == 0 and gathered.episodes is None
    assert not gathered.batch.logprob.any() and gathered.batch.finished.all() and 0 < gathered.batch.reward.mean() < 1
    responses = [gathered.rollouts.response(r) for r in range(PROBLEMS * GROUP)]
    assert len(set(map(tuple, responses))) == len(responses) and any(task.go_back in response for response in responses)
    assert all(response[-1] == task.close_answer and response.count(task.close_thinking) == 1 for response in responses)
    rewards = task.audit(gathered.rollouts.problems, responses, gathered.rollouts.reward)
    assert set(rewards.values()) == {1.0}  # no flaw in the arithmetic: the flaws are in the search


# --- What is shown ---


@pytest.mark.parametrize("algorithm", ["grpo", "mrt_online", "mrt", "mrt_b"])
def test_an_example_shows_J_only_where_it_was_measured_at_every_boundary(model, task, algorithm):
    """Forms that begin in the middle of a trace know J at other places; whole traces know it at all of theirs."""
    shown = []
    for seed in range(6):
        gathered = gather(model, task, settings(algorithm), seed)
        example, measured = gathered.example(task), []
        for r, start, end, before, after in episodes(gathered) if gathered.episodes else ():
            if r == int(gathered.episodes.row[0]):
                measured += [(end, after)] if measured else [(start, before), (end, after)]
        r = int(gathered.episodes.row[0]) if measured else 0
        start = gathered.rollouts.prompt_length[r]
        places = [start, *(start + end for end in task.episode_ends(gathered.rollouts.response(r)))]
        expected = [J for _, J in measured] if [place for place, _ in measured] == places else []
        assert example["J"] == pytest.approx(expected)
        shown.append(bool(expected))
    assert all(shown) if algorithm == "mrt_online" else not all(shown)


def test_what_a_step_line_says_by_hand():
    """Three rollouts, of which two have episodes, three in all: means over those, over all, or over episodes."""
    batch = make_batch([8, 5, 4], [1, 0, 0], [0, 0, 1], finished=[True, True, False])
    said = Gathered(None, batch, make_episodes(batch, [[3, 6], [4], []], [[0.25, 0.0, 1.0], [0.75, 0.5], []]), 0).metrics()
    assert said == pytest.approx({"reward": 1 / 3, "finished": 2 / 3, "J_first": 0.5, "J_last": 0.75, "progress": 0.5 / 3,
                                  "episodes": 1.0, "response_tokens": 14 / 3})
    alone = make_batch([8], [1], [0])
    said = Gathered(None, alone, make_episodes(alone, [[3, 6]], [[0.25, 0.0, 1.0]]), 0).metrics()
    assert (said["J_first"], said["J_last"], said["progress"], said["episodes"]) == (0.25, 1.0, 0.375, 2.0)
    said = Gathered(None, alone, make_episodes(alone, [[]], [[]]), 0).metrics()  # it answered at once
    assert [said[name] for name in ("J_first", "J_last", "progress", "episodes")] == [None, None, None, 0]
    said = Gathered(None, alone, None, 0).metrics()
    assert {said[name] for name in ("J_first", "J_last", "progress", "episodes")} == {None}


def test_examples_are_whole_rollouts_with_the_values_of_their_own_boundaries(model, task):
    config, problems, g = settings("mrt_online", forks=2, fork_temperature=1.0), task.problems("test", 12, 0), generator(1)
    shown = examples(model, task, problems, config, generator(1))
    rollouts = roll_out(model, task, problems, 1, training_sampling(task, config), g)
    row, position = boundaries(task, rollouts)
    J = force_answers(model, task, rollouts, row, position, 2, 1.0, g).J.tolist()
    for r, one in enumerate(shown):
        assert " ".join([*one["episodes"], one["answer"]]).split() == task.show(rollouts.response(r)).split()
        assert one["episodes"] == [] or not one["answer"].startswith("<try>")
        assert one["J"] == [x for owner, x in zip(row, J) if owner == r] and one["reward"] == rollouts.reward[r]
        assert len(one["J"]) == (len(one["episodes"]) + 1 if one["episodes"] else 0)
    assert 0.5 in J and any(not one["J"] for one in shown)
