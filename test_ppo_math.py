"""The maths of RLHF, checked against slow and obvious versions of itself:

    pytest test_ppo_math.py

The functions under test work in float32 on padded (B, T) tensors with a mask. The references below
work in float64 on plain Python lists, one a response, each of its own length: they have no mask and
no padding to get wrong. Checked are

    values      against those loops: ragged batches, one-token responses, float32 and bf16
    gradients   autograd against central differences of the loops, or a closed form; and none where
                none belongs
    garbage     nan, inf and 1e30 outside the mask change no value and no gradient
    theory      GAE at lambda 0 and 1; the first PPO pass is REINFORCE; E[k1] = E[k3] = KL;
                ChatLLaMA's advantage and ColossalChat's PTX mix are special cases of ours
    mistakes    what ChatLLaMA and ColossalChat got wrong, beside what is right, in numbers
"""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import model as llama
from model import LlamaBackbone, ScalarHead, sample
from lib.data import collate
from ppo import (
    AdaptiveKL,
    entropy_from_logits,
    gae,
    kl_estimate,
    logprobs_from_logits,
    masked_mean,
    masked_whiten,
    policy_loss,
    ptx_loss,
    to_rows,
    token_rewards,
    value_loss,
)
from lib.training import set_lr
from train_rm import normalize_, pair_statistics, ranking_loss, regression_loss

GARBAGE = [1e30, math.inf, -math.inf, math.nan]
# a ragged batch: a response of one token, one that fills its row, two in between
LENGTHS = [
    1,
    6,
    3,
    4,
]
MASK = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).float()
SCORES = torch.tensor([1.5, -0.7, 0.0, 2.2])  # of these four responses
# for PTX: prompt and completion; a wilder mix
LABELS = torch.tensor(
    [[-100, -100, 3, 1, 4], [2, 0, -100, 1, -100]]
)


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_lists(x, mask):
    """A padded (B, T) tensor as one list of floats a response, without the padding."""
    return [row[: int(n)] for row, n in zip(x.double().tolist(), mask.sum(1))]


def to_padded(result, T):
    """What a slow reference returns as a float64 tensor: lists become (B, T), with zeros after each
    response."""
    if isinstance(result, list):
        result = [row + [0.0] * (T - len(row)) for row in result]
    return torch.tensor(result, dtype=torch.float64)


def assert_near(actual, expected, tolerance=1e-5):
    """float32 code against a float64 reference."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance)


def numerical_gradient(f, x, h=1e-5):
    """Central differences (f(x + h) - f(x - h)) / 2h, an element at a time, in float64. `f` returns
    a float."""
    x = x.detach().double()
    gradient = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        step = torch.zeros_like(x)
        step[index] = h
        gradient[index] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient


# ------------------------------------------------------------------------------------------------
# The slow references. A batch is a list of responses, a response a list of floats.


def slow_mean(x):
    values = [v for row in x for v in row]
    return math.fsum(values) / len(values)


def slow_whiten(x, shift_mean=True):
    """(x - mean) / sqrt(variance), the variance being the mean squared distance from the mean."""
    mean = slow_mean(x)
    deviation = math.sqrt(slow_mean([[(v - mean) ** 2 for v in row] for row in x]) + 1e-8)
    return [[(v - mean) / deviation + (0 if shift_mean else mean) for v in row] for row in x]


def slow_token_rewards(scores, kl, kl_coef):
    """-kl_coef KL_t everywhere, and the score on the last token."""
    return [
        [-kl_coef * k for k in row[:-1]] + [score - kl_coef * row[-1]]
        for score, row in zip(scores, kl)
    ]


def slow_td_errors(rewards, values, gamma):
    """delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the end."""
    return [
        [r + gamma * v_next - v for r, v, v_next in zip(rs, vs, vs[1:] + [0.0])]
        for rs, vs in zip(rewards, values)
    ]


def slow_gae(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}: the sum of Schulman et al. 2016, eq. 16, not the
    recursion; and A + V."""
    advantages = [
        [
            math.fsum((gamma * lam) ** l * d for l, d in enumerate(deltas[t:]))
            for t in range(len(deltas))
        ]
        for deltas in slow_td_errors(rewards, values, gamma)
    ]
    return advantages, [[a + v for a, v in zip(*rows)] for rows in zip(advantages, values)]


def chatllama_returns(rewards, gamma):
    """ChatLLaMA's quadratic loop: for each t the sum over k >= t of gamma^(k - t) r_k."""
    returns = [[0.0] * len(row) for row in rewards]
    for row, result in zip(rewards, returns):
        for t in range(len(row)):
            for k in range(t, len(row)):
                result[t] += gamma ** (k - t) * row[k]
    return returns


def tokens_of(*batches):
    """The tokens of all responses in one list, each as a tuple: its number in the first batch, in
    the second, ..."""
    return [token for rows in zip(*batches) for token in zip(*rows)]


def slow_policy_loss(logprobs, old_logprobs, advantages, clip):
    """Schulman et al. 2017, figure 1, by cases: rho A, but a rho that went too far where A wants it
    is cut."""
    terms, is_clipped = [], []
    for new, old, a in tokens_of(logprobs, old_logprobs, advantages):
        rho = math.exp(new - old)
        is_clipped.append((a > 0 and rho > 1 + clip) or (a < 0 and rho < 1 - clip))
        terms.append((1 + clip if a > 0 else 1 - clip) * a if is_clipped[-1] else rho * a)
    return -math.fsum(terms) / len(terms), sum(is_clipped) / len(terms)


