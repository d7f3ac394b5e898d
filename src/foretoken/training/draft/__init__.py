"""Draft models made to measure: their shape is designed, then they are made and trained."""
