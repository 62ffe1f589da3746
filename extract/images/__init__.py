"""Images as they are given: listed, read, hashed and decoded."""