def slow_value_loss(values, old_values, returns, clip):
    """Half the larger squared error of V, and of V kept within `clip` of V_old
    (lm-human-preferences)."""
    terms, is_clipped = [], []
    for v, old, r in tokens_of(values, old_values, returns):
        near = v if abs(v - old) <= clip else old + math.copysign(clip, v - old)
        is_clipped.append((near - r) ** 2 > (v - r) ** 2)
        terms.append(max((v - r) ** 2, (near - r) ** 2) / 2)
    return math.fsum(terms) / len(terms), sum(is_clipped) / len(terms)


def slow_softmax(logits, temperature=1.0):
    """p_v = e^(z_v / temperature) / sum_w e^(z_w / temperature) of a list of logits."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def slow_entropy(logits, temperature=1.0):
    return -math.fsum(p * math.log(p) for p in slow_softmax(logits, temperature))


def slow_ptx_loss(logits, labels):
    """-log p(label at t + 1 | logits at t), averaged over the labels that are not -100."""
    losses = [
        -math.log(slow_softmax(row[t])[tokens[t + 1]])
        for row, tokens in zip(logits, labels)
        for t in range(len(tokens) - 1)
        if tokens[t + 1] != -100
    ]
    return math.fsum(losses) / len(losses)


def slow_ranking_loss(scores, labels):
    """Every pair once, -log sigmoid(s_better - s_worse) = log(1 + e^(s_worse - s_better)), ties
    left out."""
    losses = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        if labels[i] != labels[j]:
            better, worse = (i, j) if labels[i] > labels[j] else (j, i)
            losses.append(math.log(1 + math.exp(scores[worse] - scores[better])))
    return math.fsum(losses) / len(losses)


# ------------------------------------------------------------------------------------------------
# Every function with a mask: values, gradients, garbage

# name: the function of mask and inputs (B, T); its slow reference of the inputs as lists; how many
# inputs there are, and how many of them, the first ones, a gradient flows to
MASKED = {
    "masked_mean": (lambda mask, x: masked_mean(x, mask), slow_mean, 1, 1),
    "masked_whiten": (lambda mask, x: masked_whiten(x, mask), slow_whiten, 1, 1),
    "mean kept": (
        lambda mask, x: masked_whiten(x, mask, shift_mean=False),
        lambda x: slow_whiten(x, False),
        1,
        1,
    ),
    "token_rewards": (
        lambda mask, kl: token_rewards(SCORES[: len(kl)], kl, mask, 0.3),
        lambda kl: slow_token_rewards(SCORES.tolist(), kl, 0.3),
        1,
        1,
    ),
    "gae": (
        lambda mask, r, v: gae(r, v, mask, 0.9, 0.8),
        lambda r, v: slow_gae(r, v, 0.9, 0.8),
        2,
        2,
    ),
    "policy_loss": (
        lambda mask, *x: policy_loss(*x, mask, 0.2),
        lambda *x: slow_policy_loss(*x, 0.2),
        3,
        1,
    ),
    "value_loss": (
        lambda mask, *x: value_loss(*x, mask, 0.4),
        lambda *x: slow_value_loss(*x, 0.4),
        3,
        1,
    ),
}


def make_inputs(name, mask, dtype=torch.float32, garbage=0.0):
    """Inputs (B, T) of a function above, with garbage outside the mask; all of them ask for a
    gradient."""
    inputs = [
        random(*mask.shape, seed=seed, scale=0.6).to(dtype) for seed in range(MASKED[name][2])
    ]
    return [x.masked_fill(mask == 0, garbage).requires_grad_() for x in inputs]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def weighted_sum(results):
    """One number from all results, each element with its own weight, to take the gradient of."""
    return sum(
        (x * random(*x.shape, seed=100 + i).to(x.dtype)).sum() for i, x in enumerate(results)
    )


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lengths, T", [(LENGTHS, 6), ([2, 1, 3], 5), ([1, 1, 1], 1), ([1, 1, 1], 3), ([4, 4], 4)]
)
def test_values(name, dtype, lengths, T):
    function, slow, _, _ = MASKED[name]
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).float()
    inputs = make_inputs(name, mask, dtype)
    results, expected = as_tuple(function(mask, *inputs)), as_tuple(
        slow(*(to_lists(x, mask) for x in inputs))
    )
    assert len(results) == len(expected)
    for x, reference in zip(results, expected):
        assert x.dtype == torch.float32  # bf16 may come in, but nothing is summed in it
        assert_near(x, to_padded(reference, T))  # so it is 0 outside the mask, too


@pytest.mark.parametrize("name", MASKED)
def test_gradients(name):
    function, slow, _, learning = MASKED[name]
    inputs = make_inputs(name, MASK)
    weighted_sum(as_tuple(function(MASK, *inputs))).backward()
    # old_logprobs, advantages, old_values, returns: constants
    assert all(
        x.grad is None for x in inputs[learning:]
    )
    lists = [to_lists(x, MASK) for x in inputs]
    for i, x in enumerate(inputs[:learning]):
        expected = numerical_gradient(
            lambda changed: weighted_sum(
                [
                    to_padded(result, 6)
                    for result in as_tuple(
                        slow(*lists[:i], to_lists(changed, MASK), *lists[i + 1 :])
                    )
                ]
            ).item(),
            x,
        )
        assert (expected[MASK == 0] == 0).all() and expected.abs().max() > 0.01
        assert_near(x.grad, expected, 1e-4)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.long], ids=str)
def test_garbage_outside_the_mask_changes_nothing(name, garbage, mask_dtype):
    clean, dirty = make_inputs(name, MASK), make_inputs(name, MASK, garbage=garbage)
    clean_results = as_tuple(MASKED[name][0](MASK, *clean))
    dirty_results = as_tuple(MASKED[name][0](MASK.to(mask_dtype), *dirty))
    weighted_sum(clean_results).backward()
    weighted_sum(dirty_results).backward()
    assert all(torch.equal(x, y) for x, y in zip(clean_results, dirty_results))
    for x, y in zip(clean[: MASKED[name][3]], dirty):
        assert torch.equal(x.grad, y.grad) and (y.grad[MASK == 0] == 0).all()


# ------------------------------------------------------------------------------------------------
# Distributions: log probabilities, entropy, KL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logprobs_and_entropy(dtype, temperature):
    """Gradient of a log probability: d log p_a / d z_v = (1[v = a] - p_v) / temperature."""
    logits, tokens = random(3, 7, scale=2).to(dtype).requires_grad_(), torch.tensor([0, 6, 2])
    p = [slow_softmax(z, temperature) for z in logits.tolist()]
    logprobs, entropy = logprobs_from_logits(logits, tokens, temperature), entropy_from_logits(
        logits, temperature
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_near(logprobs, [math.log(p[t][a]) for t, a in enumerate(tokens)])
    assert_near(entropy, [slow_entropy(z, temperature) for z in logits.tolist()])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # the gradient of a bf16 tensor is bf16
    expected = [
        [((a == v) - p[t][v]) / temperature for v in range(7)]
        for t, a in enumerate(tokens.tolist())
    ]
    assert_near(torch.autograd.grad(logprobs.sum(), logits)[0], expected, tolerance)
    expected = numerical_gradient(
        lambda z: sum(slow_entropy(row, temperature) for row in z.tolist()), logits
    )
    assert_near(torch.autograd.grad(entropy.sum(), logits)[0], expected, tolerance)


def test_entropy_of_known_distributions():
    assert_near(entropy_from_logits(torch.full((1, 50), 3.0)), [math.log(50)])  # uniform
    # hot: as good as uniform
    assert_near(
        entropy_from_logits(random(1, 50), temperature=1e4), [math.log(50)]
    )
    assert_near(entropy_from_logits(random(1, 50), temperature=1e-3), [0.0])  # cold: one word
    # as top-k leaves them
    two_of_four = torch.tensor(
        [[0.3, -math.inf, 0.3, -math.inf]], requires_grad=True
    )
    entropy = entropy_from_logits(two_of_four)
    entropy.sum().backward()
    assert_near(entropy, [math.log(2)])
    # uniform over what is left is a maximum; and no nan
    assert_near(
        two_of_four.grad, torch.zeros(1, 4)
    )
    assert_near(logprobs_from_logits(two_of_four, torch.tensor([2])), [math.log(0.5)])


def test_expectation_of_kl_estimates():
    """Under pi, E[k1] = E[log pi - log ref] = KL by definition, and E[k3] = sum_v ref_v - sum_v
    pi_v + KL = KL."""
    pi, ref = (slow_softmax(random(9, seed=seed).tolist()) for seed in (0, 1))
    kl = math.fsum(p * math.log(p / q) for p, q in zip(pi, ref))
    for kind in ("k1", "k3"):
        estimates = kl_estimate(torch.tensor([pi]).log(), torch.tensor([ref]).log(), kind)
        assert_near((torch.tensor([pi]) * estimates).sum(), kl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind, estimate, slope",
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
def test_kl_estimates_and_their_slopes(kind, estimate, slope, dtype):
    """As functions of d = log pi - log ref (Schulman 2020)."""
    logprobs, ref_logprobs = random(3, 5, seed=2).to(dtype).requires_grad_(), random(
        3, 5, seed=3
    ).to(dtype)
    kl = kl_estimate(logprobs, ref_logprobs, kind)
    kl.sum().backward()
    d = (logprobs.double() - ref_logprobs.double()).tolist()
    assert kl.dtype == torch.float32
    assert_near(kl, [[estimate(x) for x in row] for row in d])
    assert_near(
        logprobs.grad,
        [[slope(x) for x in row] for row in d],
        1e-4 if dtype == torch.float32 else 2e-2,
    )


def test_k3_is_never_negative_and_always_finite():
    d = torch.cat(
        [
            torch.linspace(-1e-3, 1e-3, 201),
            torch.linspace(-15, 15, 301),
            torch.tensor([-1e4, -90, 90, 1e4]),
        ]
    )
    k3 = kl_estimate(d, torch.zeros_like(d), "k3")
    assert k3.isfinite().all() and (k3 > -1e-7).all()  # to the rounding of float32 near 1


def test_kl_kinds():
    # k1, unless asked otherwise
    assert (
        kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-3.0]])) == 2
    )
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


@pytest.mark.parametrize(
    "kl, factor", [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)]
)
def test_adaptive_kl(kl, factor):
    """At the target the coefficient stays; 10 % off changes it by 10 % n / horizon; the error is
    cut to +-20 %."""
    control = AdaptiveKL(0.2, target=6.0, horizon=1000)
    control.update(kl, n=100)
    assert control.coef == pytest.approx(0.2 * factor)
    control.update(kl, n=100)  # the changes multiply
    assert control.coef == pytest.approx(0.2 * factor**2)


# ------------------------------------------------------------------------------------------------
# Rewards and advantages


def test_masked_mean_weighs_tokens_and_not_responses():
    """Whatever padding stands beside them."""
    x, mask = torch.tensor([[6.0, 9.0, 9.0], [1.0, 2.0, 3.0]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert masked_mean(x, mask) == 3  # (6 + 1 + 2 + 3) / 4, where the mean of the rows' means is 4
    assert masked_mean(x, torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_moments(shift_mean):
    """Over the whole mask: variance 1, and mean 0 or the mean that it was."""
    x = random(4, 6, scale=3) + 10
    inside = [v for row in to_lists(masked_whiten(x, MASK, shift_mean), MASK) for v in row]
    mean = math.fsum(inside) / len(inside)
    assert mean == pytest.approx(0 if shift_mean else slow_mean(to_lists(x, MASK)), abs=1e-5)
    assert math.fsum((v - mean) ** 2 for v in inside) / len(inside) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 2.0, -0.37, 0.1])
def test_all_equal_advantages(value):
    """There is nothing to prefer: whitening gives 0, without a division by 0, and the policy stays
    where it is."""
    x, logprobs = torch.full((4, 6), value, requires_grad=True), random(4, 6).requires_grad_()
    whitened = masked_whiten(x, MASK)
    # not quite 0: the mean of numbers like 0.1 is off by a rounding
    assert (
        whitened.abs().max() < 1e-3
    )
    assert torch.autograd.grad(whitened.sum(), x, retain_graph=True)[0].isfinite().all()
    loss, _ = policy_loss(logprobs, logprobs, whitened, MASK, 0.2)
    loss.backward()
    assert abs(loss) < 1e-3 and logprobs.grad.abs().max() < 1e-3


def test_score_lands_on_the_last_token():
    rewards = token_rewards(SCORES.bfloat16(), torch.zeros(4, 6), MASK, 0.3)
    assert rewards.nonzero().tolist() == [[0, 0], [1, 5], [3, 3]]  # the third score is 0
    assert_near(rewards.sum(1), SCORES.bfloat16().double())
    # all together it is what PPO maximizes: score - kl_coef KL of the response
    kl = random(4, 6)
    expected = [
        score - 0.3 * math.fsum(row) for score, row in zip(SCORES.tolist(), to_lists(kl, MASK))
    ]
    assert_near(token_rewards(SCORES, kl, MASK, 0.3).sum(1), expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_at_lambda_0_is_the_td_error(gamma):
    rewards, values = random(4, 6), random(4, 6, seed=1)
    advantages, _ = gae(rewards, values, MASK, gamma, 0.0)
    assert_near(
        advantages,
        to_padded(slow_td_errors(to_lists(rewards, MASK), to_lists(values, MASK), gamma), 6),
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_at_lambda_1_is_chatllamas_advantage(gamma):
    """The TD errors telescope: every V but -V_t cancels, and what stays is the discounted return
    minus V_t."""
    rewards, values = random(4, 6), random(4, 6, seed=1)
    advantages, returns = gae(rewards, values, MASK, gamma, 1.0)
    expected = to_padded(chatllama_returns(to_lists(rewards, MASK), gamma), 6)
    assert_near(returns, expected)
    assert_near(advantages, expected - values * MASK)


# ------------------------------------------------------------------------------------------------
# Losses of actor and critic


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_pass_is_reinforce(temperature):
    """While the policy is still the one that sampled, PPO's gradient is the plain policy gradient,
    -mean A grad log pi (Williams 1992), with d log pi_a / d z_v = (1[v = a] - p_v) / temperature.
    Nothing is clipped."""
    logits, advantages = random(4, 6, 5).requires_grad_(), random(4, 6, seed=1)
    tokens = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(2))
    logprobs = logprobs_from_logits(logits, tokens, temperature)
    loss, clip_fraction = policy_loss(logprobs, logprobs.detach(), advantages, MASK, 0.2)
    loss.backward()
    expected = torch.zeros(4, 6, 5, dtype=torch.float64)
    for b, t in MASK.nonzero().tolist():
        for v, p in enumerate(slow_softmax(logits[b, t].tolist(), temperature)):
            expected[b, t, v] = (
                -advantages[b, t] * (float(v == tokens[b, t]) - p) / temperature / sum(LENGTHS)
            )
    assert_near(logits.grad, expected)
    assert_near(loss, -slow_mean(to_lists(advantages, MASK)))  # since rho = 1
    assert clip_fraction == 0


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("log_ratio", [100.0, 1e4, 1e30, math.inf, -100.0, -1e4, -1e30, -math.inf])
def test_policy_loss_with_extreme_ratios(log_ratio, advantage):
    """However far the policy moved, nothing overflows; where the clip holds, the loss is known and
    the gradient is 0."""
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    loss, clip_fraction = policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), 0.2
    )
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite()
    is_clipped = (log_ratio > 0) == (advantage > 0)
    assert clip_fraction == is_clipped
    if is_clipped:
        assert_near(loss, -advantage * (1.2 if advantage > 0 else 0.8))
        assert logprobs.grad == 0
    elif advantage > 0:
        assert_near(loss, 0.0)  # rho A with rho = 0
    else:
        assert loss > 1e6  # rho A with a rho beyond all bounds: a bad token became all but certain


def test_value_loss_by_hand():
    """V_old = 0, R = 2, clip 0.2. V = 1 went too far towards R: the error at 0.2 counts, which V
    cannot change. V = -1 went away from R: its own error counts, and pulls it back. V = 0.1 is
    within the clip."""
    values = torch.tensor([[1.0, -1.0, 0.1]], requires_grad=True)
    loss, clip_fraction = value_loss(
        values, torch.zeros(1, 3), torch.full((1, 3), 2.0), torch.ones(1, 3), 0.2
    )
    loss.backward()
    assert_near(loss, (1.8**2 + 3**2 + 1.9**2) / 2 / 3)
    assert_near(values.grad, [[0.0, -3 / 3, -1.9 / 3]])
    assert_near(clip_fraction, 1 / 3)


def test_value_loss_within_a_wide_clip():
    """A clip that no value reaches is as good as none, and clips none, however V_old + (V - V_old)
    may round."""
    values, old_values, returns = (random(8, 16, seed=seed) for seed in range(3))
    loss, clip_fraction = value_loss(values, old_values, returns, torch.ones(8, 16), 100.0)
    assert_near(
        loss,
        slow_mean([[(v - r) ** 2 / 2 for v, r in tokens_of(values.tolist(), returns.tolist())]]),
    )
    assert clip_fraction == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("garbage", [0.0] + GARBAGE)
def test_ptx_loss(dtype, garbage):
    """The gradient is (p_v - 1[v = label]) / number of labels at the logits before each label that
    counts, and 0 at all others, which predict nothing: whatever stands there."""
    logits, expected_gradient = random(2, 5, 6, scale=2).to(dtype), torch.zeros(
        2, 5, 6, dtype=torch.float64
    )
    expected_loss = slow_ptx_loss(logits.tolist(), LABELS.tolist())
    for b, t in itertools.product(range(2), range(5)):
        if t == 4 or LABELS[b, t + 1] == -100:
            logits[b, t] = garbage
        else:
            for v, p in enumerate(slow_softmax(logits[b, t].tolist())):
                expected_gradient[b, t, v] = (p - float(v == LABELS[b, t + 1])) / 5
    logits.requires_grad_()
    loss = ptx_loss(logits, LABELS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert_near(loss, expected_loss)
    assert_near(logits.grad, expected_gradient, 1e-5 if dtype == torch.float32 else 2e-3)


def test_ptx_loss_without_labels():
    logits = random(2, 5, 6).requires_grad_()
    loss = ptx_loss(logits, torch.full((2, 5), -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("ptx_coef", [0.1, 0.5, 0.9])
def test_colossalchats_ptx_mix_is_ours_at_another_learning_rate(ptx_coef):
    """ColossalChat's  ptx_coef L_ptx + (1 - ptx_coef) L_actor  is  (1 - ptx_coef) (L_actor + c
    L_ptx), our loss with c = ptx_coef / (1 - ptx_coef), and its gradient scaled. Shown on a bigram
    model, where theta[u] are the logits of the token after u: our gradient from autograd, theirs
    from the slow losses and central differences."""
    theta, old_logprobs, advantages = (
        random(6, 6).requires_grad_(),
        random(4, 6, seed=2) - 2,
        random(4, 6, seed=1),
    )
    before, tokens = torch.randint(6, (2, 4, 6), generator=torch.Generator().manual_seed(3))
    demonstrations = LABELS.clamp(min=0)

    logprobs = logprobs_from_logits(theta[before], tokens)
    actor_loss, clip_fraction = policy_loss(logprobs, old_logprobs, advantages, MASK, 0.2)
    (actor_loss + ptx_coef / (1 - ptx_coef) * ptx_loss(theta[demonstrations], LABELS)).backward()
    assert 0 < clip_fraction < 1

    def colossalchat(theta):
        log_p = [[math.log(p) for p in slow_softmax(row)] for row in theta.tolist()]
        logprobs = [
            [log_p[before[b, t]][tokens[b, t]] for t in range(n)] for b, n in enumerate(LENGTHS)
        ]
        actor_loss, _ = slow_policy_loss(
            logprobs, to_lists(old_logprobs, MASK), to_lists(advantages, MASK), 0.2
        )
        return (
            ptx_coef * slow_ptx_loss(theta[demonstrations].tolist(), LABELS.tolist())
            + (1 - ptx_coef) * actor_loss
        )

    assert_near((1 - ptx_coef) * theta.grad, numerical_gradient(colossalchat, theta), 1e-4)


# ------------------------------------------------------------------------------------------------
# What the predecessors got wrong, beside what is right. (The README says in words what was wrong
# with each.)


def test_chatllama_took_the_likeliest_token_not_the_sampled_one():
    """Averaged over what may be sampled, A grad log pi(sampled) is the gradient of the expected
    reward. With the likeliest token in its place it is E[A] grad log pi(likeliest) = 0 for
    advantages with mean 0: nothing would ever be learned."""
    logits, rewards = torch.tensor([1.0, 0.2, -0.5], requires_grad=True), [0.0, 1.0, 3.0]
    p = slow_softmax(logits.tolist())
    baseline = math.fsum(q * r for q, r in zip(p, rewards))
    right, wrong = torch.zeros(3), torch.zeros(3)
    for token in range(3):
        for chosen, total in ((token, right), (0, wrong)):  # token 0 is the likeliest
            logprob = logprobs_from_logits(logits[None], torch.tensor([chosen]))
            loss, _ = policy_loss(
                logprob[None],
                logprob[None].detach(),
                torch.tensor([[rewards[token] - baseline]]),
                torch.ones(1, 1),
                0.2,
            )
            total -= p[token] * torch.autograd.grad(loss, logits)[0]
    expected = numerical_gradient(
        lambda z: math.fsum(q * r for q, r in zip(slow_softmax(z.tolist()), rewards)), logits
    )
    assert expected.abs().max() > 0.1
    assert_near(right, expected)
    assert_near(wrong, torch.zeros(3))


@pytest.mark.parametrize("sign, grows", [(-1, True), (1, False)], ids=["ours", "chatllama"])
def test_chatllama_punished_entropy(sign, grows):
    """A bonus is taken off the loss. (tests/test_ppo.py checks the sign in a whole gradient
    step.)"""
    logits = random(1, 5).requires_grad_()
    before = slow_entropy(logits[0].tolist())
    (gradient,) = torch.autograd.grad(sign * entropy_from_logits(logits).sum(), logits)
    assert (slow_entropy((logits - 0.1 * gradient)[0].tolist()) > before + 1e-3) == grows


def test_chatllama_kept_near_the_last_policy_not_the_sft_policy():
    """A policy that goes the same small step ten times. The KL to the last policy stays as it was
    after the first step; the KL to the SFT policy is 100 times that, since it grows as the square
    of the way. And without a mask the padding pays, too."""
    policies = [[math.log(p) for p in slow_softmax([0.02 * step, 0.0, 0.0])] for step in range(11)]

    def kl(policy, ref):  # exact: the mean of k1 over what may be sampled
        estimates = kl_estimate(torch.tensor([policies[policy]]), torch.tensor([policies[ref]]))
        return math.fsum(
            math.exp(logp) * k for logp, k in zip(policies[policy], estimates[0].tolist())
        )

    assert kl(1, 0) > 1e-5
    assert kl(10, 9) == pytest.approx(kl(1, 0), rel=0.1)
    assert kl(10, 0) == pytest.approx(100 * kl(1, 0), rel=0.1)
    kl_tokens = torch.full((4, 6), 0.5)
    masked, unmasked = (
        token_rewards(torch.zeros(4), kl_tokens, mask, 1.0).sum(1).tolist()
        for mask in (MASK, torch.ones(4, 6))
    )
    assert masked == [-0.5 * length for length in LENGTHS] and unmasked == [-3.0] * 4


def test_chatllama_took_mean_and_deviation_over_different_axes():
    """A good and a bad response. With the mean of each response taken off there is nothing left to
    tell them apart."""
    advantages = [[1.0, 1.5, 1.0, 1.5], [-1.5, -1.0, -1.5, -1.0]]
    ours = masked_whiten(torch.tensor(advantages), torch.ones(2, 4))
    assert_near(ours, slow_whiten(advantages))
    assert (ours[0] > 0.5).all() and (ours[1] < -0.5).all()
    deviation = math.sqrt(slow_mean([[a * a for a in row] for row in advantages]))
    theirs = [[(a - sum(row) / 4) / deviation for a in row] for row in advantages]
    assert theirs[0] == pytest.approx(theirs[1])


def test_chatllama_stepped_the_critic_by_the_actor_s_loss():
    """In the actor's loss the values are constants (in the advantages), so that the critic gets no
    gradient from it."""
    values, returns, logprobs = (
        random(4, 6).requires_grad_(),
        random(4, 6, seed=1),
        random(4, 6, seed=2).requires_grad_(),
    )
    actor_loss, _ = policy_loss(logprobs, logprobs.detach(), returns - values, MASK, 0.2)
    critic_loss, _ = value_loss(values, values.detach(), returns, MASK, 0.2)
    assert torch.autograd.grad(actor_loss, values, allow_unused=True, retain_graph=True)[0] is None
    assert_near(
        torch.autograd.grad(critic_loss, values)[0],
        (values - returns).double() * MASK / sum(LENGTHS),
    )


def test_chatllama_s_critic_learned_the_reward_not_the_return():
    """A score of 2 after three tokens. The return tells the critic at every token what is still to
    come: 2. The reward tells it 0 until the last, and a critic that believes it makes the last but
    one token look like the cause of everything, at lambda 0."""
    rewards, mask = token_rewards(
        torch.tensor([2.0]), torch.zeros(1, 3), torch.ones(1, 3), 0.0
    ), torch.ones(1, 3)
    _, target = gae(rewards, random(1, 3), mask, 1.0, 1.0)
    assert_near(target, [[2.0, 2.0, 2.0]])
    assert_near(rewards, [[0.0, 0.0, 2.0]])
    for believed, advantages in ((target, [[0.0, 0.0, 0.0]]), (rewards, [[0.0, 2.0, 0.0]])):
        loss, _ = value_loss(believed, believed, target, mask, 0.2)
        assert_near(gae(rewards, believed, mask, 1.0, 0.0)[0], advantages)
        assert_near(
            loss, slow_value_loss(believed.tolist(), believed.tolist(), target.tolist(), 0.2)[0]
        )
        assert (loss < 1e-9) == (believed is target)


def test_chatllama_discounted_in_quadratic_time():
    """Twice the tokens cost us twice the operations, and its two loops four times the additions."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    class CountedFloat(float):
        additions = 0

        def __radd__(self, other):
            CountedFloat.additions += 1
            return float(self) + other

        def __rmul__(self, other):
            return CountedFloat(float(self) * other)

    ours, theirs = [], []
    for T in (200, 400):
        with Count() as count:
            gae(torch.ones(1, T), torch.ones(1, T), torch.ones(1, T), 1.0, 1.0)
        ours.append(count.calls)
        CountedFloat.additions = 0
        assert chatllama_returns([[CountedFloat(1)] * T], 1.0)[0][0] == T
        theirs.append(CountedFloat.additions)
    assert ours[1] / ours[0] == pytest.approx(2, rel=0.05)
    assert theirs[1] / theirs[0] == pytest.approx(4, rel=0.05)


