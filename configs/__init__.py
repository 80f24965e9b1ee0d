"""Model presets and training recipes, as YAML files."""
