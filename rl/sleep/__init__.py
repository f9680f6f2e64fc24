"""Sleep: a pass over a context before the question comes, and the state it leaves.

A mechanism is a file: `raw` (with `none`), `notes`, `latent`, `gist`, `memory`. `factory` builds the one that a recipe
names, `store` keeps states on disk, `night` is the command `siesta sleep`, `wake` answers from states (`siesta
answer`). A recipe trains notes (`warmup`, `trainer`, `credit`; measured by `states`) and states that are tensors
(`state_warmup`, `state_trainer`, `scoring`; measured by `tensor_states`).
"""
