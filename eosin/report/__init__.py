"""The report: tables and figures of an evaluation, and the page that shows them beside the heat maps."""
