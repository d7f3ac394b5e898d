"""The engine: requests, their schedule, and the one step that serves them all."""
