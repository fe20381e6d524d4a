"""Multiple-instance learning: packed bags, the three slots of a paper, training, evaluation and prediction."""
