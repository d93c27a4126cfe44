"""Serves one text model: OpenAI's completions with thinking, requests that share passes, and a page."""
