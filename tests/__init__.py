"""Tests mirror the house: a folder for each room, `promises/` for what is about the whole, `support/` for helpers."""
