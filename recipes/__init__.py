"""YAML recipes: one file is one run. `accelerate/` holds the launch configurations."""
