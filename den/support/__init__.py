"""Files, limits, progress, devices, random generators."""
