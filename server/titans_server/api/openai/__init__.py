"""The door that OpenAI's clients know: the same use cases, in OpenAI's words."""
