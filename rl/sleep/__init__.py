"""Sleep: a pass over a context before the question comes, and the state it leaves."""
