"""trio tasks: each marries one engine to its adapters."""
