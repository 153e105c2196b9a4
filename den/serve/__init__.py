"""Trained networks behind HTTP: pictures come in, classes with their structures and costs go out."""
