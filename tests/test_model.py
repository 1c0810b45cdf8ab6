"""The network: equal to Llama, Qwen2 and Qwen3 written out with loops, causal, blind to other sequences of a pack."""

import math

import pytest
import torch

from kernels.reference import rotate
from nanomrt.model import Llama, ModelConfig, Packed, packs, rotary

SHAPE = dict(vocab_size=11, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=6, max_position_embeddings=64)
FAMILY = {
    "llama": {},
    "llama, own head": {"tie_word_embeddings": False},
    "one key/value head": {"num_key_value_heads": 1},
    "no shared heads": {"num_key_value_heads": 4, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
    "qwen2": {"attention_bias": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": False},
}
LENGTHS = (5, 1, 9, 2)
CPU = torch.device("cpu")


def random_model(**changes) -> Llama:
    """Every parameter random, norms and biases too, so that none can be forgotten unnoticed."""
    model, generator = Llama(ModelConfig(**{**SHAPE, **changes})), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
    return model


def tokens_of(lengths=LENGTHS, seed=1) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def run(model: Llama, tokens: torch.Tensor, lengths=LENGTHS, shift=0) -> torch.Tensor:
    packed = Packed.of(torch.tensor(lengths))
    with torch.no_grad():
        return model(tokens, packed.position_ids + shift, packed)


# --- Llama again, slowly ---


def slow_llama(model: Llama, tokens: list[int]) -> list[torch.Tensor]:
    """Last hidden states of one sequence in fp64: one token, one head, one pair of numbers at a time."""
    c, w = model.config, {name: weight.detach().double() for name, weight in model.state_dict().items()}
    group = c.num_attention_heads // c.num_key_value_heads

    def norm(x, weight):
        return x / math.sqrt(sum(float(a) ** 2 for a in x) / len(x) + c.rms_norm_eps) * weight

    def turn(x, position):
        out, half = x.clone(), c.head_dim // 2
        for i in range(half):
            angle = position / c.rope_theta ** (2 * i / c.head_dim)
            z = complex(float(x[i]), float(x[i + half])) * complex(math.cos(angle), math.sin(angle))
            out[i], out[i + half] = z.real, z.imag
        return out

    def heads(name, layer, x, count):
        y = w[f"model.layers.{layer}.self_attn.{name}_proj.weight"] @ x
        if c.attention_bias:
            y = y + w[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
        rows = [y[h * c.head_dim : (h + 1) * c.head_dim] for h in range(count)]
        if c.qk_norm and name != "v":
            rows = [norm(row, w[f"model.layers.{layer}.self_attn.{name}_norm.weight"]) for row in rows]
        return rows

    xs = [w["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        inputs = [norm(x, w[at + "input_layernorm.weight"]) for x in xs]
        q = [[turn(h, t) for h in heads("q", layer, x, c.num_attention_heads)] for t, x in enumerate(inputs)]
        k = [[turn(h, t) for h in heads("k", layer, x, c.num_key_value_heads)] for t, x in enumerate(inputs)]
        v = [heads("v", layer, x, c.num_key_value_heads) for x in inputs]
        for t in range(len(xs)):
            seen = []
            for h in range(c.num_attention_heads):
                scores = [float(q[t][h] @ k[s][h // group]) / math.sqrt(c.head_dim) for s in range(t + 1)]
                weights = [math.exp(score - max(scores)) for score in scores]
                seen.append(sum(a * v[s][h // group] for s, a in enumerate(weights)) / sum(weights))
            x = xs[t] + w[at + "self_attn.o_proj.weight"] @ torch.cat(seen)
            y = norm(x, w[at + "post_attention_layernorm.weight"])
            gate, up = w[at + "mlp.gate_proj.weight"] @ y, w[at + "mlp.up_proj.weight"] @ y
            xs[t] = x + w[at + "mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
    return [norm(x, w["model.norm.weight"]) for x in xs]


@pytest.mark.parametrize("name", FAMILY)
def test_the_model_is_llama(name):
    """A packed forward pass equals the explicit formulas in fp64, for each member of the family."""
    model, tokens = random_model(**FAMILY[name]), tokens_of()
    expected = torch.stack([x for part in tokens.split(LENGTHS) for x in slow_llama(model, part.tolist())])
    torch.testing.assert_close(run(model, tokens).double(), expected, atol=1e-4, rtol=1e-4)


# --- Hugging Face's names ---

LLAMA = """model.embed_tokens.weight
model.layers.0.self_attn.q_proj.weight
model.layers.0.self_attn.k_proj.weight
model.layers.0.self_attn.v_proj.weight
model.layers.0.self_attn.o_proj.weight
model.layers.0.mlp.gate_proj.weight
model.layers.0.mlp.up_proj.weight
model.layers.0.mlp.down_proj.weight
model.layers.0.input_layernorm.weight
model.layers.0.post_attention_layernorm.weight
model.norm.weight
lm_head.weight""".split()
QWEN2 = """model.layers.0.self_attn.q_proj.bias
model.layers.0.self_attn.k_proj.bias
model.layers.0.self_attn.v_proj.bias""".split()
QWEN3 = """model.layers.0.self_attn.q_norm.weight
model.layers.0.self_attn.k_norm.weight""".split()


@pytest.mark.parametrize("changes, names", [({}, LLAMA), ({"attention_bias": True}, LLAMA + QWEN2),
                                            ({"qk_norm": True}, LLAMA + QWEN3)], ids=["llama", "qwen2", "qwen3"])
def test_parameter_names_and_shapes_are_hugging_faces(changes, names):
    """A checkpoint of the same shape loads with strict=True: same names, same orientation of the matrices."""
    weights = Llama(ModelConfig(**{**SHAPE, "num_hidden_layers": 1, **changes})).state_dict()
    assert sorted(weights) == sorted(names)
    shapes = {name.removeprefix("model.layers.0."): tuple(weight.shape) for name, weight in weights.items()}
    C, F, V, H, K, D = 12, 10, 11, 4, 2, 6
    expected = {"model.embed_tokens.weight": (V, C), "lm_head.weight": (V, C), "self_attn.q_proj.weight": (H * D, C),
                "self_attn.k_proj.weight": (K * D, C), "self_attn.v_proj.weight": (K * D, C),
                "self_attn.o_proj.weight": (C, H * D), "mlp.gate_proj.weight": (F, C), "mlp.up_proj.weight": (F, C),
                "mlp.down_proj.weight": (C, F), "self_attn.q_proj.bias": (H * D,), "self_attn.k_proj.bias": (K * D,),
                "self_attn.v_proj.bias": (K * D,), "self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
    assert shapes == {name: expected.get(name, (C,)) for name in shapes}


def test_tied_embeddings_are_one_tensor():
    """Tied: the head is the embedding, one parameter with one gradient. Untied: two."""
    tied, untied = (Llama(ModelConfig(**SHAPE, tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.head is tied.model.embed_tokens.weight and tied.lm_head.weight is tied.head
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert untied.head is not untied.model.embed_tokens.weight and untied.head is untied.lm_head.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    tied.initialise(torch.Generator().manual_seed(0))
    assert tied.head is tied.model.embed_tokens.weight  # initialising does not tear them apart


# --- Who sees whom ---


def test_packs_hold_every_sequence_once_and_no_more_tokens_than_they_may():
    assert [list(pack) for pack in packs([5, 2, 4, 9, 1], 7)] == [[0, 1], [2], [3], [4]] and list(packs([], 7)) == []


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_packed_sequences_do_not_see_each_other(changed):
    """Other tokens in one sequence leave the hidden states of all others as they were, bit for bit."""
    model, tokens = random_model(), tokens_of()
    before = run(model, tokens).split(LENGTHS)
    parts = list(tokens.split(LENGTHS))
    parts[changed] = (parts[changed] + 1) % SHAPE["vocab_size"]
    after = run(model, torch.cat(parts)).split(LENGTHS)
    for b, (x, y) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(x, y) == (b != changed)


def test_a_sequence_in_a_pack_equals_the_sequence_alone():
    """Packing is only bookkeeping, in any order."""
    model, tokens = random_model(), tokens_of()
    parts, packed = tokens.split(LENGTHS), run(model, tokens).split(LENGTHS)
    for part, hidden in zip(parts, packed, strict=True):
        torch.testing.assert_close(hidden, run(model, part, (len(part),)), atol=1e-6, rtol=1e-5)
    turned = run(model, torch.cat(parts[::-1]), LENGTHS[::-1]).split(LENGTHS[::-1])
    for hidden, other in zip(packed, turned[::-1], strict=True):
        torch.testing.assert_close(hidden, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("t", [0, 3, 8])
def test_the_model_is_causal(t):
    """Another token at t changes what comes from t on and nothing before."""
    model, tokens = random_model(), tokens_of((9,))
    other = tokens.clone()
    other[t] = (tokens[t] + 1) % SHAPE["vocab_size"]
    a, b = run(model, tokens, (9,)), run(model, other, (9,))
    assert torch.equal(a[:t], b[:t])
    assert ((a[t:] - b[t:]).abs().amax(1) > 1e-4).all()


def test_packed_layout():
    """Lengths become starts and positions that begin at 0 in each sequence; a length of 0 takes no place."""
    packed = Packed.of(torch.tensor([3, 0, 1, 2]))
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4, 6] and packed.max_seqlen == 3
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 0, 1]


# --- Positions ---


def test_only_relative_positions_matter():
    """Starting to count at 17 instead of 0 changes nothing; counting differently does."""
    model, tokens = random_model(), tokens_of()
    hidden = run(model, tokens)
    torch.testing.assert_close(run(model, tokens, shift=17), hidden, atol=2e-5, rtol=1e-4)
    packed = Packed.of(torch.tensor(LENGTHS))
    with torch.no_grad():
        stretched = model(tokens, 2 * packed.position_ids, packed)
    assert (stretched - hidden).abs().max() > 1e-2


def test_rotation_depends_on_the_distance_alone():
    """<R_m q, R_n k> is a function of m - n, lengths stay, and position 0 is the identity."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 8, generator=generator)
    at = lambda x, position: rotate(x, *rotary(128, 8, 10_000.0, CPU)[[position]].unbind(1))  # noqa: E731
    dot = lambda m, n: (at(q, m) * at(k, n)).sum(-1)  # noqa: E731
    torch.testing.assert_close(dot(9, 4), dot(105, 100), atol=1e-5, rtol=1e-5)
    assert (dot(9, 4) - dot(4, 9)).abs().max() > 1e-3
    torch.testing.assert_close(at(q, 50).norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(at(q, 0), q)


def test_rotation_by_hand():
    """D = 4, theta = 100: pair (0, 2) turns by the position, pair (1, 3) by a tenth of it."""
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    turned = rotate(x, *rotary(4, 4, 100.0, CPU)[[3]].unbind(1))[0, 0]
    expected = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_angles_are_exact_far_out():
    """Cosine and sine at position 30,000 are rounded once: an fp32 angle would be off by a thousandth."""
    cos, sin = rotary(30_001, 4, 10_000.0, CPU)[[30_000]].unbind(1)
    expected = [[f(30_000 / 10_000 ** (2 * (i % 2) / 4)) for i in range(4)] for f in (math.cos, math.sin)]
    torch.testing.assert_close(cos[0, 0].double(), torch.tensor(expected[0], dtype=torch.float64), atol=6e-8, rtol=0)
    signs = torch.tensor([-1, -1, 1, 1])
    torch.testing.assert_close((sin[0, 0] * signs).double(), torch.tensor(expected[1], dtype=torch.float64), atol=6e-8, rtol=0)


# --- Initialisation, errors ---


def test_initialise_is_a_function_of_its_generator():
    """Same seed: bit-equal weights, whatever was drawn before; another seed: others; the global generator is not touched."""
    torch.manual_seed(5)
    models = [Llama(ModelConfig(**SHAPE, attention_bias=True)) for _ in range(3)]
    state = torch.get_rng_state()
    a, b, c = (model.initialise(torch.Generator().manual_seed(seed)).state_dict() for model, seed in zip(models, (1, 1, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    for name in a:
        assert torch.equal(a[name], b[name])
        assert torch.equal(a[name], c[name]) == (a[name].ndim < 2), name


def test_initial_scale():
    """Embeddings 0.02, matrices 1/sqrt(inputs), those that write to the residual stream smaller by sqrt(2 layers)."""
    wide = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "attention_bias": True}
    model = Llama(ModelConfig(**{**SHAPE, **wide}))
    weights = model.initialise(torch.Generator().manual_seed(0)).state_dict()
    layer = "model.layers.1."
    for name, std in {"model.embed_tokens.weight": 0.02, layer + "self_attn.q_proj.weight": 64**-0.5,
                      layer + "self_attn.o_proj.weight": 24**-0.5 / 2, layer + "mlp.up_proj.weight": 64**-0.5,
                      layer + "mlp.down_proj.weight": 96**-0.5 / 2}.items():
        assert abs(weights[name].std() / std - 1) < 0.1, name
    assert (weights[layer + "input_layernorm.weight"] == 1).all() and (weights[layer + "self_attn.q_proj.bias"] == 0).all()


@pytest.mark.parametrize("changes, message", [({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
                                              ({"head_dim": 5}, "head_dim=5 must be even")])
def test_impossible_shapes_are_refused(changes, message):
    """The message names the key."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SHAPE, **changes})


def test_forward_writes_to_no_argument():
    """Tokens and positions are only read."""
    tokens, packed = tokens_of(), Packed.of(torch.tensor(LENGTHS))
    positions, copies = packed.position_ids, (tokens.clone(), packed.position_ids)
    random_model()(tokens, positions, packed)
    assert torch.equal(tokens, copies[0]) and torch.equal(positions, copies[1])


def test_under_autocast_a_norm_casts_once_and_the_residual_stream_stays_fp32(monkeypatch):
    """What several products read is in their type when they get it; sums of blocks are not rounded."""
    model, seen = random_model(qk_norm=True), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: (inputs[0].dtype, out.dtype)}))
    monkeypatch.setattr("nanomrt.model.mixed_precision", lambda device: torch.autocast("cpu", torch.bfloat16))
    run(model, tokens_of())
    for layer in ("model.layers.0", "model.layers.1"):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            assert seen[f"{layer}.{name}"] == (torch.bfloat16, torch.bfloat16)
        assert seen[layer] == (torch.float32, torch.float32)
