"""Model presets: one YAML file per named size."""
