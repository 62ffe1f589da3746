"""What a cache is: its plan, ids, samples, views, codes and tails, and the small files that hold them."""
