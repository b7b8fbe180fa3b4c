"""Curation: documents in, token shards out."""
