"""release.toml: its sections, their checks, and where in the file a fault is."""
