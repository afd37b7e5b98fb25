"""Preference data: the table, one pair, its random draws, labels, the cache, the check."""
