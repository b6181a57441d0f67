"""What sglang lacks on the CPU; see pyproject.toml."""
