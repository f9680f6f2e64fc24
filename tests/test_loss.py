"""The weighted token sum against hand numbers, against the paper's equation, and cut into micro-batches and ranks.

Everything is float64. The references below are the obvious loops over ragged rollouts, written from Thinkless (arXiv
2505.13379) and not from the code under test. The negative control takes means inside each micro-batch, as the
published fork does, and shows that the invariance tests would notice.
"""

import math
from functools import partial

import pytest
import torch

from siesta.rl.advantages import group_advantages, kl_weights, per_mode_advantages, token_weights
from siesta.rl.loss import kl_loss, mass_loss, mode_target_loss, policy_loss, token_ratio

assert_same = partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.3}
JUNK = (-math.inf, math.nan, math.inf, 1e30, -1e30, 0.7)
Batch = dict[str, torch.Tensor]


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, leaf)[0]


# ---- hand-worked numbers -----------------------------------------------------------------------------------------


def test_control_token_term_by_hand() -> None:
    # alpha = 0.5, rho = 0.8, N = 2: weight 0.5 * 0.8 / 2 = 0.2. Ratio 1.1 is inside the clip, A = 1.5.
    # loss = -0.2 * 1.1 * 1.5 = -0.33, d loss / d logp = -0.33 (the ratio is its own derivative).
    mask = torch.tensor([[1]])
    weights = token_weights(mask, torch.tensor([True]), 2, control=tensor([0.5 * 0.8]), decoupled=True)
    new = tensor([[math.log(0.11)]]).requires_grad_()
    loss = policy_loss(new, tensor([[math.log(0.1)]]), tensor([[1.5]]), weights, **CLIP)
    assert loss.item() == pytest.approx(-0.33, abs=1e-10)
    assert_same(gradient(loss, new), tensor([[-0.33]]))


