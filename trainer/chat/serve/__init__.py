"""`chatmill serve`: a chat page and an OpenAI-compatible API on one checkpoint. Needs the extra `serve`."""
