"""Turns what a user sends into what the model reads: pictures into tiles, text into token ids, both into a prompt."""
