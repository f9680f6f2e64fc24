"""What a completion is worth: verifiers, the mode table and prices. Pure Python, no torch."""
