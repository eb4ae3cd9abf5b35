"""The student: loading, forward pass, sharding, adapters and export."""
