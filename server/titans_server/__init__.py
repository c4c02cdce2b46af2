"""The service: sessions over HTTP, each with a memory of its own."""
