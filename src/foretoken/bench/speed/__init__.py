"""Ticks, speed and quality of a model that runs its layers in loops, beside models that do not."""
