"""Hot operations, each with a plain reference."""
