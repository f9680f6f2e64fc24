"""The mode plan: which mode each rollout of a group is written in, and with what probability the plan chose it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModePlan:
    """Modes of B rollouts.

    Args:
        modes: Column of each rollout's mode, (B,) long.
        mode_probs: pi_old(m given x_i), (B, M).
        sampled_probs: q(m_i given x_i), (B,): the expected share of the group that the plan gives to the mode.
        mass: Probability on control tokens at the first position, (B,).
    """

    modes: torch.Tensor
    mode_probs: torch.Tensor
    sampled_probs: torch.Tensor
    mass: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        """rho_i = pi_old(m_i given x_i) / q(m_i given x_i), the exact importance weight of a forced mode, (B,)."""
        return self.mode_probs.gather(1, self.modes[:, None]).squeeze(1) / self.sampled_probs


def forced_per_mode(sampling: str, group: int, num_modes: int, floor: int) -> int:
    """How many rollouts of each mode a plan forces in a group."""
    return {"free": 0, "stratified": group // num_modes, "floor": floor}[sampling]


def annealed_floor(floor: int, step: int, steps: int) -> int:
    """The floor after `step` of `steps` steps of a linear anneal to 0; `steps` = 0 keeps it."""
    return floor if steps == 0 else round(floor * max(0.0, 1 - step / steps))


def draw_modes(
    mode_probs: torch.Tensor, places: torch.Tensor, *, group: int, sampling: str, floor: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a mode for each rollout.

    The first M * k rollouts of a group are forced, k of each mode in turn; the others are drawn from pi (`free`,
    `floor`) or, where the group does not divide by M, uniformly (`stratified`). A rollout is decided by its place in
    its group alone, so a group may be spread over ranks. q(m) = (k + (G - M k) p(m)) / G is the expected share of mode
    m in the group: with rho = pi / q the sum over the group is unbiased for pi, forced rollouts included.

    Args:
        mode_probs: pi_old(m given x_i), (B, M).
        places: Place of each rollout in its group, 0 to G - 1, (B,).
        group: G.
        sampling: `free`, `stratified` or `floor`.
        floor: k of `floor`.

    Returns:
        Modes (B,) and q(m_i given x_i) (B,).
    """
    num_modes = mode_probs.shape[1]
    forced = forced_per_mode(sampling, group, num_modes, floor)
    rest = torch.full_like(mode_probs, 1 / num_modes) if sampling == "stratified" else mode_probs
    drawn = torch.multinomial(rest, 1).squeeze(1)
    modes = torch.where(places < forced * num_modes, places % num_modes, drawn)
    shares = (forced + (group - forced * num_modes) * rest) / group  # (B, M)
    return modes, shares.gather(1, modes[:, None]).squeeze(1)
