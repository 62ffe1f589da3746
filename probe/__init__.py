"""How good are the features: evaluation of students, teachers and cache columns."""
