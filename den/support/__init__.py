"""What every other part stands on: files, limits, progress, devices, random generators."""
