"""One family of files from the same numbers and the same colour scale."""