def test_colossalchat_drew_ptx_inputs_and_labels_from_different_batches():
    """A bigram model that knows its texts by heart has a loss of 0 on them; with the labels of
    another text it seems to know nothing."""
    text, other = torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[5, 3, 1, 4, 2, 0]])
    theta = torch.full((6, 6), -10.0)
    theta[text[0, :-1], text[0, 1:]] = 10.0
    for labels, loss in ((text, 0.0), (other, 20.0)):
        assert_near(ptx_loss(theta[text], labels), loss, 1e-4)
        assert_near(
            ptx_loss(theta[text], labels),
            slow_ptx_loss(theta[text].tolist(), labels.tolist()),
            1e-4,
        )


def test_colossalchat_gave_the_whole_response_one_advantage():
    """The critic expects nothing, then, after a good token, 2; then comes a bad one, and the
    response ends with 0. One number for both tokens says of neither what it did."""
    rewards, values = [[0.0, 0.0]], [[0.0, 2.0]]
    advantages, _ = gae(torch.tensor(rewards), torch.tensor(values), torch.ones(1, 2), 1.0, 0.0)
    assert_near(advantages, slow_gae(rewards, values, 1.0, 0.0)[0])
    assert_near(advantages, [[2.0, -2.0]])
    assert advantages.mean() == 0  # what one number for the response comes to


