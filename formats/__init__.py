"""Other people's files: what they hold, and what of it is refused."""
