"""Figures, each a PNG whose title says what was found."""
