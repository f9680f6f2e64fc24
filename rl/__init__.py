"""The method: modes, rollouts, advantages, loss, trainer, evaluation and export."""
