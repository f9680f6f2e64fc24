"""RL on the mode, on top of a hybrid that sleeps: where does it still think once sleep has done the work?

The query window says both the answer (`short`) and, by the two control tokens of its head, which mode to take. `think`
recalls the row from S and writes it t times, a window each, one step of Rule 110 further every time; its answer is the
first cell of the last row. A pass has a price, so `short` costs one and `think` t + 2.

The loss is siesta's: mode targets (`mode_target_loss`) from the mode values of each query, and for the sampled short
answers the policy loss with per-mode advantages; its gradient goes through sleep, which runs anew with every step.
Rows are written greedily and are not trained here: one rollout of `think` is all of them.
"""

import torch
from torch.nn import functional as F

from benchmarks import rule110_rows
from benchmarks.rule110_arm import FRESH, Arm, Sizes, without_gradients
from benchmarks.rule110_model import Hybrid, States
from benchmarks.rule110_rows import Rows, to_bits
from siesta.data.tasks.rule110 import DEPTHS
from siesta.rl.advantages import mode_targets, mode_values, per_mode_advantages
from siesta.rl.loss import mode_target_loss, policy_loss

PRICE = 0.02  # of a pass, in units of reward; right is 1, wrong -1
TAU = 0.1
SHORTS = 8  # sampled short answers a query
RATE = 3e-4
OWN_ROWS = 1000  # added to the seed: RL sees rows of its own


def passes_of(depth: torch.Tensor) -> torch.Tensor:
    """Wake passes of both modes, (B, 2): the query window; for `think` also the row and each of its t steps."""
    t = torch.tensor(DEPTHS, device=depth.device)[depth]
    return torch.stack([torch.ones_like(t), t + 2], 1)


@without_gradients
def think(model: Hybrid, states: States, which: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Answers (B,) of `think` for row `which` (B,), every row written greedily."""
    t = torch.tensor(DEPTHS, device=depth.device)[depth]
    row = model.recalled(states, which)[..., :2].argmax(-1)
    answer = torch.zeros_like(which)
    for done in range(1, int(t.max()) + 1):
        row = model.written(states, which, row)[..., :2].argmax(-1)
        answer = torch.where(t == done, row[:, row.shape[1] // 2], answer)
    return answer


def asked(model: Hybrid, rows: Rows, passes: int) -> tuple[States, torch.Tensor, torch.Tensor]:
    """Sleep, then the one query of each context: S, its logits (B, OUTPUTS) and its label (B,)."""
    states = model.sleep(to_bits(rows.rows, model.shape.bits), rows.depth, passes)
    at = torch.arange(len(rows), device=rows.which.device)
    return states, model.answer(states)[at, rows.which], rows.labels[at, rows.which]


def rl_loss(model: Hybrid, rows: Rows, passes: int, generator: torch.Generator) -> torch.Tensor:
    """Loss of a batch of queries, SHORTS rollouts of `short` and one of `think` each."""
    states, logits, label = asked(model, rows, passes)
    mode_logps, bit_logps = F.log_softmax(logits[:, 2:], -1), F.log_softmax(logits[:, :2], -1)
    drawn = torch.multinomial(bit_logps.detach().exp(), SHORTS, replacement=True, generator=generator)  # (B, SHORTS)
    thought = think(model, [state.detach() for state in states], rows.which, rows.depth)
    right = torch.cat([drawn, thought[:, None]], 1) == label[:, None]
    modes = torch.tensor([0] * SHORTS + [1], device=label.device).expand(len(label), -1)
    rewards = 2.0 * right - 1.0 - PRICE * passes_of(rows.depth).gather(1, modes)
    values, _ = mode_values(rewards, modes, 2)
    targets, _ = mode_targets(values, torch.ones(2, device=label.device), TAU)
    _, advantages = per_mode_advantages(rewards, modes, values, mode_logps.detach().exp())
    per_token_logps = bit_logps.gather(1, drawn)
    weights = torch.full_like(per_token_logps, 1 / modes.numel())
    surrogate = policy_loss(
        per_token_logps,
        per_token_logps.detach(),
        advantages[:, :SHORTS],
        weights,
        epsilon_low=0.2,
        epsilon_high=0.2,
    )
    return surrogate + mode_target_loss(mode_logps, targets, torch.full_like(mode_logps[:, 0], 1 / len(label)))


@without_gradients
def policies(model: Hybrid, rows: Rows, passes: int, batch: int) -> dict[str, dict]:
    """Every policy on the same queries, by depth: t -> P(think), and accuracy, wake passes and think share of each.

    `free` is the likelier mode of each query, `oracle` the mode with the higher reward.
    """
    kept: list[torch.Tensor] = []
    for part in range(0, len(rows), batch):
        some = rows.map(lambda tensor, part=part: tensor[part : part + batch])
        states, logits, label = asked(model, some, passes)
        answers = torch.stack([logits[:, :2].argmax(-1), think(model, states, some.which, some.depth)], 1)
        right = (answers == label[:, None]).float()
        kept.append(torch.cat([right, passes_of(some.depth), logits[:, 2:].float().softmax(-1)[:, 1:]], 1))
    right, cost, prob = torch.cat(kept).split([2, 2, 1], 1)
    reward = 2 * right - 1 - PRICE * cost
    choices = {
        "always-short": torch.zeros_like(rows.which),
        "always-think": torch.ones_like(rows.which),
        "free": (prob[:, 0] > 0.5).long(),
        "oracle": reward.argmax(1),
    }
    result = {}
    for index in rows.depth.unique().tolist():
        mine = rows.depth == index
        result[str(DEPTHS[index])] = {"prob_think": prob[mine].mean().item()} | {
            name: {
                "accuracy": right.gather(1, choice[:, None])[mine].mean().item(),
                "passes": cost.gather(1, choice[:, None])[mine].mean().item(),
                "think": choice[mine].float().mean().item(),
                "reward": reward.gather(1, choice[:, None])[mine].mean().item(),
            }
            for name, choice in choices.items()
        }
    return result


def learn_modes(model: Hybrid, arm: Arm, sizes: Sizes, device: str) -> dict:
    """RL on a warmed-up model; `policies` on test rows before and after it, and the loss of each eighth."""

    def rows(split: str, count: int, seed: int) -> Rows:
        return rule110_rows.make(count, sizes.shape.bits, arm.depths, split, seed).map(lambda part: part.to(device))

    test = rows("test", sizes.held_out, FRESH)
    seen = rows("train", sizes.rl_steps * sizes.batch, arm.seed + OWN_ROWS)
    steps = seen.map(lambda part: part.unflatten(0, (sizes.rl_steps, sizes.batch)))
    generator = torch.Generator(device).manual_seed(arm.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses = torch.zeros(sizes.rl_steps, device=device)
    before = policies(model, test, arm.passes, sizes.batch)
    for step in range(sizes.rl_steps):
        loss = rl_loss(model, steps.map(lambda part, step=step: part[step]), arm.passes, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step] = loss.detach()
    after = policies(model, test, arm.passes, sizes.batch)
    eighths = [part.mean().item() for part in losses.tensor_split(min(8, len(losses)))]
    return {"price": PRICE, "tau": TAU, "before": before, "after": after, "losses": eighths}
