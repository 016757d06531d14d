"""What does one see of a run? Before it, beside it, after it: from its command and its files alone."""
