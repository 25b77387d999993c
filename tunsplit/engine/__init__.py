"""What tunsplit decides and remembers: pure state, no I/O, no clock, no randomness of its own."""
