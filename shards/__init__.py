"""The feature cache: views, quantised columns, shards, commits and the manifest."""
