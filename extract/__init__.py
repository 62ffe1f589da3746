"""Photos in, teacher features out: sources, teachers and the extraction engine."""
