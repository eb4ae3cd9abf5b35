"""Chats: rendering by each model's chat template, search for the supervised contents, alignment of two renderings."""
