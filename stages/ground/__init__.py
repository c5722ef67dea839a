"""What every room stands on: errors of one line, durable files, signals, places, a bar. No torch."""
