"""Sleep: a pass over a context before the question comes, and the state it leaves.

A recipe trains `notes`: text that the policy writes itself. `latent`, `gist` and `memory` are mechanisms to be used
from Python; no recipe reaches them yet.
"""
