"""Sleep: a pass over a context before the question comes, and the state it leaves.

What is here are the mechanisms, to be used from Python: `latent`, `gist`, `memory`. No recipe reaches them yet: the
section `sleep:`, notes, the training of sleep and the command `siesta sleep` are still to be built.
"""
