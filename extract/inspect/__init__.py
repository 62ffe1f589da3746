"""inspect-cache: look into a cache, check it, repair it, compare it with another or with live teachers."""
