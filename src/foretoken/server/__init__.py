"""The OpenAI-compatible server; see docs/serve.md."""
