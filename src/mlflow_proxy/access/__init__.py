"""Who calls, and what they may do here: steps 2 and 4 of a request's way."""
