"""Stages in a row: slides to features, features to models, models to predictions, maps and a report."""
