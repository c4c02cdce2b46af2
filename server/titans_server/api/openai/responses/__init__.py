"""Responses and conversations: OpenAI's words for an answer with a state. A conversation is a session."""
