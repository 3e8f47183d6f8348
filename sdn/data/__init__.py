"""Captioned images: sources, shards, the plan of who reads what, the loader."""
