"""One module for each kernel interface; they return plain values and know nothing of each other's use."""
