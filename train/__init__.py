"""MR-MAE and its relatives: masks, students, terms, the training loop and the exported student."""
