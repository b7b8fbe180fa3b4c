"""Tilth: the command line over curation, training and evaluation."""
