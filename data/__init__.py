"""Everything up to the prompt: the example schema, sources, generated tasks and the prompt template."""
