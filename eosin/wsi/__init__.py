"""Slides: read them by µm/px, find their tissue, tile them. No torch in this package."""
