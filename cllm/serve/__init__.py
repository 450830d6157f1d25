"""Answering: the engine, and the page and the API that read from it."""
