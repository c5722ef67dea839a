"""What a stage keeps for its next start, and for whom: identity, code, folder, lock, seals, environment. No torch."""
