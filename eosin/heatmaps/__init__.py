"""From a model's numbers to pictures and files that a pathologist opens, and to answers to "what if"."""
