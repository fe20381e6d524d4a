"""Stages on many machines: Parsl asks the batch system for workers, hands them slides and folds, and replaces the lost.

A stage is a `eosin._batch.Stage`. What travels is the path of a JSON file that says what the stage is, and the JSON of
one item; what comes back is one record. The job folder stays the truth: workers claim an item, look whether it is done,
write its output and append its record, so that nothing is lost with the driver.
"""