def test_colossalchat_divided_the_evaluation_loss_by_the_number_of_records():
    """The sum of the means of batches over the number of records is too small by the batch size.
    Ours is the mean over all tokens."""
    losses = random(4, 6).abs()
    ours, slow = masked_mean(losses, MASK), slow_mean(to_lists(losses, MASK))
    batches = [slow_mean(to_lists(losses[rows], MASK[rows])) for rows in ([0, 1], [2, 3])]
    assert_near(ours, slow)
    assert sum(batches) / len(losses) == pytest.approx(slow / 2, rel=0.1)  # batches of 2


def test_colossalchat_stepped_the_scheduler_once_in_100_batches():
    """Its reward model's cosine counts hundreds of batches: with 199 it learns at the full rate for
    100 and at rate 0 for 99, with 99 the rate never falls. Ours falls with every step after the
    warm-up, for any number of steps."""
    for steps, expected in ((199, [1.0] * 100 + [0.0] * 99), (99, [1.0] * 99)):
        theirs = [
            (1 + math.cos(math.pi * (n // 100) / max(1, steps // 100))) / 2 for n in range(steps)
        ]
        ours = [lr_factor(n, steps) for n in range(steps)]
        falling = ours[ours.index(max(ours)) :]
        assert theirs == pytest.approx(expected)
        assert (
            all(0 < before - after < 0.02 for before, after in zip(falling[1:], falling[2:]))
            and ours[-1] < 0.001
        )


def test_colossalchat_set_the_same_seed_at_every_rollout():
    """One generator for the run: the means of 200 rollouts scatter about the truth. With the seed
    set anew each rollout is the first again, and the mean of many is no better than that one."""
    logits = torch.tensor([[0.3, 0.0, -0.4]] * 8)
    p = slow_softmax(logits[0].tolist())[0]

    def rollout(generator):
        uniform = 1 - torch.rand(8, 1, generator=generator)
        return tuple(sample(logits, 1.0, 0, 1.0, uniform)[0].tolist())

    generator = torch.Generator().manual_seed(0)
    ours = [rollout(generator) for _ in range(200)]
    theirs = [rollout(torch.Generator().manual_seed(0)) for _ in range(200)]
    share = sum(tokens.count(0) for tokens in ours) / 1600
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 1600))
    assert len(set(ours)) > 150 and len(set(theirs)) == 1


# ------------------------------------------------------------------------------------------------
# The reward model (train_rm.py) and the learning rate (sft.py)


@pytest.mark.parametrize("labels", [[3, 1, 4, 0.5], [2, 2, 1, 2], [1, 1, 5, 5, 0], [1, 2]], ids=str)
def test_ranking_loss(labels):
    scores = random(len(labels), scale=2).requires_grad_()
    loss = ranking_loss(scores, torch.tensor(labels))
    loss.backward()
    assert_near(loss, slow_ranking_loss(scores.tolist(), labels))
    assert_near(
        scores.grad,
        numerical_gradient(lambda s: slow_ranking_loss(s.tolist(), labels), scores),
        1e-4,
    )


def test_ranking_loss_at_equal_scores():
    """Each of the K (K - 1) / 2 pairs of InstructGPT's eq. 1 costs log 2, and pushes its two scores
    apart by 1/2."""
    scores = torch.zeros(4, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1.0, 4.0, 2.0, 3.0]))
    loss.backward()
    assert_near(loss, math.log(2))
    assert_near(
        scores.grad, [-0.5 * (won - lost) / 6 for won, lost in [(0, 3), (3, 0), (1, 2), (2, 1)]]
    )