def test_response_token_term_by_hand() -> None:
    # N = 2, T_1 = 2, T_2 = 1; the control tokens are switched off by alpha = 0.
    # Rollout 1: 1/(2*2) * (1.1 + 0.9) * -0.5 = -0.25. Rollout 2: 1/(2*1) * 1.2 * 3 = 1.8. loss = -(-0.25 + 1.8).
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    weights = token_weights(mask, torch.tensor([True, True]), 2, control=tensor([0.0, 0.0]), decoupled=True)
    ratios = tensor([[7.0, 1.1, 0.9], [7.0, 1.2, 7.0]])
    advantages = tensor([[9.0, -0.5, -0.5], [9.0, 3.0, 9.0]])
    loss = policy_loss(ratios.log() - 2.0, torch.full((2, 3), -2.0, dtype=torch.float64), advantages, weights, **CLIP)
    assert loss.item() == pytest.approx(-1.55, abs=1e-10)


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "slope"),
    [
        (1.5, 2.0, 2.6, 0.0),  # min(1.5 * 2, 1.3 * 2) = 2.6: clipped above, no gradient
        (1.5, -2.0, -3.0, -3.0),  # min(-3, -2.6) = -3: a bad token that grew is pushed back at full ratio
        (0.5, 2.0, 1.0, 1.0),  # min(1, 1.6) = 1: a good token that shrank is pulled back
        (0.5, -2.0, -1.6, 0.0),  # min(-1, -1.6) = -1.6: clipped below, no gradient
        (1.1, 2.0, 2.2, 2.2),
        (0.9, -2.0, -1.8, -1.8),
        (1.25, 1.0, 1.25, 1.25),  # above 1 + epsilon_low, below 1 + epsilon_high: the two sides are not mixed up
        (0.75, -1.0, -0.8, 0.0),  # below 1 - epsilon_low, above 1 - epsilon_high
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_clipping_by_hand(ratio: float, advantage: float, surrogate: float, slope: float, place: int) -> None:
    """Both directions, at the control token and at a response token; the weight is 0.25."""
    new = torch.full((1, 3), -1.0, dtype=torch.float64)
    new[0, place] += math.log(ratio)
    new.requires_grad_()
    old = torch.full((1, 3), -1.0, dtype=torch.float64)
    weights, advantages, expected = torch.zeros(3, 1, 3, dtype=torch.float64)
    weights[0, place], advantages[0, place], expected[0, place] = 0.25, advantage, -0.25 * slope
    loss = policy_loss(new, old, advantages, weights, **CLIP)
    assert loss.item() == pytest.approx(-0.25 * surrogate, abs=1e-10)
    assert_same(gradient(loss, new), expected)


def test_kl_term_by_hand() -> None:
    # k3 = exp(d) - d - 1, d = log ref - log pi. d = ln 2: 2 - ln 2 - 1 = 1 - ln 2. d = -ln 2: 1/2 + ln 2 - 1.
    # Weights 0.5 and 0.25: 0.5 (1 - ln 2) + 0.25 (ln 2 - 0.5) = 0.375 - 0.25 ln 2 = 0.2017...
    # d k3 / d logp = 1 - exp(d): 0.5 * (1 - 2) = -0.5 and 0.25 * (1 - 0.5) = 0.125.
    new = tensor([[math.log(0.2), math.log(0.4)]]).requires_grad_()
    loss = kl_loss(new, tensor([[math.log(0.4), math.log(0.2)]]), tensor([[0.5, 0.25]]))
    assert loss.item() == pytest.approx(0.375 - 0.25 * math.log(2), abs=1e-10)
    assert loss.item() == pytest.approx(0.2017132048600137, abs=1e-10)
    assert_same(gradient(loss, new), tensor([[-0.5, 0.125]]))


def test_kl_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    logps = -torch.rand(3, 4, dtype=torch.float64) - 0.1
    weights = torch.rand(3, 4, dtype=torch.float64)
    assert kl_loss(logps, logps, weights).item() == 0.0
    for shift in (-0.5, 0.5):
        assert kl_loss(logps, logps + shift, weights).item() > 0


def test_mode_target_term_by_hand() -> None:
    # p = (1/4, 1/2) over the control tokens (a quarter of the mass elsewhere), pi* = (3/4, 1/4).
    # CE = 3/4 ln 4 + 1/4 ln 2 = 7/4 ln 2. Second row: p = (1, 1/2), pi* = (0, 1): ln 2. Weights 0.5 and 0.1.
    # 0.5 * 1.75 ln 2 + 0.1 ln 2 = 0.975 ln 2 = 0.6758...
    logps = tensor([[0.25, 0.5], [1.0, 0.5]]).log()
    loss = mode_target_loss(logps, tensor([[0.75, 0.25], [0.0, 1.0]]), tensor([0.5, 0.1]))
    assert loss.item() == pytest.approx(0.975 * math.log(2), abs=1e-10)
    assert loss.item() == pytest.approx(0.6758185010459465, abs=1e-10)


# ---- the paper's equation ----------------------------------------------------------------------------------------


def random_batch(seed: int, *, rows: int = 13, width: int = 7, spread: float = 0.4) -> Batch:
    """Ragged rollouts off policy (ratios far outside the clip included), one of them without a response token."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    lengths = torch.randint(0, width, (rows,), generator=random)  # T_i
    lengths[:2] = torch.tensor([0, width - 1])
    mask = (torch.arange(width) <= lengths[:, None]).long()
    new = -noise(rows, width).abs() - 0.05
    old = new + spread * noise(rows, width)
    ref = new + spread * noise(rows, width)
    padding = mask == 0
    for logps in (new, old, ref):
        choice = torch.randint(0, len(JUNK), (int(padding.sum()),), generator=random)
        logps[padding] = tensor(list(JUNK))[choice]
    advantages = noise(rows, 1).repeat(1, width)
    advantages[padding] = 123.0
    return {"mask": mask, "new": new, "old": old, "ref": ref, "advantages": advantages, "lengths": lengths}


def surrogate_loop(new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """L_{i,t} of one token."""
    ratio = torch.exp(new - old)
    clipped = ratio.clamp(0.8, 1.3)
    return torch.minimum(ratio * advantage, clipped * advantage)


def degrpo_terms(batch: Batch, new: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """1/G sum_i of alpha L_{i,0}, of 1/T_i sum_t L_{i,t} and of KL_i, the mean k3 over the tokens of a rollout."""
    control, response, divergence = [], [], []
    for i, length in enumerate(batch["lengths"].tolist()):
        tokens = [surrogate_loop(new[i, t], batch["old"][i, t], batch["advantages"][i, 0]) for t in range(length + 1)]
        control.append(alpha * tokens[0])
        if length > 0:
            response.append(sum(tokens[1:]) / length)
        gaps = [batch["ref"][i, t] - new[i, t] for t in range(length + 1)]
        divergence.append(sum(torch.exp(d) - d - 1 for d in gaps) / (length + 1))
    rollouts = len(batch["lengths"])
    return tuple(sum(term, new.new_zeros(())) / rollouts for term in (control, response, divergence))  # pyright: ignore[reportReturnType]


def weights_of(batch: Batch, *, alpha: float = 1e-3, decoupled: bool = True) -> torch.Tensor:
    rows = len(batch["mask"])
    control = torch.full((rows,), alpha, dtype=torch.float64)
    return token_weights(batch["mask"], torch.ones(rows).bool(), rows, control=control, decoupled=decoupled)


def exact_kl_weights(batch: Batch) -> torch.Tensor:
    """`kl_weights` in float64 (it makes float32), checked against it."""
    mask = batch["mask"].double()
    exact = mask / mask.sum(1, keepdim=True) / len(mask)
    made = kl_weights(batch["mask"], torch.ones(len(mask)).bool(), len(mask))
    torch.testing.assert_close(made, exact, rtol=1e-6, atol=0.0, check_dtype=False)
    return exact


@pytest.mark.parametrize("alpha", [1e-3, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_papers_equation_term_by_term(seed: int, alpha: float) -> None:
    batch = random_batch(seed)
    new = batch["new"].clone().requires_grad_()
    control, response, divergence = degrpo_terms(batch, new, alpha)
    weights = weights_of(batch, alpha=alpha)
    first = torch.arange(new.shape[1]) == 0
    found = {
        "control": -policy_loss(new, batch["old"], batch["advantages"], weights * first, **CLIP),
        "response": -policy_loss(new, batch["old"], batch["advantages"], weights * ~first, **CLIP),
        "KL": kl_loss(new, batch["ref"], exact_kl_weights(batch)),
    }
    for name, term in zip(found, (control, response, divergence), strict=True):
        assert_same(found[name], term, msg=lambda text, name=name: f"{name}: {text}")
        assert_same(gradient(found[name], new), gradient(term, new))


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_papers_objective_and_gradient(seed: int) -> None:
    """All terms at once: loss = -J, off policy and under clipping; padding gets exactly no gradient."""
    alpha, beta = 0.3, 0.05
    batch = random_batch(seed, spread=0.6)
    new = batch["new"].clone().requires_grad_()
    control, response, divergence = degrpo_terms(batch, new, alpha)
    objective = control + response - beta * divergence
    weights = weights_of(batch, alpha=alpha)
    loss = policy_loss(new, batch["old"], batch["advantages"], weights, **CLIP)
    loss = loss + beta * kl_loss(new, batch["ref"], exact_kl_weights(batch))
    assert_same(loss, -objective)
    found = gradient(loss, new)
    assert_same(found, -gradient(objective, new))
    assert (found[batch["mask"] == 0] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_plain_grpo_is_the_mean_over_all_tokens(seed: int) -> None:
    """`decoupled=False`: 1/G sum_i 1/(T_i + 1) sum_{t >= 0} L_{i,t}."""
    batch = random_batch(seed)
    expected = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(batch["lengths"].tolist()):
        real = [batch[name][i, : length + 1] for name in ("new", "old", "advantages")]
        expected = expected + surrogate_loop(*real).mean() / len(batch["lengths"])
    weights = weights_of(batch, alpha=1.0, decoupled=False)
    loss = policy_loss(batch["new"], batch["old"], batch["advantages"], weights, **CLIP)
    assert_same(loss, -expected)


def test_decoupled_and_plain_differ() -> None:
    """Negative control: the two weightings are not the same number by accident."""
    batch = random_batch(0)
    losses = [
        policy_loss(batch["new"], batch["old"], batch["advantages"], weights_of(batch, decoupled=way), **CLIP)
        for way in (True, False)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_gradient_under_reuse_agrees_with_finite_differences() -> None:
    """Second pass over the same rollouts: old log-probabilities are fixed, ratios inside and outside the clip."""
    batch = random_batch(5, rows=4, width=4, spread=0.5)
    weights = weights_of(batch, alpha=0.7)
    new = batch["new"].nan_to_num(0.0, posinf=0.0, neginf=0.0).requires_grad_()
    ratio = token_ratio(new, batch["old"], weights)
    assert (ratio > 1.3).any()
    assert (ratio < 0.8).any()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, batch["old"], batch["advantages"], weights, **CLIP), new, eps=1e-6, atol=1e-8
    )


def test_gradient_is_zero_where_the_clip_binds_however_far() -> None:
    """exp overflows float32 at 88.7; what is clipped away must not come back as 0 * inf."""
    new = torch.tensor([[-0.1, -0.5]], requires_grad=True)
    old = torch.tensor([[-95.0, -0.5]])
    loss = policy_loss(new, old, torch.ones(1, 2), torch.full((1, 2), 0.5), **CLIP)
    assert loss.item() == pytest.approx(-0.5 * 1.3 - 0.5)
    assert gradient(loss, new).tolist() == [[0.0, -0.5]]


def test_first_pass_on_policy_is_reinforce() -> None:
    """old = new without gradient: value -sum w A, gradient -w A (the trainer's case of one step per generation)."""
    batch = random_batch(6)
    new, weights = batch["new"].clone().requires_grad_(), weights_of(batch)
    loss = policy_loss(new, new.detach(), batch["advantages"], weights, **CLIP)
    expected = -weights * batch["advantages"]
    assert_same(loss, expected.sum())
    assert_same(gradient(loss, new), expected)


# ---- weight 0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("place", [0, 2])
def test_weight_zero_means_exactly_no_gradient(junk: float, place: int) -> None:
    logps = torch.full((2, 3), -1.0, dtype=torch.float64)
    weights = torch.full((2, 3), 0.5, dtype=torch.float64)
    weights[1, place] = 0.0
    for new_junk, old_junk in ((junk, -1.0), (-1.0, junk), (junk, junk)):
        new, old = logps.clone(), logps.clone()
        new[1, place], old[1, place] = new_junk, old_junk
        new.requires_grad_()
        for loss in (policy_loss(new, old, torch.ones_like(new), weights, **CLIP), kl_loss(new, old - 0.1, weights)):
            slope = gradient(loss, new)
            assert loss.isfinite()
            assert slope[1, place] == 0.0
            assert slope.isfinite().all()
            assert (slope != 0).sum() == 5


def test_an_impossible_token_of_weight_zero_leaves_the_logits_alone() -> None:
    """-inf comes from a logit of -inf; the gradient has to stay finite through log-softmax as well."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    logits[1, 2, 4] = -math.inf
    logits.requires_grad_()
    new = torch.log_softmax(logits, -1)[..., 4]
    weights = tensor([[0.2, 0.3, 0.1], [0.2, 0.3, 0.0]])
    loss = policy_loss(new, new.detach(), torch.ones_like(new), weights, **CLIP)
    slope = gradient(loss + kl_loss(new, new.detach() - 1, weights), logits)
    assert loss.isfinite()
    assert slope.isfinite().all()
    assert (slope[1, 2] == 0).all()


@pytest.mark.parametrize("junk", JUNK)
def test_mode_target_of_weight_zero_may_be_anything(junk: float) -> None:
    """A group without a scorable rollout has no target: NaN."""
    logps = tensor([[0.25, 0.5], [0.3, 0.6]]).log().requires_grad_()
    loss = mode_target_loss(logps, tensor([[0.75, 0.25], [junk, junk]]), tensor([0.5, 0.0]))
    assert loss.item() == pytest.approx(0.5 * 1.75 * math.log(2), abs=1e-10)
    assert_same(gradient(loss, logps), tensor([[-0.375, -0.125], [0.0, 0.0]]))


@pytest.mark.parametrize("junk", [-math.inf, math.nan])
def test_mode_logps_of_weight_zero_may_be_anything(junk: float) -> None:
    """The rule of the other two terms, for the third: a row of weight 0 takes no part, whatever its probability."""
    logps = tensor([[math.log(0.25), math.log(0.5)], [junk, -1.0]]).requires_grad_()
    loss = mode_target_loss(logps, tensor([[0.75, 0.25], [0.5, 0.5]]), tensor([0.5, 0.0]))
    assert loss.item() == pytest.approx(0.5 * 1.75 * math.log(2), abs=1e-10)
    assert_same(gradient(loss, logps), tensor([[-0.375, -0.125], [0.0, 0.0]]))


@pytest.mark.parametrize("decoupled", [True, False])
def test_every_rollout_masked_is_zero_with_zero_gradient(decoupled: bool) -> None:
    """All unscorable (N = 0): the loss still hangs on the graph, so that ranks stay in step, and moves nothing."""
    batch = random_batch(1)
    rows = len(batch["mask"])
    nobody = torch.zeros(rows).bool()
    weights = token_weights(batch["mask"], nobody, 0, control=torch.ones(rows).double(), decoupled=decoupled)
    new = batch["new"].clone().requires_grad_()
    control = torch.zeros(rows, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.full((rows, 2), math.nan, dtype=torch.float64)
    loss = policy_loss(new, batch["old"], batch["advantages"], weights, **CLIP)
    loss = loss + kl_loss(new, batch["ref"], kl_weights(batch["mask"], nobody, 0))
    loss = loss + mode_target_loss(control, targets, torch.zeros(rows, dtype=torch.float64))
    assert loss.item() == 0.0
    for slope in torch.autograd.grad(loss, (new, control)):
        assert (slope == 0).all()


@pytest.mark.parametrize("width", [1, 4])
def test_batch_without_a_response_token(width: int) -> None:
    """Completions of the control token alone: only its term is left, and the masks may even be empty."""
    rows = 3
    mask = torch.zeros(rows, width, dtype=torch.long)
    mask[:2, 0] = 1  # the third completion is masked as a whole
    weights = token_weights(mask, torch.ones(rows).bool(), rows, control=tensor([0.3] * rows), decoupled=True)
    assert weights[:, 0].tolist() == pytest.approx([0.1, 0.1, 0.0])
    logps = torch.full((rows, width), -math.inf, dtype=torch.float64)
    logps[:2, 0] = -0.5
    new = logps.clone().requires_grad_()
    loss = policy_loss(new, logps, torch.full_like(logps, 2.0), weights, **CLIP)
    loss_kl = kl_loss(new, logps, kl_weights(mask, torch.ones(rows).bool(), rows))
    assert loss.item() == pytest.approx(-0.4, abs=1e-10)
    assert loss_kl.item() == 0.0
    slope = gradient(loss + loss_kl, new)
    assert (slope[:, 1:] == 0).all()
    assert slope[:, 0].tolist() == pytest.approx([-0.2, -0.2, 0.0], abs=1e-10)


# ---- mode targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_mode_target_gradient_is_weight_times_p_minus_target(seed: int) -> None:
    """On the logits of the whole vocabulary, where pi* is 0 off the control tokens."""
    random = torch.Generator().manual_seed(seed)
    control_ids = [1, 4]
    logits = torch.randn(3, 6, generator=random, dtype=torch.float64).mul(3).requires_grad_()
    targets = torch.softmax(torch.randn(3, 2, generator=random, dtype=torch.float64), 1)
    weights = tensor([0.5, 0.0, 0.02])
    loss = mode_target_loss(torch.log_softmax(logits, -1)[:, control_ids], targets, weights)
    wide = torch.zeros(3, 6, dtype=torch.float64)
    wide[:, control_ids] = targets
    expected = weights[:, None] * (torch.softmax(logits.detach(), -1) - wide)
    assert_same(gradient(loss, logits), expected)


@pytest.mark.parametrize("advantage", ["group", "per_mode"])
def test_mode_target_undoes_a_collapse_that_a_policy_gradient_cannot(advantage: str) -> None:
    """30 nats between the modes, and the likely one is the wrong one.

    The policy gradient is taken in its best form, a stratified group with exact importance weights; it carries
    pi(m), about 1e-13, in every term.
    """
    logits = tensor([[30.0, 0.0]]).requires_grad_()
    target = gradient(mode_target_loss(logits.log_softmax(-1), tensor([[0.1, 0.9]]), tensor([1.0])), logits)
    assert_same(target, tensor([[0.9, -0.9]]))

    modes, rewards = torch.tensor([[0, 1, 0, 1]]), tensor([[-1.0, 1.0, -1.0, 1.0]])
    logps = logits.log_softmax(-1)
    policy = logps.detach().exp()
    given = group_advantages(rewards)
    if advantage == "per_mode":
        given, _ = per_mode_advantages(rewards, modes, tensor([[-1.0, 1.0]]), policy)
    weights = token_weights(torch.ones(4, 1), torch.ones(4).bool(), 4, control=2 * policy[0, modes[0]], decoupled=True)
    new = logps[0, modes[0]][:, None]
    slope = gradient(policy_loss(new, new.detach(), given.view(4, 1), weights, **CLIP), logits)
    assert slope.abs().max() < 1e-12
    assert target.abs().max() > 1e11 * slope.abs().max()


# ---- one step, cut anywhere --------------------------------------------------------------------------------------

FEATURES, VOCABULARY, CONTROL_IDS = 5, 7, [0, 1]
BETA = 0.04


def step_batch(seed: int, rows: int = 16, width: int = 8) -> Batch:
    """One optimizer step of a log-linear model: everything that the three terms read, (B, ...) each.

    The weights are made once from the whole step; some rollouts are unscorable, and one group has no mode target.
    """
    random = torch.Generator().manual_seed(seed)
    batch = random_batch(seed, rows=rows, width=width)
    del batch["new"]
    batch["old"], batch["ref"] = batch["old"] - 2.0, batch["ref"] - 2.0
    batch["features"] = torch.randn(rows, width, FEATURES, generator=random, dtype=torch.float64)
    batch["ids"] = torch.randint(0, VOCABULARY, (rows, width), generator=random)
    batch["targets"] = torch.softmax(torch.randn(rows, 2, generator=random, dtype=torch.float64), 1)
    batch["targets"][4:8] = math.nan
    scorable = torch.rand(rows, generator=random) > 0.2
    scorable[:4] = torch.tensor([False, True, True, True])
    number = int(scorable.sum())
    control = torch.rand(rows, generator=random, dtype=torch.float64) + 0.5
    batch["weights"] = token_weights(batch["mask"], scorable, number, control=control, decoupled=True)
    batch["kl_weights"] = kl_weights(batch["mask"], scorable, number).double()
    known = scorable.double()
    known[4:8] = 0.0
    batch["target_weights"] = known / number
    return batch


def loss_of(theta: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The loss of a micro-batch, as the trainer puts it together."""
    logps = torch.log_softmax(batch["features"] @ theta, -1)
    new = logps.gather(-1, batch["ids"][..., None]).squeeze(-1)
    loss = policy_loss(new, batch["old"], batch["advantages"], batch["weights"], **CLIP)
    loss = loss + mode_target_loss(logps[:, 0, CONTROL_IDS], batch["targets"], batch["target_weights"])
    return loss + BETA * kl_loss(new, batch["ref"], batch["kl_weights"])


def theta_of(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(FEATURES, VOCABULARY, generator=random, dtype=torch.float64).requires_grad_()


def take(batch: Batch, rows: torch.Tensor) -> Batch:
    return {name: value[rows] for name, value in batch.items()}


def widen(batch: Batch, extra: int) -> Batch:
    """`extra` columns of right padding that hold junk; its mask and weights are 0."""
    fill = {"old": math.nan, "ref": -math.inf, "advantages": 9.0, "features": 3.0}
    wide = dict(batch)
    for name in ("mask", "old", "ref", "advantages", "features", "ids", "weights", "kl_weights"):
        value = batch[name]
        shape = (len(value), extra, *value.shape[2:])
        wide[name] = torch.cat([value, torch.full(shape, fill.get(name, 0), dtype=value.dtype)], dim=1)
    return wide


def trim(batch: Batch) -> Batch:
    """Cut to the longest completion of the micro-batch."""
    width = int(batch["mask"].sum(1).max())
    return {name: value if value.ndim < 2 or name == "targets" else value[:, :width] for name, value in batch.items()}


def random_parts(rows: int, seed: int) -> list[torch.Tensor]:
    """A partition of the rows into micro-batches of any size, in any order."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=random)
    cuts = (torch.rand(rows - 1, generator=random) < 0.35).nonzero().flatten() + 1
    return list(order.tensor_split(cuts.tolist()))


def assert_same_step(theta: torch.Tensor, batch: Batch, loss: torch.Tensor) -> None:
    """Loss and gradient are those of the full batch."""
    whole = loss_of(theta, batch)
    assert_same(loss, whole)
    expected = gradient(whole, theta)
    assert expected.abs().max() > 1e-2  # not a comparison of zeros
    assert_same(gradient(loss, theta), expected)


@pytest.mark.parametrize("layout", ["as it is", "padded", "trimmed"])
@pytest.mark.parametrize("seed", range(5))
def test_any_split_into_micro_batches_adds_up_to_the_full_batch(seed: int, layout: str) -> None:
    batch, theta = step_batch(seed), theta_of(seed)
    parts = random_parts(len(batch["mask"]), seed)
    assert len(parts) > 2
    total = torch.zeros((), dtype=torch.float64)
    for number, rows in enumerate(parts):
        part = take(batch, rows)
        part = {"as it is": part, "padded": widen(part, number + 1), "trimmed": trim(part)}[layout]
        total = total + loss_of(theta, part)
    assert_same_step(theta, batch, total)


def test_rows_one_by_one_backwards() -> None:
    batch, theta = step_batch(7), theta_of(7)
    rows = reversed(range(len(batch["mask"])))
    total = sum((loss_of(theta, take(batch, torch.tensor([i]))) for i in rows), torch.zeros(()).double())
    assert_same_step(theta, batch, total)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_that_average_gradients_add_up_to_the_full_batch(ranks: int) -> None:
    """Each rank sums its micro-batches and multiplies by R; data parallelism averages over the R ranks."""
    batch, theta = step_batch(ranks), theta_of(ranks)
    losses = []
    for own in torch.arange(len(batch["mask"])).tensor_split(ranks):
        micro_batches = [own[rows] for rows in random_parts(len(own), seed=ranks)]
        losses.append(ranks * torch.stack([loss_of(theta, take(batch, rows)) for rows in micro_batches]).sum())
    assert_same_step(theta, batch, torch.stack(losses).mean())


def test_weights_do_not_see_padding() -> None:
    """Weights made from a wider mask are the same numbers, with zeros on the padding."""
    batch = random_batch(3)
    wide = widen({**step_batch(3), **batch}, 4)["mask"]
    rows = len(wide)
    everyone, control = torch.ones(rows).bool(), torch.rand(rows, dtype=torch.float64)
    for decoupled in (True, False):
        pair = [token_weights(m, everyone, rows, control=control, decoupled=decoupled) for m in (batch["mask"], wide)]
        torch.testing.assert_close(torch.nn.functional.pad(pair[0], (0, 4)), pair[1], rtol=0, atol=0)
    pair = [kl_weights(mask, everyone, rows) for mask in (batch["mask"], wide)]
    torch.testing.assert_close(torch.nn.functional.pad(pair[0], (0, 4)), pair[1], rtol=0, atol=0)


def fork_loss(batch: Batch, alpha: float = 0.5) -> torch.Tensor:
    """The published fork: alpha * masked_mean(control) + masked_mean(response), within each micro-batch."""
    ratio = batch["log_ratio"].exp()
    clipped = ratio.clamp(0.8, 1.3)
    token_loss = -torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    response = batch["mask"][:, 1:].bool()
    return alpha * token_loss[:, 0].mean() + token_loss[:, 1:][response].mean()


def test_means_per_micro_batch_depend_on_the_split() -> None:
    """Negative control: the same rollouts, three splits, three different losses and gradients."""
    batch = random_batch(2, rows=16)
    leaf = torch.where(batch["mask"] > 0, batch["new"] - batch["old"], 0.0).requires_grad_()
    batch["log_ratio"] = leaf
    order = batch["lengths"].argsort()  # sorted by length, as token budgets sort them
    splits = [[torch.arange(16)], list(torch.arange(16).split(8)), [order[:4], order[4:9], order[9:]]]
    losses = [torch.stack([fork_loss(take(batch, rows)) for rows in split]).mean() for split in splits]
    slopes = [gradient(loss, leaf) for loss in losses]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(losses[a] - losses[b]) > 1e-3
        assert (slopes[a] - slopes[b]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_same_splits_leave_our_loss_alone(seed: int) -> None:
    """The other half of the negative control: the splits above, the weighted sum."""
    batch, theta = step_batch(seed), theta_of(seed)
    order = batch["lengths"].argsort()
    for split in ([torch.arange(16)], list(torch.arange(16).split(8)), [order[:4], order[4:9], order[9:]]):
        assert_same_step(theta, batch, torch.stack([loss_of(theta, take(batch, rows)) for rows in split]).sum())


def test_mass_loss_by_hand_and_its_gradient() -> None:
    """Weights 0.5 and 0.25 on masses 0.8 and 0.5: -(0.5 ln 0.8 + 0.25 ln 0.5); a row of weight 0 may hold anything."""
    log_mass = tensor([math.log(0.8), math.log(0.5), -math.inf]).requires_grad_()
    loss = mass_loss(log_mass, tensor([0.5, 0.25, 0.0]))
    assert loss.item() == pytest.approx(-(0.5 * math.log(0.8) + 0.25 * math.log(0.5)), abs=1e-12)
    loss.backward()
    assert log_mass.grad is not None
    assert log_mass.grad.tolist() == [-0.5, -0.25, 0.0]


def test_targets_and_mass_together_are_the_cross_entropy_over_the_vocabulary() -> None:
    """CE(pi*, p) over all tokens = CE(pi*, pi) - log mass, so its gradient on the logits is p - pi*."""
    logits = tensor([0.3, -1.0, 2.0, 0.5]).requires_grad_()
    target, weight = tensor([0.7, 0.3]), tensor([1.0])
    control = logits[:2]
    log_mass = control.logsumexp(0) - logits.logsumexp(0)
    loss = mode_target_loss(control.log_softmax(0)[None], target[None], weight) + mass_loss(log_mass[None], weight)
    loss.backward()
    expected = logits.detach().softmax(0) - torch.cat([target, tensor([0.0, 0.0])])
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)
