"""Tiles to features: encoders, extraction, the feature file and other tools' files."""