@pytest.mark.parametrize("labels", [[2.0, 2.0, 2.0], [1.0]], ids=str)
def test_ranking_loss_without_a_pair(labels):
    scores = random(len(labels)).requires_grad_()
    loss = ranking_loss(scores, torch.tensor(labels))
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()


@pytest.mark.parametrize("score, expected, gradient", [(1e4, 0.0, 0.0), (-1e4, 2e4, -1.0)])
def test_ranking_loss_with_extreme_scores(score, expected, gradient):
    """log(1 + e^x) is close to max(0, x), and does not overflow at x = 20,000."""
    scores = torch.tensor([score, -score], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert_near(loss, expected)
    assert_near(scores.grad, [gradient, -gradient])


def test_regression_loss():
    scores, labels = random(5).requires_grad_(), random(5, seed=1)
    loss = regression_loss(scores, labels)
    loss.backward()
    errors = [s - y for s, y in zip(scores.tolist(), labels.tolist())]
    assert_near(loss, sum(e**2 for e in errors) / 5)
    assert_near(scores.grad, [2 * e / 5 for e in errors])


def test_pair_statistics():
    scores, labels = [0.5, 2.0, 0.5, -1.0, 3.0], [1.0, 3.0, 2.0, 2.0, 0.0]
    expected = []
    for i, j in itertools.permutations(range(5), 2):
        if labels[i] > labels[j]:
            accuracy = 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
            expected.append((accuracy, scores[i] - scores[j], labels[i] - labels[j]))
    statistics = pair_statistics(torch.tensor(scores), torch.tensor(labels))
    assert sorted(zip(*(x.tolist() for x in statistics))) == sorted(expected)
    assert all(len(x) == 0 for x in pair_statistics(torch.zeros(3), torch.ones(3)))


def test_normalized_scores_have_mean_0_and_deviation_1():
    """Also a second time: what was folded in before is folded in with the rest."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model, tokens = ScalarHead(LlamaBackbone(config)), torch.randint(
        50, (20, 3), generator=torch.Generator().manual_seed(0)
    )
    for shift, scale in ((0.0, 1.0), (5.0, 0.01)):
        model.config.score_mean = model.config.score_mean + shift
        with torch.no_grad():
            model.score.weight *= scale
            before = model(tokens)[:, -1]
            mean, deviation = normalize_(model, before)
            after = model(tokens)[:, -1]
        m = math.fsum(before.tolist()) / 20
        d = math.sqrt(math.fsum((x - m) ** 2 for x in before.tolist()) / 20)
        assert (mean, deviation) == pytest.approx((m, d), rel=1e-4)
        assert_near(after, [(x - m) / d for x in before.tolist()], 1e-4)


def test_scores_that_are_all_equal_cannot_be_normalized():
    with pytest.raises(SystemExit) as stopped:
        normalize_(None, torch.tensor([2.0, 2.0]))
    assert stopped.value.code == 1


def test_the_shift_between_a_state_and_its_token():
    """Position by position: the token at t was chosen in the state at t - 1."""
    tokens, places = collate([([0, 1], [2, 3]), ([6], [7, 8, 9, 10, 11])], pad_token_id=4)
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 4], [6, 7, 8, 9, 10, 11]]
    where, hidden = [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)], random(2, 6, 3)
    assert llama.tokens_of(tokens, places).tolist() == [tokens[b, t] for b, t in where]
    assert torch.equal(
        llama.states_of(hidden, places), torch.stack([hidden[b, t - 1] for b, t in where])
    )
    assert torch.equal(
        llama.states_of(hidden[..., 0], places),
        torch.stack([hidden[b, t - 1, 0] for b, t in where]),
    )
    rows = to_rows(torch.arange(1.0, 8), places, torch.zeros(2, 5))
    assert rows.tolist() == [[1, 2, 0, 0, 0], [3, 4, 5, 6, 7]]


def lr_factor(step, steps, *shape):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=7.0)
    lr = set_lr(optimizer, 3.0, step, steps, *shape)
    assert optimizer.param_groups[0]["lr"] == lr
    return lr / 3.0


@pytest.mark.parametrize("steps, warmup", [(200, 6), (1000, 30), (104, 4), (10, 1), (2, 1), (1, 1)])
def test_lr_factor(steps, warmup):
    """Up in a line over 3 % of the steps, rounded up; then from 1 to 0 along half a cosine, which
    is even around 1/2."""
    assert [lr_factor(step, steps) for step in range(warmup)] == pytest.approx(
        [(k + 1) / warmup for k in range(warmup)]
    )
    if steps > warmup:
        falling = [lr_factor(step, steps) for step in range(warmup, steps + 1)]
        assert (
            falling[0] == 1
            and falling[-1] == pytest.approx(0, abs=1e-12)
            and falling == sorted(falling, reverse=True)
        )
        assert [a + b for a, b in zip(falling, reversed(falling))] == pytest.approx(
            [1] * len(falling)
        )
    # a quarter of the way down
    assert lr_factor(4 + 25, 104) == pytest.approx(
        (1 + math.cos(math.pi / 4)) / 2
    )


@pytest.mark.parametrize("floor", [0.1, 0.25])
def test_lr_factor_down_to_a_floor(floor):
    """What is left of the cosine lies between the floor and 1."""
    for step in range(4, 105):
        assert lr_factor(step, 104, "cosine", floor) == pytest.approx(
            floor + (1 - floor) * lr_factor(step, 104)
        )


def test_lr_factor_of_ppo():
    """In equal parts from 1 down to 0, which it would reach at the step after the last."""
    assert [lr_factor(step, 5, "linear") for step in range(5)] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2]
    )
