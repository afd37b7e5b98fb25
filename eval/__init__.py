"""Evaluation: generate images, score them, compare two models, look at the result. The stages meet in files."""
