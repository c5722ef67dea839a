"""What looks and shows while it trains, and never decides a bit: no part of a run's identity."""
