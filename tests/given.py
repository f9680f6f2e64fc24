"""Rollouts that depend on nothing but the step and their place, so that runs can be compared over several steps."""

import torch

from siesta.rl.trainer import DeGRPOTrainer


class GivenRollouts(DeGRPOTrainer):
    """Writes random tokens of random lengths instead of asking the model."""

    def _generate_locally(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        first = self.accelerator.process_index * len(prompt_ids)
        responses = []
        for place, column in enumerate(self._plan.modes.tolist()):
            draw = torch.Generator().manual_seed(1000 * self.state.global_step + first + place)
            length = int(torch.randint(1, self.modes[column].max_tokens + 1, (1,), generator=draw))
            responses.append(torch.randint(4, 30, (length,), generator=draw).tolist())
        for column in range(len(self.modes)):
            self._verify(column, responses)
        return responses
