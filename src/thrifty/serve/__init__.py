"""The OpenAI-compatible gateway: strategies and dials in front of a local model or another server."""
