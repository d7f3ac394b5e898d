"""`foretoken tune`: which drafter and how many nodes, on this machine, for these prompts."""
