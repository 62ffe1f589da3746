"""What is learnt, as pure functions of a recipe, a batch and its masks: no files, no cache."""
