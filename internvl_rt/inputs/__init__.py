"""What a user sends, turned into what the model reads: pictures into tiles, text into token ids, both into a prompt."""
