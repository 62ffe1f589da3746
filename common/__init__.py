"""What every package uses; it imports nothing of ours."""
