"""Prefect flows: thin tasks, flows that read as a table of contents."""
